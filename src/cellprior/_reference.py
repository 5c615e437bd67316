"""A labelled reference that holds its counts, or its batches, in another place than the query."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from cellprior._matrix import matrix_of, places

X = "X"  # as the place of a reference's counts, where None stands for that of the query's


def as_the_query_has_it(
    reference: Any,
    *,
    layer: str | None,
    reference_layer: str | None,
    batch_key: str | None,
    reference_batch_key: str | None,
) -> Any:
    """The reference, with its counts and batches where the query has them.

    Parameters
    ----------
    reference
        AnnData ``(cells, genes)``; it is not changed.
    layer, batch_key
        Where the query has its counts, and its batches.
    reference_layer, reference_batch_key
        Where the reference has them; ``None`` for the same place. ``"X"`` is ``X``, unless a layer has this name.

    Returns
    -------
    The reference itself where nothing has to be moved, else an AnnData that shares its counts.

    Raises
    ------
    ValueError
        If there is no such matrix.
    KeyError
        If there is no such column of ``obs``.
    """
    place = layer if reference_layer is None else reference_layer
    if place == X and X not in reference.layers:
        place = None
    if place not in (found := places(reference)):
        named = " or ".join(f'reference_layer="{X if other is None else other}"' for other in found)
        msg = (
            f"The reference has no counts in {'X' if place is None else repr(place)}"
            f"{', where those of the query are' if reference_layer is None else ''}. "
            f"Say where it has raw counts: {named or 'it has no matrix at all'} (--reference-layer on the command "
            "line)."
        )
        raise ValueError(msg)
    column = batch_key if reference_batch_key is None else reference_batch_key
    if column is not None and column not in reference.obs:
        msg = (
            f"{column!r} not found in obs of the reference; its columns are {list(reference.obs.columns)}. Name its "
            "column of batches: reference_batch_key=... (--reference-batch-key). If it is one batch, give it a column "
            f'that says so: reference.obs["{column}"] = "reference".'
        )
        raise KeyError(msg)
    if place == layer and column == batch_key:
        return reference
    if batch_key is None and column is not None:
        msg = "reference_batch_key= is given, and batch_key= is not: name the query's column of batches too."
        raise ValueError(msg)
    matrix = matrix_of(reference, place)
    obs = reference.obs.copy()
    if batch_key is not None:
        obs[batch_key] = reference.obs[column]
    if layer is None:
        return AnnData(matrix.x, obs=obs, var=matrix.var.copy())
    return AnnData(obs=obs, var=matrix.var.copy(), layers={layer: matrix.x})
