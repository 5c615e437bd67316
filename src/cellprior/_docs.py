"""Docstrings that share parts: each part is written once, and stands where ``<its name>`` is a line of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from textwrap import indent
from typing import Any, TypeVar

PART = re.compile(r"^( *)<(\w+)>$", flags=re.MULTILINE)
Thing = TypeVar("Thing")

PARTS = {
    # of the classes of models
    "built": "<registered>\n<vocabulary>\n<size>",
    "registered": """\
adata
    AnnData registered with :meth:`setup_anndata`.
registry
    Registry of a saved model, instead of data.""",
    "vocabulary": """\
genes
    Vocabulary: names, or a frame with ``ensembl_id``, ``symbol``, ``previous_symbols``; by default that of the
    data.
min_coverage
    Least share of genes that must match, see :func:`cellprior.genes.match`.""",
    "size": """\
size
    For a new network, the widths and layers that are not given: ``"small"``, or ``"released"`` for those of the
    authors' weights. By default small for fewer than 100,000 cells, unless one of them is given.""",
    # of their methods
    "layer": """\
layer
    Layer with raw counts; ``None`` for ``X``; ``"raw"`` for ``adata.raw`` and its genes, unless a layer has
    this name.""",
    "embedded": """\
adata
    Data to embed, by default the attached. Its genes are matched by name; it is not kept.
indices
    Cells to embed, as numbers or a mask; the result is in this order.""",
    "precision": """\
precision
    ``"bfloat16"`` computes the large products in half the bits, several times faster on recent hardware.""",
    "not_embedded": """\
RuntimeError
    If the model has neither been trained nor loaded from weights.
NotCountsError, GeneMatchError
    If the data are not raw counts, or too few of their genes are known.""",
    "some_cells": """\
adata
    Data, by default the attached.
indices
    Cells, as numbers or a mask.""",
    "labels_key": """\
labels_key
    Column of ``obs``; by default the one given to ``setup_anndata``.""",
    "options": """\
**options
    All other arguments of that method.""",
    "genes_in_cells": """\
KeyError
    If a gene is not in the vocabulary.
ValueError
    If there are no cells.""",
    "diverged": """\
DivergedError
    If a loss is not finite. The model has the last weights with a finite loss.""",
    "trainer": """\
accelerator, devices
    See :class:`~lightning.pytorch.trainer.trainer.Trainer`.""",
    # of evaluation
    "truth": """\
Parameters
----------
truth, predicted
    Labels of the same cells ``(cells,)``.

Raises
------
ValueError
    If labels are missing or the lengths differ.""",
    "near": """\
n_neighbors
    The cell among them. Equally near cells are taken in random order, the same each time.
perplexity
    How many neighbours effectively count.

Raises
------
ValueError
    If the embedding is not finite, labels or batches are missing or all the same, there are fewer cells than
    neighbours, or the perplexity is not between 1 and ``n_neighbors - 1``.""",
    "progress": """\
progress
    Whether to draw a bar, by default as ``cellprior.settings.progress`` says.""",
}


def described(thing: Thing, parts: Mapping[str, str] = PARTS) -> Thing:
    """A function, method or class with the parts of its docstring put in; of a class, those of its methods too."""
    holders: list[Any] = [thing]
    if isinstance(thing, type):
        holders += [member for member in vars(thing).values() if not isinstance(member, type)]
    for holder in holders:
        function = getattr(holder, "__func__", holder)  # of a class method
        if isinstance(text := getattr(function, "__doc__", None), str) and PART.search(text):
            function.__doc__ = _filled(text, parts)
    return thing


def _filled(text: str, parts: Mapping[str, str]) -> str:
    """Text with parts in the place of their names; a name that is none stays."""
    found = PART.sub(lambda line: indent(parts.get(line[2], line[0].lstrip()), line[1]), text)
    return found if found == text else _filled(found, parts)
