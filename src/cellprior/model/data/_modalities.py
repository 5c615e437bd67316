"""The modalities of a MuData, or of an AnnData with genes, peaks or both: which is which, and which cells have them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from mudata import MuData
from scvi.data.fields import BaseMuDataWrapperClass

from cellprior._matrix import RAW, Matrix, is_raw, matrix_of
from cellprior._obs import read_presence
from cellprior.genes._intervals import are_peaks, read_peaks
from cellprior.genes._kinds import GENE, PEAK, kinds_by_type, kinds_of, which_are_genes
from cellprior.genes._table import ensembl_id
from cellprior.model.data._cells import FEATURE, MODALITIES, Cells, Counts
from cellprior.model.data._fields import CountsField
from cellprior.pp import presence_column

ENOUGH = 20  # features of a modality, as matching asks for; fewer are strays
ALIASES: dict[str, tuple[str, ...]] = {
    "rna": ("rna", "gex", "geneexpression", "expression", "scrna", "snrna", "transcriptome", "genes"),
    "atac": ("atac", "peaks", "scatac", "snatac", "chromatin", "chromatinaccessibility", "accessibility"),
}


class ModalityField(BaseMuDataWrapperClass):
    """Raw counts of one modality; a class with a name, which scvi-tools' own wrappers lack, so that it is pickled."""

    def __init__(self, registry_key: str, layer: str | None, key: str, modality: str) -> None:
        super().__init__(mod_key=key, mod_required=True)
        self._adata_field = CountsField(
            registry_key, layer, argument=f"{modality}_layer", feature=FEATURE[modality]
        )


def cells_of_modalities(
    data: MuData | ad.AnnData, setup_args: Mapping[str, Any], *, genes: pd.DataFrame | None = None
) -> Cells:
    """Find the modalities of some data.

    A barcode is the same cell wherever it stands in a modality. A cell has a modality if its barcode is in it, unless
    :func:`cellprior.pp.pad_modalities` has noted that its row is padding; that a row is all 0 means nothing.
    ``setup_args`` have ``modalities``, ``rna_layer``, ``atac_layer``. The vocabulary tells an AnnData with genes, of
    which the places are known as well, from one with peaks. Raises ValueError if no modality or no counts are found,
    the modalities are swapped, or a barcode stands for two cells.
    """
    keys = modality_keys(setup_args["modalities"])
    layers = {name: setup_args[f"{name}_layer"] for name in MODALITIES}
    if isinstance(data, MuData):
        refuse_other_axis(data)
        found = {name: data.mod[key] for name, key in keys.items() if key in data.mod}
        if not found:
            msg = (
                f"The MuData has the modalities {list(data.mod)}; {keys['rna']!r} (RNA) or {keys['atac']!r} (ATAC) is "
                'needed. If they have other names: setup_mudata(mdata, modalities={"rna": ..., "atac": ...}).'
            )
            raise ValueError(msg)
        say_what_is_left_out(data, keys)
    elif isinstance(data, ad.AnnData):
        # columns of both are told apart when they are matched
        found = dict.fromkeys(_modalities_of(data.var, genes), data)
    else:
        msg = f"A MuData or an AnnData is needed, found a {type(data).__name__}."
        raise TypeError(msg)
    found = {
        name: adata for name, adata in found.items() if adata.n_obs
    } or found  # of a part, one may be empty
    for name, adata in list(found.items()):
        # errors say that X is missing, or the layer
        matrix = matrix_of(adata, layers[name], argument=f"{name}_layer", name=keys[name])
        if is_raw(adata, layers[name]):
            found[name] = adata = _raw_as_layer(adata, matrix)
        refuse_swapped(adata, name, keys[name])
        if adata.n_obs == 0 or adata.n_vars == 0:
            msg = (
                f"{keys[name]!r} has {adata.n_obs} cells and {adata.n_vars} {FEATURE[name]}s; at least one of each is "
                "needed. A modality that is not there can be left out."
            )
            raise ValueError(msg)
        if not adata.obs_names.is_unique:
            barcode = adata.obs_names[adata.obs_names.duplicated()][0]
            msg = (
                f"The barcode {barcode!r} stands for several cells of {keys[name]!r}: make them unique first."
            )
            raise ValueError(msg)
    rows = {name: adata.obs_names.get_indexer(data.obs_names) for name, adata in found.items()}
    for name in rows:
        column = presence_column(keys[name])
        if column in data.obs:
            rows[name] = np.where(read_presence(data.obs, column), rows[name], -1)
        if column in found[name].obs:  # of a modality of padded data, which may have been taken out of them
            is_there = read_presence(found[name].obs, column, frame=f"mdata[{keys[name]!r}].obs")
            rows[name] = np.where(is_there[rows[name]] & (rows[name] >= 0), rows[name], -1)
    counts = {
        name: Counts(adata, layers[name], name, f"{name}_layer", matrix_of(adata, layers[name]).x, rows[name])
        for name, adata in found.items()
    }
    return Cells(data.obs, counts, joint=True)


def modality_keys(modalities: Mapping[str, str] | None) -> dict[str, str]:
    """Names that RNA and ATAC have in a MuData.

    Raises ValueError, for a key that is neither ``"rna"`` nor ``"atac"``.
    """
    given = dict(modalities or {})
    if unknown := given.keys() - set(MODALITIES):
        msg = f'modalities has the keys {sorted(unknown)}; needed: "rna" and "atac", with the names in the MuData.'
        raise ValueError(msg)
    return {name: given.get(name, name) for name in MODALITIES}


