"""How a cell was made, by name: species, assay and modality of all cells, or of each from columns of ``obs``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
from scvi.data.fields import NumericalObsField

from cellprior._matrix import matrix_of
from cellprior._obs import read_column, text_of
from cellprior.genes._table import species_of_most
from cellprior.model.data._counts import NotCountsError
from cellprior.model.nicheformer._inputs import (
    ASSAYS,
    CONTEXT_KEY,
    CONTEXT_TOKENS,
    MODALITIES,
    PAD,
    SPECIES,
    context_code,
)

COLUMN = f"_scvi_{CONTEXT_KEY}"
KINDS = ("species", "assay", "modality")
# other names of the same, and the authors' own numbers
_ALIASES = {
    "species": {"homo sapiens": "human", "mus musculus": "mouse"},
    "assay": {"10x transcription profiling": "10x 3' transcription profiling"},
    "modality": {},
}
_TOKENS: dict[str, Mapping[str, int]] = {
    "species": SPECIES,
    "assay": {name: assay.token for name, assay in ASSAYS.items() if assay.token != PAD},
    "modality": MODALITIES,
}
_NAMES: dict[str, list[str]] = {
    "species": list(SPECIES),
    "assay": list(ASSAYS),
    "modality": list(MODALITIES),
}
NO_ASSAY = (
    "No assay is named: the cells are read as dissociated ones, and the token of their assay is left out, as the "
    'original does. Name it, Nicheformer.setup_anndata(adata, assay="10x 3\' v3"), or assay_key=, a column of '
    'adata.obs; or say modality="dissociated". Known are {known}.'
)
DIVIDED = (
    " Counts of imaging are often divided by the volume or the area of the cell: multiply them by it, and round: "
    'adata.layers["counts"] = np.rint(adata.X * volume[:, None]).'
)


class ContextField(NumericalObsField):
    """The context of each cell, as a number, see :func:`~cellprior.model.nicheformer._inputs.context_code`.

    Parameters
    ----------
    args
        Of ``setup_anndata``: of each kind a name (``assay``) or a column of ``obs`` (``assay_key``).
    """

    def __init__(self, args: Mapping[str, Any]) -> None:
        super().__init__(CONTEXT_KEY, COLUMN)
        self.args = args
        for kind in KINDS:
            if args.get(kind) is not None and args.get(f"{kind}_key") is not None:
                msg = (
                    f"{kind}={args[kind]!r} is for all cells, and {kind}_key={args[f'{kind}_key']!r} has that of each: "
                    "give one of them."
                )
                raise ValueError(msg)

    def validate_field(self, adata: ad.AnnData) -> None:
        """Refuse names that are not known, and cells without one."""
        self.codes(adata)

    def register_field(self, adata: ad.AnnData) -> dict:
        """Number the contexts."""
        adata.obs[self.attr_key] = self.codes(adata)
        return {}

    def codes(self, adata: ad.AnnData) -> np.ndarray:
        """Number of each cell's context ``(cells,)``."""
        numbered = [self._numbered(adata, kind) for kind in KINDS]
        codes = np.stack([of_cell for of_cell, _ in numbered], axis=1)
        found, inverse = np.unique(codes, axis=0, return_inverse=True)
        code_of = []
        for row, codes_of_kinds in enumerate(found.tolist()):
            species, assay, modality = (
                names[code] for (_, names), code in zip(numbered, codes_of_kinds, strict=True)
            )
            if problem := _contradiction(assay, modality):
                cell = adata.obs_names[int(np.argmax(inverse.ravel() == row))]
                msg = f"Cell {cell!r} {problem}"
                raise ValueError(msg)
            code_of.append(context_code(species or "human", assay))
        return np.array(code_of, dtype=np.int64)[inverse.ravel()]

    def _numbered(self, adata: ad.AnnData, kind: str) -> tuple[np.ndarray, list[str | None]]:
        """Code of each cell, and the names that go with them."""
        key = self.args.get(f"{kind}_key")
        if key is None:
            given = self.args.get(kind)
            name = None if given is None else known_name(kind, text_of(given), f"{kind}={given!r}")
            return np.zeros(adata.n_obs, dtype=np.int64), [name]
        codes, found = read_column(adata.obs, key)
        present = set(np.unique(codes).tolist())
        names = [
            known_name(kind, name, f"adata.obs[{key!r}] has {name!r}, which") if i in present else None
            for i, name in enumerate(found)
        ]
        return codes.astype(np.int64), names


