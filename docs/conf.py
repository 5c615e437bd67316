"""Configuration of the documentation; see https://www.sphinx-doc.org/en/master/usage/configuration.html."""

from __future__ import annotations

import shutil
from importlib.metadata import metadata
from importlib.util import find_spec
from inspect import getdoc
from itertools import pairwise
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import NumpyDocstring

info = metadata("cellprior")
urls = dict(entry.split(", ") for entry in info.get_all("Project-URL"))

project = info["Name"]
author = info["Author"]
copyright = f"2026, {author}"
version = release = info["Version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates", "meta.yaml"]
default_role = "literal"
nitpicky = True

autosummary_generate = True
# Two names that differ in case alone need two file names that do not.
autosummary_filename_map = {
    "cellprior.evaluate.Report": "cellprior.evaluate.Report_class",
    "cellprior.weights.Card": "cellprior.weights.Card_class",
}
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
typehints_defaults = "braces"
typehints_use_rtype = False
typehints_document_rtype_none = False
always_use_bars_union = True
napoleon_google_docstring = False


def returns_as_prose(docstring: NumpyDocstring, section: str) -> list[str]:
    """A "Returns" section whole, as prose: napoleon would take each line for a type, and types are in the signature."""
    lines = docstring._dedent(docstring._consume_to_next_section())
    if (
        lines[:1] == [":"]
    ):  # sphinx-autodoc-typehints puts it there, to the same end, which takes one line to work
        del lines[0]
    return docstring._format_block(":returns: ", lines)


NumpyDocstring._parse_returns_section = returns_as_prose

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

intersphinx_mapping = {
    "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "pandas": ("https://pandas.pydata.org/docs/", None),
    "python": ("https://docs.python.org/3/", None),
    "scipy": ("https://docs.scipy.org/doc/scipy/", None),
    "scvi-tools": ("https://docs.scvi-tools.org/en/stable/", None),
    "torch": ("https://pytorch.org/docs/stable/", None),
}
if tags.has("offline"):  # noqa: F821 - Sphinx defines it: sphinx-build -t offline
    intersphinx_mapping = {}
    if find_spec(
        "sphinx-mathjax-offline"
    ):  # else formulas are drawn by a script from the network
        extensions.append("sphinx-mathjax-offline")
# What other projects document is theirs to name, and a private name stays plain text; every public name must resolve.
nitpick_ignore_regex = [
    ("py:.*", r"(?!cellprior\.).*"),
    ("py:.*", r"cellprior\.(.*\.)?_.*"),
]

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_theme_options = {
    "repository_url": urls["Source"],
    "use_repository_button": True,
    "path_to_docs": "docs/",
    "navbar_persistent": [],  # the sidebar has a search field
}


def copy_notebooks(app: Sphinx) -> None:
    """The tutorials, whose one source is the folder notebooks/ beside this one."""
    folder = Path(app.srcdir) / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in (Path(app.srcdir).parent / "notebooks").glob("*.ipynb"):
        shutil.copy(path, folder)


def entries(docstring: str) -> dict[str, list[str]]:
    """The "Parameters" of a NumPy docstring: the lines of each entry, by the first line of it."""
    section = docstring.partition("Parameters\n----------\n")[2]
    found: dict[str, list[str]] = {}
    for line, following in pairwise([*section.splitlines(), ""]):
        if following.startswith("---"):  # the title of the next section
            break
        if line and not line.startswith(" "):
            found[line] = []
        elif found:
            found[next(reversed(found))].append(line)
    return found


def arguments_of_the_network(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """On the page of a model class, what its module says of the network's arguments, in the place of a link."""
    at = next(
        (
            i
            for i, line in enumerate(lines)
            if line.startswith("    Of the network, see :class:")
        ),
        None,
    )
    if what != "class" or at is None or not hasattr(obj, "_module_cls"):
        return
    first = at - 1
    while lines[first - 1].strip() and not lines[first - 1].startswith(
        (" ", "-")
    ):
        first -= 1
    names = ", ".join(lines[first:at]).split(", ")
    described: list[str] = []
    for title, text in entries(getdoc(obj._module_cls) or "").items():
        if wanted := [name for name in title.split(", ") if name in names]:
            described += [", ".join(wanted), *text]
    lines[first : at + 1] = described


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect(
        "autodoc-process-docstring", arguments_of_the_network, priority=100
    )  # before napoleon reads it
    app.connect("builder-inited", copy_notebooks)