def refuse_other_axis(mdata: MuData) -> None:
    """Refuse a MuData whose modalities share features and not cells.

    Raises ValueError, with how to make one that shares cells.
    """
    if getattr(mdata, "axis", 0) != 0:
        msg = (
            f"The MuData has axis={mdata.axis}: its modalities share features, and RNA and ATAC share cells. Make it "
            'anew: mudata.MuData({"rna": rna, "atac": atac}), where axis is 0.'
        )
        raise ValueError(msg)


def say_what_is_left_out(mdata: MuData, keys: Mapping[str, str]) -> None:
    """Refuse a modality that is there under another name, and name others that are not read in its stead.

    Warns if a modality is missing, and there are others that are none of RNA and ATAC by name. Raises ValueError,
    with the name that is needed.
    """
    missing = [name for name, key in keys.items() if key not in mdata.mod]
    others = [key for key in mdata.mod if key not in keys.values()]
    for name in missing:
        for key in others:
            if "".join(filter(str.isalpha, key.lower())) in ALIASES[name]:
                msg = (
                    f"The MuData has no modality {keys[name]!r}, and one called {key!r}, which would be left out. Name "
                    f"it: modalities={{{name!r}: {key!r}}} in setup_mudata or tl.embed, or for a query of a model that "
                    f"is set up, mudata.MuData({{{keys[name]!r}: mdata[{key!r}], ...}})."
                )
                raise ValueError(msg)
    if missing and others:
        msg = (
            f"The MuData has no modality {' and no '.join(repr(keys[name]) for name in missing)}; "
            f"{', '.join(map(repr, others))} is not read. If it is that under another name, use modalities=."
        )
        warnings.warn(msg, UserWarning, stacklevel=4)


def refuse_swapped(adata: ad.AnnData, modality: str, key: str) -> None:
    """Refuse peaks where genes should be; what are no peaks is left to the matching.

    Raises ValueError, with the first names.
    """
    if modality == "rna" and (kinds_of(adata.var) != GENE).all() and are_peaks(adata.var_names):
        msg = (
            f"{key!r} should hold genes and holds peaks ({', '.join(adata.var_names[:2])}). Are the modalities "
            'swapped? Name them: setup_mudata(mdata, modalities={"rna": ..., "atac": ...}).'
        )
        raise ValueError(msg)


def peak_names(var: pd.DataFrame) -> list[str]:
    """Names of peaks that say where they lie: the index, or columns with chromosome, start and end."""
    kinds, _ = kinds_by_type(var)
    if (kinds == PEAK).any():  # genes may stand beside them
        var = var[kinds == PEAK]
    if are_peaks(var.index) or not _has_intervals(var):
        return list(var.index)
    peaks = read_peaks(var)
    return [f"chr{c}:{s}-{e}" for c, s, e in zip(peaks.chromosome, peaks.start, peaks.end, strict=True)]


def _modalities_of(var: pd.DataFrame, genes: pd.DataFrame | None) -> list[str]:
    """Whether features are genes, peaks or some of both: as `var` says, by their names, or by columns with places."""
    kinds, by = kinds_by_type(var)
    if by:
        kind_of: dict[str, str] = {"rna": GENE, "atac": PEAK}
        said: list[str] = [name for name in MODALITIES if (kinds == kind_of[name]).any()]
        if said:
            return said
    kinds = kinds_of(var)
    known = set() if genes is None else {*genes["symbol"], *genes["ensembl_id"]} - {""}
    others = var.index[kinds == GENE].astype(str)
    n_genes = sum(name in known or bool(ensembl_id(name)) for name in others)
    n_peaks = int((kinds == PEAK).sum())
    if min(n_genes, n_peaks) >= ENOUGH:
        return ["rna", "atac"]
    if n_peaks > n_genes:
        return ["atac"]
    return ["rna"] if n_genes or not _has_intervals(var) else ["atac"]


def features_of(cells: Cells, modality: str) -> tuple[np.ndarray, pd.Index]:
    """Columns of the counts that are the genes, or the peaks, of a modality ``(n_features,)``, and their names."""
    counts = cells.counts[modality]
    var = counts.matrix.var
    kinds, by = kinds_by_type(var)
    if modality == "rna":
        chosen = which_are_genes(var)
    elif by:
        chosen = (kinds == PEAK) | (kinds == "")
    else:  # of one table with both, the places are the peaks
        chosen = (kinds_of(var) == PEAK) | (not is_shared(cells))
    found = np.flatnonzero(chosen if chosen.any() else np.ones(len(chosen), dtype=bool))
    return found, var.index[found]


def _has_intervals(var: pd.DataFrame) -> bool:
    return bool(read_peaks(var.iloc[:100]).known.mean() > 0.5) if len(var) else False


def _raw_as_layer(adata: ad.AnnData, raw: Matrix) -> ad.AnnData:
    """The cells with the features of ``raw``, whose values stand in a layer of that name; nothing is copied."""
    return ad.AnnData(obs=adata.obs, var=raw.var, layers={RAW: raw.x})


def is_shared(cells: Cells) -> bool:
    """Whether one table holds the features of both modalities."""
    return len({id(counts.adata) for counts in cells.counts.values()}) < len(cells.counts)