def known_name(kind: str, text: str, where: str) -> str:
    """A name as it stands in our table, whatever its capitals, apostrophe or spaces; or by the authors' number.

    Raises ValueError if there is none.
    """
    plain = _plain(text)
    by_text = {_plain(name): name for name in _NAMES[kind]} | _ALIASES[kind]
    by_text |= {str(token): name for name, token in _TOKENS[kind].items()}
    if plain in by_text:
        return by_text[plain]
    msg = f"{where} is no {kind} that Nicheformer knows. Known are {listed(_NAMES[kind])}."
    if plain.startswith("visium"):
        msg += (
            " Its spots are no single cells, there are no means of it, and the authors' notebooks disagree whether the "
            "token 9 is Visium or Xenium."
        )
    elif kind == "assay":
        msg += (
            " If one of them is close, take it, and say so where you report it. Cells that were dissociated can go "
            'without one, too: modality="dissociated".'
        )
    raise ValueError(msg)


def warn_without_assay(args: Mapping[str, Any], *, stacklevel: int) -> None:
    """Say what it means that no assay is named, unless the modality says that the cells were dissociated."""
    if not any(args.get(name) is not None for name in ("assay", "assay_key", "modality", "modality_key")):
        msg = NO_ASSAY.format(known=listed(ASSAYS))
        warnings.warn(msg, UserWarning, stacklevel=stacklevel)


def codes_of(adata: ad.AnnData, args: Mapping[str, Any]) -> np.ndarray:
    """Number of each cell's context ``(cells,)``, by the arguments of the setup; refuses what is not clear."""
    codes = ContextField(args).codes(adata)
    refuse_unsaid_mouse(adata, args)
    return codes


@contextmanager
def explained(codes: np.ndarray) -> Iterator[None]:
    """Say of fractions in spatial data what they probably are.

    Raises NotCountsError, as it was raised, with the way back to counts.
    """
    try:
        yield
    except NotCountsError as error:
        is_spatial = CONTEXT_TOKENS[codes, -1] == MODALITIES["spatial"]
        if not is_spatial.any() or "not an integer" not in str(error):
            raise
        raise NotCountsError(f"{error}{DIVIDED}") from error


def refuse_unsaid_mouse(adata: ad.AnnData, args: Mapping[str, Any]) -> None:
    """Refuse orthologues of genes of mouse whose cells would be read as human, as nothing else is said.

    Raises ValueError if the names of the columns are of mouse, and those of ``gene_key`` are read.
    """
    if args["gene_key"] is None or any(args.get(name) is not None for name in ("species", "species_key")):
        return
    var = matrix_of(adata, args["layer"]).var
    if args["gene_key"] not in var:
        return
    one, other = (column.dropna().astype(str).unique() for column in (var.index, var[args["gene_key"]]))
    species = [species_of_most(np.asarray(names), n_rows=len(names)) for names in (one, other)]
    if species == ["mouse", "human"]:
        msg = (
            f"The genes are called as in mouse ({one[0]!r}), and as in human in gene_key={args['gene_key']!r} "
            f'({other[0]!r}): say what the cells are, species="mouse" or species="human".'
        )
        raise ValueError(msg)


def listed(names: Iterable[str]) -> str:
    """Names in quotation marks."""
    return ", ".join(f'"{name}"' for name in names)


def _plain(text: str) -> str:
    for sign in "’′`´":
        text = text.replace(sign, "'")
    return " ".join(text.lower().split())


def _contradiction(assay: str | None, modality: str | None) -> str | None:
    """What is wrong with an assay and a modality, in words."""
    if assay is None:
        if modality == "spatial":
            spatial = [name for name, known in ASSAYS.items() if known.modality == "spatial"]
            return (
                f"is spatial, and of no assay: genes are ranked by their means in its technology. Name it, assay= or "
                f"assay_key=, one of {listed(spatial)}."
            )
        return None
    if modality not in (None, ASSAYS[assay].modality):
        return f"is {modality}, and its assay {assay} is {ASSAYS[assay].modality}: leave out the modality."
    return None
