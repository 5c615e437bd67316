"""Tools in scanpy's manner: AnnData or MuData in, a key in it out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from cellprior._check import Check

__all__ = ["annotate", "check", "embed", "transfer_labels"]


def __dir__() -> list[str]:
    return list(__all__)


def check(adata: AnnData | MuData | str | os.PathLike[str]) -> Check:
    """Say what is in a data set, what each set of weights would read of it, and which call comes next.

    Nothing is changed, downloaded or computed beyond that: a thousand cells are looked at.

    Parameters
    ----------
    adata
        Annotated data ``(cells, genes)``, or a MuData, of which the modality with genes is looked at; or the path of an
        h5ad or h5mu file, or of a zarr folder.

    Returns
    -------
    Where raw counts are; what the features are, and of which species; how deep the cells are; which columns of ``obs``
    look like batches or labels; the share of genes and of counts that each set of weights would read, of those whose
    genes are known on this machine; and the next line of code. It shows itself as text.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read, or holds no cell or no feature.

    Examples
    --------
    >>> cp.tl.check("cells.h5ad")
    """
    from cellprior._check import check as check_data

    return check_data(adata)


def embed(
    adata: AnnData | MuData | str | os.PathLike[str],
    weights: str | os.PathLike[str],
    *,
    layer: str | Mapping[str, str | None] | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    modalities: Mapping[str, str] | None = None,
    key_added: str | None = None,
    batch_size: int | None = None,
    min_coverage: float = 0.25,
    device: str | int = "auto",
    copy: bool = False,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    hidden: str | os.PathLike[str] = "memory",
    progress: bool | None = None,
    client: Any = None,
    known_hash: str | None = None,
    setup: Mapping[str, Any] | None = None,
) -> AnnData | MuData | None:
    """Embed cells with pretrained weights.

    Parameters
    ----------
    adata
        Annotated data ``(cells, genes)`` with raw counts. For weights of MultiomeCLIP a MuData with RNA, ATAC or both,
        of which each cell is embedded by what it has, or an AnnData with genes or with peaks. With ``out``, also the
        path of an h5ad or h5mu file or a zarr folder, whose counts stay on disk.
    weights
        Registry name (see :func:`cellprior.weights.available`), folder written by ``save_pretrained``, official
        checkpoint file, or address of one (then ``known_hash`` is needed).
    layer
        Layer with raw counts; ``None`` for ``X``; ``"raw"`` for ``adata.raw`` and its genes, unless a layer has this
        name. For a MuData the same in both modalities, or one of each:
        ``{"rna": "counts", "atac": None}``.
    gene_key
        Column of ``var`` with gene symbols or Ensembl ids; by default the place that matches best.
    batch_key
        Column of ``obs`` with the batch of each cell. For CellPLM: which cells see each other.
    modalities
        Names that RNA and ATAC have in a MuData, by default ``{"rna": "rna", "atac": "atac"}``.
    key_added
        Key in ``obsm``; by default the model's own, such as ``X_cellplm``.
    batch_size
        Cells in memory at a time, by default what fits; never changes the result.
    min_coverage
        Least share of genes, and of peaks, that must match, see :func:`cellprior.genes.match` and
        :func:`cellprior.genes.match_peaks`.
    device
        ``"auto"`` is the first GPU if there is one, else the CPU.
    copy
        Return a copy with the embedding instead of writing into ``adata``.
    out
        Zarr folder to write to as the cells are embedded, and nothing into ``adata``; see :doc:`/user_guide/scale`.
        Until it is complete it is called ``<out>.part``; the same call then goes on where it was cut short.
    overwrite
        Begin anew, and replace what is at ``out``. Cut short, the call without it goes on.
    hidden
        With ``out``, for CellPLM: ``"memory"``, or a folder for the hidden states of the cells of a sentence.
    progress
        Whether to draw a bar, by default as ``cellprior.settings.progress`` says.
    client
        ``distributed.Client`` of a Dask cluster that embeds; the counts are then dask arrays, or in a path that the
        workers can read.
    known_hash
        sha256 that the checkpoint file, or the whole folder, must have, see :func:`cellprior.weights.sha256`.
    setup
        What the setup of a model takes besides, by name: for Nicheformer ``{"assay_key": "assay"}`` or ``{"assay":
        "Xenium", "species": "mouse"}``, see :meth:`cellprior.model.Nicheformer.setup_anndata`; for UCE ``{"species":
        "mouse"}``, see :meth:`cellprior.model.UCE.setup_anndata`.

    Returns
    -------
    ``None``, or with ``copy`` the copy. Written are ``obsm[key_added]``, float32 ``(cells, n_latent)``, and
    ``uns["cellprior"][key_added]``: weights, their sha256, share of genes (and of peaks) and counts used, package
    version and parameters.

    Raises
    ------
    WeightsError
        If the weights are not found, damaged, or of no known model.
    NotCountsError, GeneMatchError, PeakMatchError
        If the data are not raw counts, or too few of their genes or peaks are known.
    ValueError
        If the weights are of a model that reads other data: an AnnData, or RNA and ATAC.
    FileExistsError
        If ``out`` or its beginning is of something else, or damaged.
    RuntimeError
        If the counts change while they are read, or a cluster ends.
    OSError
        If ``out`` cannot be written, or the counts cannot be read any more.

    Examples
    --------
    >>> cp.tl.embed(adata, "cellplm-starter", layer="counts")
    >>> sc.pp.neighbors(adata, use_rep="X_cellplm")

    >>> cp.tl.embed(mdata, "folder/of/a/multiomeclip", layer={"rna": "counts", "atac": None})
    >>> sc.pp.neighbors(mdata, use_rep="X_multiomeclip")

    >>> cp.tl.embed("atlas.h5ad", "cellplm-starter", batch_key="donor", out="latent.zarr")
    >>> anndata.read_zarr("latent.zarr").obsm["X_cellplm"]
    """
    from cellprior._arguments import count
    from cellprior.model import model_class
    from cellprior.model.data._files import open_counts
    from cellprior.model.engine._dask import await_workers
    from cellprior.model.engine._embedding import in_memory
    from cellprior.model.files._loading import refuse_setup

    if batch_size is not None:
        count(batch_size=batch_size)
    cls = model_class(weights, known_hash=known_hash)
    refuse_setup(cls, setup or {})
    if client is not None:
        await_workers(client)
    source = None
    if isinstance(adata, str | os.PathLike):
        if out is None:
            msg = f"{os.fspath(adata)!r} is a path: name a folder to write to, out=, or read the data first."
            raise ValueError(msg)
        source = Path(adata)
        adata = open_counts(adata, cls._layers_on_disk(layer, modalities), as_dask=client is not None)
    if out is not None and copy:
        msg = "out= writes to a folder, and copy= returns a copy: choose one of them."
        raise ValueError(msg)
    if copy:
        adata = _copy(adata)
    elif out is None:
        _refuse_view_of_file(adata)
    key = key_added or cls.obsm_key
    where: dict[str, Any] = {
        "layer": layer,
        "gene_key": gene_key,
        "batch_key": batch_key,
        "modalities": modalities,
    }
    params = _stated(**where, **(setup or {}), min_coverage=min_coverage)
    options: dict[str, Any] = {"min_coverage": min_coverage, "device": device, "known_hash": known_hash}
    if setup:
        options["setup"] = setup
    with cls.opened(weights, adata, **where, **options) as model:
        record = {**model.provenance(), "params": params}
        _tell_read(model, record, weights, adata.n_obs)
        if out is not None:
            options = {"hidden": hidden, "overwrite": overwrite, "progress": progress}
            options |= {"batch_size": batch_size, "client": client, "source": source}
            model._stream(out, key=key, params=params, record=record, **options)
            return None
        if client is None:
            latent = model.get_latent_representation(batch_size=batch_size)
        else:
            latent = in_memory(model._embedding(batch_size=batch_size, client=client))
    adata.obsm[key] = latent
    _note(adata, key, record)
    return adata if copy else None


def annotate(
    adata: AnnData,
    weights: str | os.PathLike[str],
    reference: AnnData | None = None,
    labels_key: str | None = None,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    reference_layer: str | None = None,
    reference_batch_key: str | None = None,
    unlabeled_category: str = "unknown",
    reject: float | Literal["stored"] | None = "stored",
    key_added: str | None = None,
    batch_size: int | None = None,
    min_coverage: float = 0.25,
    device: str | int = "auto",
    save: str | os.PathLike[str] | None = None,
    copy: bool = False,
    known_hash: str | None = None,
    setup: Mapping[str, Any] | None = None,
    **fine_tune: Any,
) -> AnnData | None:
    """Name cells after the labels of a reference, or with weights that have learned theirs.

    Parameters
    ----------
    adata
        Annotated data ``(cells, genes)`` with raw counts.
    weights
        As of :func:`embed`. Without ``reference``, those of a model that has learned labels: ``"cellplm-starter"``,
        which names common human types, a folder written by ``save``, or by ``save_pretrained``.
    reference
        Labelled cells that the model learns from first, see :doc:`/user_guide/annotation`; genes are matched by name.
        ``gene_key`` is that of both.
    labels_key
        Column of ``reference.obs``; cells of ``unlabeled_category`` are not learned from.
    layer, gene_key, batch_key, batch_size, min_coverage, device, copy, known_hash, setup
        As of :func:`embed`.
    reference_layer, reference_batch_key
        Where the reference has its counts and its batches, if not in the places of the query, ``layer`` and
        ``batch_key``. ``"X"`` is its ``X``.
    unlabeled_category
        Label of the reference that stands for "not labelled", and the name of cells that are rejected.
    reject
        Between 0 and 1: call a cell ``unlabeled_category`` at this calibrated rate, see
        :meth:`cellprior.model.CellPLM.predict`. ``None`` names every cell. By default what the weights were saved
        with, if they need no reference, and else ``None``.
    key_added
        Column of ``obs``; by default that of the model, such as ``cellplm_label``.
    save
        Folder for the weights that have learned the labels, which then need no reference.
    **fine_tune
        To :meth:`cellprior.model.CellPLM.fine_tune`, such as ``trainable="all"`` or ``max_epochs=20``.

    Returns
    -------
    ``None``, or with ``copy`` the copy. Written are ``obs[key_added]``, names; ``obs[key_added + "_probability"]``,
    how probable the model finds the best name, float32; with ``reject``, ``obs[key_added + "_best_guess"]``, the best
    name of each cell, known or not; where the weights came with names, ``obs[key_added + "_coarse"]``, a coarser name
    with a rejection of its own, and ``obs[key_added + "_ontology_term_id"]``, of the Cell Ontology, "" for an unknown
    cell; and ``uns["cellprior"][key_added]``, as of :func:`embed`, with the numbers of
    cells that are unknown, by reason. A warning explains it if far more cells are unknown than should be.

    Raises
    ------
    WeightsError, NotCountsError, GeneMatchError
        As of :func:`embed`.
    ValueError
        If there is a reference without ``labels_key`` or the other way round, if ``reject`` cannot be promised, or if
        the model does not learn labels.
    FileExistsError
        If ``save`` is there already.
    RuntimeError
        If there is no reference, and the weights have learned no labels.

    Examples
    --------
    >>> cp.tl.annotate(adata, "cellplm-starter", reference, "cell_type", layer="counts", reject=0.1)
    >>> sc.pl.umap(adata, color=["cellplm_label", "cellplm_label_probability"])
    >>> cp.tl.annotate(adata, "cellplm-starter", layer="counts")  # by the names that the weights came with
    """
    import numpy as np
    import pandas as pd

    from cellprior._reference import as_the_query_has_it
    from cellprior.model import model_class
    from cellprior.model.files._loading import refuse_setup
    from cellprior.model.learning._annotation import STORED, name_cells
    from cellprior.model.learning._rejection import check_share

    cls = model_class(weights, known_hash=known_hash)
    refuse_setup(cls, setup or {})
    if not cls.can("annotate"):
        msg = f"The weights {weights} are of a {cls.__name__}, which names cells by its transfer_labels."
        raise ValueError(msg)
    if (reference is None) != (labels_key is None):
        given, missing = ("labels_key", "reference") if reference is None else ("reference", "labels_key")
        what = {
            "reference": "the labelled cells to learn from",
            "labels_key": "the column of reference.obs with names",
        }
        msg = f"{given}= is given, and {missing}= is not: {what[missing]}. They are needed together."
        raise ValueError(msg)
    of_reference = {
        "save": save,
        "reference_layer": reference_layer,
        "reference_batch_key": reference_batch_key,
    }
    told = [*fine_tune, *(name for name, value in of_reference.items() if value is not None)]
    if reference is None and told:
        msg = f"{', '.join(told)}: nothing is learned without reference=."
        raise ValueError(msg)
    if save is not None and os.path.lexists(save):
        msg = f"{os.fspath(save)} is there already: choose another folder for what is learned."
        raise FileExistsError(msg)
    if not isinstance(reject, str) and reject is not None:
        check_share(reject)
    elif reject not in (None, STORED):
        msg = f'reject={reject!r}; a share between 0 and 1 is needed, such as 0.1, or None, or "stored".'
        raise ValueError(msg)
    if copy:
        adata = _copy(adata)
    else:
        _refuse_view_of_file(adata)
    key = key_added or f"{cls.obsm_key.removeprefix('X_')}_label"
    if reference is not None:
        reference = as_the_query_has_it(
            reference,
            layer=layer,
            reference_layer=reference_layer,
            batch_key=batch_key,
            reference_batch_key=reference_batch_key,
        )
    where: dict[str, Any] = {"layer": layer, "gene_key": gene_key, "batch_key": batch_key}
    options = {
        **where,
        "setup": setup,
        "min_coverage": min_coverage,
        "device": device,
        "known_hash": known_hash,
    }
    options["unlabeled_category"] = unlabeled_category
    with cls.opened(weights, adata if reference is None else reference, **options) as model:
        record = model.provenance(adata)  # first: genes that do not match are told before anything is learned
        _tell_read(model, record, weights, adata.n_obs)
        if reference is not None:
            model.fine_tune(labels_key, **fine_tune)
        if save is not None:
            model.save_pretrained(save)
        guess = f"in obs[{key + '_best_guess'!r}]"
        found = name_cells(model, adata, reject=reject, batch_size=batch_size, guess=guess)
        if reject == STORED:
            reject = model.annotation_.get("reject")
    adata.obs[key] = pd.Categorical(found.names)
    adata.obs[f"{key}_probability"] = found.confidence.astype(np.float32)
    for name, values in found.more.items():
        adata.obs[f"{key}_{name}"] = pd.Categorical(values)
    if reject is not None:
        adata.obs[f"{key}_best_guess"] = pd.Categorical(found.best_guess)
        record["unknown"] = {"too_far": found.n_far, "too_uncertain": found.n_uncertain}
    learned = {name: value for name, value in fine_tune.items() if isinstance(value, str | int | float)}
    params = {
        **where,
        **(setup or {}),
        "min_coverage": min_coverage,
        "labels_key": labels_key,
        "reject": reject,
        **learned,
    }
    if unlabeled_category != "unknown":
        params["unlabeled_category"] = unlabeled_category
    _note(adata, key, {**record, "params": params})
    return adata if copy else None


def transfer_labels(
    adata: AnnData,
    reference: AnnData,
    labels_key: str,
    *,
    use_rep: str,
    how: Literal["nearest neighbours", "nearest centroid", "ridge"] = "nearest neighbours",
    reject: float | None = None,
    unlabeled_category: str = "unknown",
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Name cells after a labelled reference in any embedding that both have, without training a network.

    What :func:`cellprior.evaluate.transfer` measures. The number of neighbours and their distance, or the penalty, is
    chosen within the reference.

    Parameters
    ----------
    adata
        Cells to name.
    reference
        Labelled cells, embedded alike.
    labels_key
        Column of ``reference.obs``; cells without a label, of ``unlabeled_category``, or called something such as
        "unassigned" or "NA", are left out.
    use_rep
        Key of ``obsm`` in both.
    how
        A vote of the nearest neighbours, the nearest mean of a type, or ridge regression.
    reject
        Between 0 and 1: call a cell ``unlabeled_category`` at this rate. A fifth of the reference is named by the rest
        and then no longer learned from; of cells like these, at most a share ``reject`` is called unknown for lying
        far from all, and of those that get a name at most a share ``reject`` has a wrong one, with 90 % confidence.
        ``None`` names every cell.
    unlabeled_category
        Name of cells that are rejected.
    key_added
        Column of ``obs``; by default ``use_rep`` without ``X_``, and ``_label``.
    copy
        Return a copy with the names instead of writing into ``adata``.

    Returns
    -------
    ``None``, or with ``copy`` the copy. Written are ``obs[key_added]``, names; ``obs[key_added + "_certainty"]``, share
    of the votes or of the weight, float32; with ``reject``, ``obs[key_added + "_best_guess"]``; and
    ``uns["cellprior"][key_added]`` with what was chosen.

    Raises
    ------
    KeyError
        If ``use_rep`` or ``labels_key`` is missing.
    ValueError
        If the embeddings do not fit each other, or are noted as of different weights; if there are fewer than two
        labels, or ``reject`` cannot be promised.

    Examples
    --------
    >>> cp.tl.embed(adata, "cellplm-starter"), cp.tl.embed(reference, "cellplm-starter")
    >>> cp.tl.transfer_labels(adata, reference, "cell_type", use_rep="X_cellplm", reject=0.1)
    """
    import pandas as pd

    from cellprior.evaluate._naming import refuse_other_weights, transfer_names

    for name, data in (("adata", adata), ("the reference", reference)):
        if use_rep not in data.obsm:
            msg = f"{use_rep!r} not found in obsm of {name}; its keys are {list(data.obsm)}. Embed both: cp.tl.embed."
            raise KeyError(msg)
    if labels_key not in reference.obs:
        msg = f"{labels_key!r} not found in obs of the reference; its columns are {list(reference.obs.columns)}."
        raise KeyError(msg)
    refuse_other_weights(use_rep, reference, adata)
    key = key_added or f"{use_rep.removeprefix('X_')}_label"
    found = transfer_names(
        reference.obsm[use_rep],
        reference.obs[labels_key],
        adata.obsm[use_rep],
        how=how,
        reject=reject,
        unknown=unlabeled_category,
        guess=f"in obs[{key + '_best_guess'!r}]",
    )
    if copy:
        adata = cast("AnnData", _copy(adata))
    adata.obs[f"{key}_certainty"] = found.certainty.astype("float32")
    if reject is not None:
        adata.obs[f"{key}_best_guess"] = pd.Categorical(found.best_guess)
    adata.obs[key] = pd.Categorical(found.names)
    _note(adata, key, {"use_rep": use_rep, "labels_key": labels_key, **found.record})
    return adata if copy else None


