"""Every public name is documented, with its parameters, and tested."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import cellprior as cp
from cellprior._docs import PART, described

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SOURCES = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
TESTED = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)))


def public() -> Iterator[tuple[str, Any]]:
    """Names by room, such as `genes.match`, and what they stand for."""
    for room in cp.__all__:
        if room != "settings":  # one object, whose class is documented
            module = import_module(f"cellprior.{room}")
            yield from ((f"{room}.{name}", getattr(module, name)) for name in module.__all__)


PUBLIC = dict(public())


def methods(thing: Any) -> Iterator[tuple[str, Any]]:
    """Public methods that a class of ours defines or takes from another class of ours, once each."""
    for name, member in inspect.getmembers(thing):
        function = inspect.unwrap(member) if callable(member) else None
        if not name.startswith("_") and inspect.isroutine(function):
            if (getattr(function, "__module__", None) or "").startswith("cellprior"):
                yield name, member


def test_every_public_name_is_on_the_page_of_the_api():
    lacking = [name for name in PUBLIC if not re.search(rf"^   {re.escape(name)}$", API, flags=re.MULTILINE)]
    assert not lacking, f"docs/api.md lacks {lacking}"


def test_every_public_name_is_used_by_a_test_and_so_are_its_methods():
    untested = {}
    for name, thing in PUBLIC.items():
        names = set() if is_dataclass(thing) else {name.rpartition(".")[2]}  # functions make those
        if inspect.isclass(thing):
            names |= {method for method, _ in methods(thing)}
        untested[name] = names - TESTED
    assert not any(untested.values()), f"no test says { ({k: v for k, v in untested.items() if v}) }"


def test_every_public_name_says_what_it_is_and_what_each_parameter_means():
    wrong = []
    for name, thing in PUBLIC.items():
        described = {name: thing}
        if inspect.isclass(thing):
            described |= {f"{name}.{method}": member for method, member in methods(thing)}
        for where, member in described.items():
            text = inspect.getdoc(member) or ""
            if len(text) <= 20:
                wrong.append(f"{where} has no docstring")
            if PART.search(text):
                wrong.append(f"{where} shows the name of a part that is not put in")
            if "Parameters\n---" not in text:
                continue  # one line says it all, or refers to where it is said
            for parameter in inspect.signature(member).parameters:
                # the last of setup_anndata: for scvi-tools' own use
                if parameter not in {"self", "cls", "kwargs"}:
                    said = re.search(rf"^\**(.*, )?{parameter}(,.*)?$", text, flags=re.MULTILINE)
                    if not said:
                        wrong.append(f"{where} says nothing about {parameter}")
    assert not wrong


def test_what_the_page_of_the_api_names_exists():
    for name in re.findall(r"^   ((?:\w+\.)+\w+)$", API, flags=re.MULTILINE):
        path, _, last = name.rpartition(".")
        module = import_module(f"cellprior.{path}")
        assert hasattr(module, last), name


def test_parts_of_docstrings_are_put_in_at_their_depth_and_python_may_have_dropped_the_docstrings():
    class Described:
        @classmethod
        def method(cls) -> None:
            """Do.

            Parameters
            ----------
            <outer>
            <unknown>
            """

    described(Described, {"outer": "<inner>", "inner": "name\n    What it is."})
    expected = "Do.\n\nParameters\n----------\nname\n    What it is.\n<unknown>"
    assert inspect.getdoc(Described.method) == expected
    Described.method.__func__.__doc__ = None  # as of python -OO
    assert described(Described).method.__doc__ is None
