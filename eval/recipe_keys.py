"""Writes docs/recipe_keys.md and docs/recipe.schema.json from the signatures of the verbs.

python eval/recipe_keys.py
"""

import json
import re
from pathlib import Path

from basis_select.run.recipe import json_schema, reference

DOCS = Path(__file__).parents[1] / "docs"


def page(text):
    """The page with its tables written anew, one for each section, between `<!-- keys -->` and `<!-- end -->`."""
    tables = []
    for section, (does, rows) in reference().items():
        lines = ["| key | what it does | values | default |", "|---|---|---|---|"]
        for key, kind, default, what in rows:
            lines.append(f"| `{key}` | {what} | {kind} | {f'`{default}`' if default else 'required'} |")
        heading = f"## `{section}`" if section else "## Outside of sections"
        tables.append("\n".join([heading, "", does, "", *lines, ""]))
    found = "<!-- keys -->\n\n" + "\n".join(tables) + "\n<!-- end -->"
    return re.sub(r"<!-- keys -->.*<!-- end -->", lambda _: found, text, flags=re.DOTALL)


def schema():
    return json.dumps(json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    keys = DOCS / "recipe_keys.md"
    keys.write_text(page(keys.read_text()))
    (DOCS / "recipe.schema.json").write_text(schema())