def _tell_read(model: Any, record: Mapping[str, Any], weights: Any, n_obs: int) -> None:
    """Say which weights read how much of some cells."""
    from cellprior._talk import tell

    of = {"": "", "rna_": " of RNA", "atac_": " of ATAC"}
    shares = []
    for prefix, modality in of.items():
        for name, what in (("counts_share", "counts"), ("coverage", "features" if modality else "genes")):
            if (share := record.get(prefix + name)) is not None:
                shares.append(f"{share:.1%} of the {what}{modality}")
                break
    device = "the CPU" if model.device.type == "cpu" else str(model.device)
    read = f" reads {' and '.join(shares)}" if shares else ""
    tell(f"{type(model).__name__} ({os.fspath(weights)}){read}. {n_obs:,} cells, on {device}.")


def _note(data: AnnData | MuData, key: str, record: Mapping[str, Any]) -> None:
    """Say in ``uns`` where a key comes from; the latest comes last."""
    others = {name: other for name, other in data.uns.get("cellprior", {}).items() if name != key}
    data.uns["cellprior"] = {**others, key: _stated(**record)}


def _refuse_view_of_file(data: AnnData | MuData) -> None:
    """Refuse a part of data in a file, into which nothing can be written, before anything is computed."""
    if getattr(data, "isbacked", False) and getattr(data, "is_view", False):
        msg = (
            f"This is a part of data in a file ({data.filename}), into which nothing can be written. Ask for a copy, "
            "copy=True, read the part first, adata = adata.to_memory(), or stream it to a folder, out=."
        )
        raise ValueError(msg)


def _copy(data: AnnData | MuData) -> AnnData | MuData:
    from mudata import MuData

    from cellprior._compat import without_pulled_columns
    from cellprior._matrix import to_memory

    if not isinstance(data, MuData):
        return to_memory(data) if data.isbacked else data.copy()
    if data.isbacked:
        msg = f"A MuData in a file ({data.filename}) cannot be copied: read it without backed=, or leave out copy=True."
        raise ValueError(msg)
    with without_pulled_columns():
        return data.copy()


def _stated(**values: Any) -> dict[str, Any]:
    """Without ``None``, which an h5ad file does not hold."""
    return {
        name: _stated(**value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }
