"""The tutorials are stored as they ran: all cells, in order, without an error, and with pictures."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return json.loads(request.param.read_text(encoding="utf-8"))["cells"]


def code(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_tutorials():
    assert {path.name[:2] for path in NOTEBOOKS} >= {"01", "02", "03", "05"}


def test_every_cell_was_run_once_from_top_to_bottom_and_none_failed(cells):
    assert [cell["execution_count"] for cell in code(cells)] == list(range(1, len(code(cells)) + 1))
    for cell in code(cells):
        ast.parse("".join(cell["source"]))
        assert all(output["output_type"] != "error" for output in cell["outputs"])


def test_it_begins_with_a_title_and_ends_in_a_map(cells):
    assert cells[0]["source"][0].startswith("# ")
    pictures = ["image/png" in output.get("data", {}) for output in code(cells)[-1]["outputs"]]
    assert any(pictures)


def test_nothing_in_it_says_where_it_was_run(cells):
    for cell in code(cells):
        for output in cell["outputs"]:
            shown = [output.get("text", []), output.get("data", {}).get("text/plain", [])]
            for line in ["".join(lines) for lines in shown]:
                assert not re.search(r"(?<!\w)/(?:home|root|tmp|work|usr|opt)/|site-packages", line), line


def test_its_links_lead_to_pages_that_exist(cells):
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\((\.\./[^)#]+)", text):
        assert (ROOT / "docs" / "notebooks" / target).resolve().is_file(), target


def test_what_is_shown_comes_from_the_code_and_the_weights_as_they_are_now():
    """If it fails: run scripts/run_notebooks.py on what it names."""
    spec = importlib.util.spec_from_file_location("source", ROOT / "scripts" / "_notebook_source.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    known = {}
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if made_from := notebook["metadata"].get("cellprior", {}).get("made_from"):
            now = source.fingerprint(["".join(cell["source"]) for cell in code(notebook["cells"])])
            known[path.stem] = made_from == now
    assert "04_evaluate" in known
    assert all(known.values()), [name for name, same in known.items() if not same]
