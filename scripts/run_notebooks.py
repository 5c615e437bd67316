"""Run the tutorials again, in place, and say how long each took.

    python scripts/run_notebooks.py [NOTEBOOK ...]

Needs `pip install ".[docs]"`. Notebooks that read files say where these come from; CELLPRIOR_TUTORIAL_DATA names the
folder with them. Without it, such notebooks are left as they are. Nothing is downloaded.

Into each is written what it came from, see ``_notebook_source.py``: by it a test tells whether it is to be run again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from _notebook_source import fingerprint
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
DATA = "CELLPRIOR_TUTORIAL_DATA"
CELL = re.compile(r"/\S*ipykernel_\d+/\d+\.py:\d+: ")  # a file of this run alone, in front of a warning
NO_WIDGETS = re.compile(r".*TqdmWarning: IProgress not found.*\n.*\n")  # here, and not in a user's notebook
OVERWRITTEN = re.compile(
    r"[^\n\r]*\r(?!\n)"
)  # an earlier state of a bar, as a screen does not show it any more


def main() -> int:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    for path in parser.parse_args().notebook:
        notebook = nbformat.read(path, as_version=4)
        if DATA in "".join(cell.source for cell in notebook.cells) and DATA not in os.environ:
            sys.stdout.write(f"{path.name}: left as it is, {DATA} is not set\n")
            continue
        start = time.perf_counter()
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(path.parent)}}).execute()
        tidy(notebook)
        notebook.metadata["cellprior"] = {"made_from": fingerprint([cell.source for cell in code(notebook)])}
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path.name}: {time.perf_counter() - start:.0f} s\n")
    return 0


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Its cells with code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Take out when and where it was run. What users see in their own notebook stays, line by line."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        kept = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = CELL.sub("", OVERWRITTEN.sub("", NO_WIDGETS.sub("", output.text)))
                if not output.text.strip():
                    continue
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept


if __name__ == "__main__":
    sys.exit(main())
