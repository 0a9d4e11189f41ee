"""Writes the table of a result file into README.md, between `<!-- table: FILE -->` and `<!-- end -->`.

python eval/readme_table.py
"""

import json
import re
from pathlib import Path

from compare import read
from compare_report import table as compared

from basis_select.evaluation.report import table

REPO = Path(__file__).parents[1]


def fill(text):
    def block(match):
        source = REPO / match[1]
        lines = compared(read(source)) if source.suffix == ".jsonl" else table(json.loads(source.read_text()))
        return f"<!-- table: {match[1]} -->\n{lines}<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = REPO / "README.md"
    readme.write_text(fill(readme.read_text()))
