"""Executes the notebooks beside this file, or the named ones, in place; keeps of outputs what another run repeats.

python notebooks/execute.py [NAME.ipynb ...]
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path, timeout=1800):
    """Run a notebook in its own folder and write it back; an error in a cell is raised."""
    os.environ["TQDM_DISABLE"] = "1"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _passing(o)]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, path)
    return notebook


def _passing(output):
    """Whether an output is a warning of what is installed here, or a progress bar with its times."""
    return output.get("name") == "stderr" or "<progress" in output.get("data", {}).get("text/html", "")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(p.name for p in HERE.glob("*.ipynb")):
        execute(HERE / name)
        print(name)
