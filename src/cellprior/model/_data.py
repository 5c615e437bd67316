"""From an AnnData to minibatches of sparse counts in a model's gene order.

scvi-tools compares genes by position; here they are matched by name, so that a query may hold other genes in
another order. A field that does not compare, a manager that reads rows of any kind of matrix, and a loader that
puts each minibatch into vocabulary order: no copy of the data's matrix is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS
from scvi import settings as scvi_settings
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField
from scvi.dataloaders import DataSplitter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from cellprior._matrix import (
    Matrix,
    damaged,
    is_raw,
    matrix_of,
    refuse_damaged,
    refuse_pointers,
    to_memory,
)
from cellprior._obs import read_column, text_of
from cellprior.model._arguments import count
from cellprior.model._distributed import from_first, rank_and_count
from cellprior.model._on_disk import place_of, refuse_vanished

N_CHECKED = (
    256  # cells whose counts are looked at before anything long begins; the others follow as they are read
)
LARGEST = 2.0**53  # a float64 cannot count beyond
NEARLY = 1e-4  # of an integer: what a conversion leaves, not what a normalisation makes


class NotCountsError(ValueError):
    """The matrix does not hold raw counts."""


class CountsField(LayerField):
    """Raw counts in ``X``, a layer or ``raw``, of any genes or peaks; ``argument`` of the setup names the layer."""

    def __init__(
        self, registry_key: str, layer: str | None, *, argument: str = "layer", feature: str = "gene"
    ) -> None:
        self.argument, self.feature = argument, feature
        # scvi's own count check draws from the global random state, and its format correction replaces the user's X
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)

    def get_field_data(self, adata: ad.AnnData) -> Any:
        """The counts."""
        return matrix_of(adata, self.attr_key, argument=self.argument).x

    def validate_field(self, adata: ad.AnnData) -> None:
        """Refuse data without cells, and data whose first cells are not counts."""
        matrix = matrix_of(adata, self.attr_key, argument=self.argument)
        n_vars = len(matrix.var)
        if adata.n_obs == 0 or n_vars == 0:
            msg = f"The AnnData has {adata.n_obs} cells and {n_vars} genes; at least one of each is needed."
            raise ValueError(msg)
        rows = np.arange(min(N_CHECKED, adata.n_obs))
        counts = read_rows(matrix.x, rows, where=matrix.where)
        check_counts(counts, rows, adata, self.attr_key, argument=self.argument, feature=self.feature)

    def register_field(self, adata: ad.AnnData) -> dict:
        """Note the size of the data, and the names of the columns."""
        names = matrix_of(adata, self.attr_key, argument=self.argument).var.index
        found = super().register_field(adata)
        return found | {self.N_VARS_KEY: len(names), self.COLUMN_NAMES_KEY: np.asarray(names)}

    def transfer_field(self, state_registry: dict, adata_target: ad.AnnData, **kwargs: Any) -> dict:
        """Register the target by itself: its genes are matched by name, their number need not agree."""
        return self.register_field(adata_target)


class BatchField(CategoricalObsField):
    """Batches, by their text: a query may have 1.0 or "1" where the attached data have 1."""

    def validate_field(self, adata: ad.AnnData) -> None:
        """Refuse data without the column, and cells without a batch."""
        read_column(adata.obs, self._original_attr_key)

    def register_field(self, adata: ad.AnnData) -> dict:
        """Number the batches."""
        return self._number(adata, [], extend=True)

    def transfer_field(
        self, state_registry: dict, adata_target: ad.AnnData, extend_categories: bool = False, **kwargs: Any
    ) -> dict:
        """Number the batches as in the data that were registered first; new ones come after them."""
        known = [text_of(name) for name in state_registry[self.CATEGORICAL_MAPPING_KEY]]
        return self._number(adata_target, known, extend=extend_categories)

    def _number(self, adata: ad.AnnData, known: list[str], *, extend: bool) -> dict:
        key = self._original_attr_key
        codes, names = read_column(adata.obs, key)
        if not extend:
            present = [names[code] for code in np.unique(codes)]
            if new := [name for name in present if name not in known]:
                msg = (
                    f"adata.obs[{key!r}] has the batch {new[0]!r}, which the data of the saved model did not have; "
                    f"they had {known}. Load the model without data and pass these as a query, or set them up and "
                    "load the weights with from_pretrained."
                )
                raise ValueError(msg)
        place = {name: code for code, name in enumerate(known)}
        new_codes = np.array([place.setdefault(name, len(place)) for name in names], dtype=int)
        mapping = list(place)
        adata.obs[self.attr_key] = pd.Categorical.from_codes(new_codes[codes], mapping).codes
        return {
            self.CATEGORICAL_MAPPING_KEY: np.array(mapping, dtype=object),
            self.ORIGINAL_ATTR_KEY: key,
        }


class CountsManager(AnnDataManager):
    """Manager that finds counts in ``raw`` as well, and whose dataset keeps them sparse."""

    @property
    def counts(self) -> Matrix:
        """The counts, and the genes that their columns are."""
        return matrix_of(self.adata, self.data_registry[REGISTRY_KEYS.X_KEY]["attr_key"])

    def get_from_registry(self, registry_key: str) -> Any:
        """Data of a field."""
        found = self.data_registry[registry_key]
        if registry_key == REGISTRY_KEYS.X_KEY and getattr(found, "mod_key", None) is None:
            return self.counts.x
        return super().get_from_registry(registry_key)

    def create_torch_dataset(
        self,
        indices: Sequence[int] | None = None,
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        load_sparse_tensor: bool = False,
    ) -> Dataset:
        """Rows of all registered fields; ``load_sparse_tensor`` is not read, counts are always sparse."""
        keys = list(self.data_registry if data_and_attributes is None else data_and_attributes)
        dataset = CountsDataset(self, keys)
        return dataset if indices is None else Subset(dataset, indices)


class CountsDataset(Dataset):
    """Minibatches of an AnnData: counts as CSR, all else as arrays ``(cells, ...)``."""

    def __init__(self, manager: AnnDataManager, keys: Sequence[str]) -> None:
        self.adata = manager.adata
        self.layer = manager.data_registry[REGISTRY_KEYS.X_KEY]["attr_key"]
        self.data: dict[str, Any] = {key: manager.get_from_registry(key) for key in keys}
        if REGISTRY_KEYS.X_KEY in self.data:
            self.data[REGISTRY_KEYS.X_KEY] = by_cell(self.data[REGISTRY_KEYS.X_KEY], manager.counts.where)

    def __len__(self) -> int:
        return self.adata.n_obs

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Any]:
        rows = np.atleast_1d(np.asarray(index))
        batch: dict[str, Any] = {}
        for key, data in self.data.items():
            if key == REGISTRY_KEYS.X_KEY:
                batch[key] = read_rows(data, rows)
                check_counts(batch[key], rows, self.adata, self.layer)
            else:
                batch[key] = np.asarray(data.iloc[rows] if isinstance(data, pd.DataFrame) else data[rows])
        return batch


def by_cell(x: Any, where: str) -> Any:
    """A matrix whose rows can be read: CSC in memory as CSR, once, as each of its rows costs a pass over it.

    Raises
    ------
    ValueError
        If it is damaged.
    """
    if not isinstance(x, sp.csc_matrix | sp.csc_array):
        return x
    refuse_damaged(x, where)
    return x.tocsr()


def read_rows(x: Any, rows: np.ndarray, *, where: str = "of counts") -> sp.csr_matrix:
    """Rows of a matrix as float32 CSR, in the order asked for.

    Parameters
    ----------
    x
        Dense or sparse, in memory, backed by a file, or a dask array, ``(cells, genes)``.
    rows
        Row numbers in any order.
    where
        What errors call the matrix, if it is in memory.

    Raises
    ------
    OSError
        If the file cannot be read, or has gone.
    ValueError
        If the matrix is sparse, and its indices do not fit its shape.
    """
    contiguous = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    if isinstance(x, np.ndarray) or sp.issparse(x):
        _refuse_rows(x, rows, where)
        return read_rows_of_block(x[int(rows[0]) : int(rows[-1]) + 1] if contiguous else x[rows], where)
    try:
        where = _file_of(x) or where
        if isinstance(x, ad.abc.CSCDataset):  # all is read in any case, and is checked before it is cut
            return read_rows(x.to_memory(), rows, where=where)
        _refuse_rows(x, rows, where)
        if contiguous:
            found = read_rows_of_block(x[int(rows[0]) : int(rows[-1]) + 1], where)
        else:
            # files want increasing rows; anndata gives them back sorted and says nothing
            ordered, position = np.unique(rows, return_inverse=True)
            found = read_rows_of_block(x[ordered], where)[position]
        refuse_vanished(x)
    except OSError as error:
        msg = f"The counts of cells {rows.min()} to {rows.max()} cannot be read from the file: {error}"
        raise OSError(error.errno, msg) from error
    return found


def _refuse_rows(x: Any, rows: np.ndarray, where: str) -> None:
    """Refuse rows of a sparse matrix that begin or end outside of its arrays, before compiled code goes there."""
    if sp.issparse(x) and x.format == "csc":
        refuse_damaged(x, where)
        return
    if sp.issparse(x) and x.format == "csr":
        pointers, n = x.indptr, min(len(x.indices), len(x.data))
    else:  # what anndata has read of a file once
        pointers = getattr(x, "_indptr", None)
        if not isinstance(pointers, np.ndarray):
            return
        n = min(x.group["indices"].shape[0], x.group["data"].shape[0])
    if len(pointers) != x.shape[0] + 1:
        raise damaged(where, f"indptr has {len(pointers)} entries, {x.shape[0] + 1} are needed")
    refuse_pointers(pointers[rows], pointers[rows + 1], n, where)


def _file_of(x: Any) -> str | None:
    """Where a matrix on disk is, for errors."""
    group = getattr(x, "group", None)
    return None if group is None else f"{group.name} of {place_of(group)}"


def read_rows_of_block(block: Any, where: str = "of counts") -> sp.csr_matrix:
    """A slice of any kind of matrix as float32 CSR without duplicates."""
    if hasattr(block, "compute"):
        block = block.compute()
    if isinstance(block, ad.abc.CSRDataset | ad.abc.CSCDataset):
        block = block.to_memory()
    if sp.issparse(block) and block.format in ("csr", "csc"):
        refuse_damaged(block, where)
    with np.errstate(over="ignore"):  # what a float32 does not hold becomes infinite, and is refused
        csr = sp.csr_matrix(block, dtype=np.float32)
        if not csr.has_canonical_format:
            csr.sum_duplicates()
    return csr


def check_counts(
    counts: sp.csr_matrix,
    rows: np.ndarray,
    adata: ad.AnnData,
    layer: str | None,
    *,
    argument: str = "layer",
    feature: str = "gene",
) -> None:
    """Refuse values that are not raw counts and name the first cell and gene, and the argument that names a layer.

    Raises
    ------
    NotCountsError
        For NaN, infinity, negative, fractional or huge values.
    """
    bad = _no_counts(counts.data)
    if not bad.any():
        return
    at = int(np.argmax(bad))
    value = counts.data[at]
    cell = adata.obs_names[rows[np.searchsorted(counts.indptr, at, side="right") - 1]]
    from_raw = is_raw(adata, layer)
    name = (adata.raw if from_raw else adata).var_names[counts.indices[at]]
    where = "X" if layer is None else "raw.X" if from_raw else f"layers[{layer!r}]"
    wrong = counts.data[bad]
    with np.errstate(invalid="ignore"):
        nearly = bool((np.abs(wrong - np.rint(wrong)) <= NEARLY * np.maximum(wrong, 1)).all())
    kind = (
        "not finite"
        if not np.isfinite(value)
        else "negative"
        if value < 0
        else "too large for a count"
        if value > LARGEST
        else "not an integer"
    )
    shown = f"{value:.9g}" if nearly else f"{value:g}"
    msg = f"{where} does not hold raw counts: cell {cell!r}, {feature} {name!r} is {shown}, which is {kind}. "
    if kind == "not an integer" and nearly:
        access = f"adata.{where}"
        advice = (
            f"It is within {NEARLY:g} of one, as a conversion leaves counts. If they were counts, round them first: "
            f"{access} = np.rint({access})"
        )
        if from_raw:
            advice = advice.replace(access, "adata.X").replace(
                "first: ", "first: adata = adata.raw.to_adata(); "
            )
        raise NotCountsError(f"{msg}{advice}")
    raise NotCountsError(f"{msg}{_way_out(adata, layer, argument)}")


def _no_counts(values: np.ndarray) -> np.ndarray:
    """Which values are no counts: negative, huge or infinite, fractional or NaN."""
    return (values < 0) | (values > LARGEST) | (values != np.rint(values))


def _way_out(adata: Any, layer: str | None, argument: str) -> str:
    """Where the counts are instead, or where they could come from."""
    layers = [name for name in adata.layers if name is not None and name != layer]
    recover = (
        "Else cellprior.pp.recover_counts makes counts of log-normalised values, where that is possible."
    )
    if isinstance(adata, ad.AnnData):
        for other in [*layers, *(["raw"] if adata.raw is not None and "raw" not in layers else []), None]:
            if other != layer and _seem_counts(adata, other):
                if other is None:
                    return f"X holds raw counts: leave out {argument}={layer!r}. {recover}"
                place = "adata.raw" if is_raw(adata, other) else f"layers[{other!r}]"
                return f"{place} holds raw counts, name it: {argument}={other!r} (now {argument}={layer!r}). {recover}"
    named = f"{argument}={layers[0]!r}" if layers else f"{argument}=..."
    advice = f"name it: {named}" if layers else f"put them in a layer and name it: {named}"
    return (
        f"Raw counts are needed. If another layer has them, {advice} (layers here: {layers or 'none'}). "
        "If only log-normalised values are left, cellprior.pp.recover_counts(adata) gives the counts back where "
        "that is possible exactly; it takes adata.raw too. Estimated counts, such as those of Salmon or RSEM, may "
        "be rounded first."
    )


def _seem_counts(adata: ad.AnnData, layer: str | None) -> bool:
    """Whether the first cells of a matrix are counts, and not all of them empty."""
    try:
        x = matrix_of(adata, layer).x
        found = read_rows(x, np.arange(min(N_CHECKED, adata.n_obs)))
    except (ValueError, TypeError, OSError):  # there is none, or it is of no use
        return False
    return found.nnz > 0 and not _no_counts(found.data).any()


@dataclass
class ToVocabulary:
    """Bring the columns of a minibatch into vocabulary order and make tensors of it.

    Parameters
    ----------
    column
        Target column of each gene of the data, -1 for none ``(n_vars,)``.
    n_columns
        Number of target columns.
    dense
        Give counts as a dense tensor.
    """

    column: np.ndarray
    n_columns: int
    dense: bool = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors; the counts ``(cells, n_columns)`` as sparse CSR, or dense."""
        return {key: self._counts(x) if sp.issparse(x) else torch.as_tensor(x) for key, x in batch.items()}

    def _counts(self, x: sp.csr_matrix) -> Tensor:
        x = select_columns(x, self.column, self.n_columns)
        return torch.from_numpy(x.toarray()) if self.dense else csr_tensor(x)


def select_columns(x: sp.csr_matrix, column: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """Move each column of ``x`` to ``column[j]``, drop those at -1, and add up those that meet."""
    target = column[x.indices]
    kept = target >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[x.indptr]
    moved = sp.csr_matrix((x.data[kept], target[kept], indptr), shape=(x.shape[0], n_columns))
    moved.sum_duplicates()
    return moved


def csr_tensor(x: sp.csr_matrix) -> Tensor:
    """A CSR tensor that shares memory with a SciPy matrix in canonical format."""
    with warnings.catch_warnings():
        # torch announces at first use that CSR tensors are in beta; the two products used here are tested
        warnings.filterwarnings(
            "ignore", message="Sparse CSR tensor support is in beta", category=UserWarning
        )
        indptr, indices, data = (torch.from_numpy(part) for part in (x.indptr, x.indices, x.data))
        return torch.sparse_csr_tensor(indptr, indices, data, size=x.shape, check_invariants=False)


class SentenceSampler(Sampler[list[int]]):
    """Rows in minibatches; with a group per row, no minibatch crosses groups.

    Shuffled, every pass cuts the groups anew, into pieces of nearly equal size and in random order. Where several
    processes train together, a piece is for all of them, and each gets its share: ``batch_size`` cells at most.
    """

    def __init__(self, rows: np.ndarray, group: np.ndarray | None, batch_size: int, shuffle: bool) -> None:
        count(batch_size=batch_size)
        codes = np.zeros(len(rows), dtype=np.int64) if group is None else group
        self.groups = [rows[codes == code] for code in np.unique(codes)]
        self.batch_size = batch_size
        self.shuffle = shuffle

    def _n_pieces(self, rows: np.ndarray) -> int:
        return -(-len(rows) // (self.batch_size * rank_and_count()[1]))

    def __len__(self) -> int:
        return sum(self._n_pieces(rows) for rows in self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        rank, n_ranks = rank_and_count()
        for piece in self._pieces():
            share = np.array_split(piece, n_ranks)[rank]
            yield (
                share if len(share) else piece[:1]
            ).tolist()  # a process without cells would keep the others waiting

    def _pieces(self) -> Iterator[np.ndarray]:
        if not self.shuffle:
            for rows in self.groups:  # in pieces of nearly equal size: none of a handful of rows
                yield from np.array_split(rows, self._n_pieces(rows))
            return
        seed = from_first(int(torch.randint(2**31, ()).item()))  # seeded as all of torch is
        rng = np.random.default_rng(seed)
        pieces = [
            piece
            for rows in self.groups
            for piece in np.array_split(rng.permutation(rows), self._n_pieces(rows))
        ]
        for i in rng.permutation(len(pieces)):
            yield pieces[i]


class VocabularyLoader(DataLoader):
    """Minibatches of an AnnData as tensors, the counts in vocabulary order; see :class:`ToVocabulary`.

    Parameters
    ----------
    adata_manager
        Manager of the data.
    column, n_columns
        Where each gene goes, see :class:`ToVocabulary`.
    indices
        Rows to load.
    batch_size
        Rows of a minibatch.
    shuffle
        Draw new minibatches at each pass.
    by_batch
        Keep each minibatch within one category of ``batch_key``.
    data_and_attributes
        Fields to load; all by default.
    dense
        Give counts as a dense tensor.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        column: np.ndarray,
        n_columns: int,
        indices: np.ndarray,
        batch_size: int,
        shuffle: bool = False,
        by_batch: bool = False,
        data_and_attributes: list[str] | None = None,
        dense: bool = False,
        pin_memory: bool = False,
        **scvi_kwargs: Any,  # drop_last, load_sparse_tensor, distributed_sampler: of scvi-tools' own loader
    ) -> None:
        rows = np.asarray(indices)
        batch = None
        if by_batch and REGISTRY_KEYS.BATCH_KEY in adata_manager.data_registry:
            batch = adata_manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()[rows]
        to_vocabulary: Callable[[Any], dict[str, Tensor]] = ToVocabulary(column, n_columns, dense)
        super().__init__(
            adata_manager.create_torch_dataset(data_and_attributes=data_and_attributes),
            sampler=SentenceSampler(rows, batch, batch_size, shuffle),
            batch_size=None,  # the sampler makes the minibatches, one read of the matrix each
            collate_fn=to_vocabulary,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # of seeds for workers; the global state is left alone
            num_workers=scvi_settings.dl_num_workers,
            persistent_workers=scvi_settings.dl_persistent_workers,
        )


def minibatches(
    dataset: Dataset, rows: Sequence[np.ndarray], column: np.ndarray, n_columns: int, dense: bool = False
) -> DataLoader:
    """Given minibatches, rows of a :class:`CountsDataset` each, with counts in vocabulary order."""
    to_vocabulary: Callable[[Any], dict[str, Tensor]] = ToVocabulary(column, n_columns, dense)
    return DataLoader(
        dataset,
        sampler=rows,
        batch_size=None,  # one read of the matrix each
        collate_fn=to_vocabulary,
        generator=torch.Generator(),  # of seeds for workers; the global state is left alone
        num_workers=scvi_settings.dl_num_workers,
        persistent_workers=scvi_settings.dl_persistent_workers,
    )


class VocabularySplitter(DataSplitter):
    """scvi-tools' split into training, validation and test cells, with our loader."""

    data_loader_cls = VocabularyLoader

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """Rows by what they are for, after ``setup``."""
        return {"train": self.train_idx, "validation": self.val_idx, "test": self.test_idx}

    def keep(self, parts: dict[str, np.ndarray]) -> None:
        """Take these from now on; without a seed, each ``setup`` would draw others."""
        self.external_indexing = [parts["train"], parts["validation"], parts["test"]]
        self.n_train, self.n_val = len(parts["train"]), len(parts["validation"])
        self.setup()

    def floor_minibatches(self) -> VocabularyLoader:
        """Training cells that predictors without biology are fitted to: all."""
        return self.train_dataloader()


# scvi-tools asks for this name before it refuses early stopping without validation cells
VocabularySplitter.__name__ = "DataSplitter"


def without_view(adata: ad.AnnData) -> ad.AnnData:
    """A copy of a view, which scvi-tools cannot register, in memory; other data as they are."""
    if not adata.is_view:
        return adata
    whole = getattr(adata, "_adata_ref", None)  # a view is cut out of it by compiled code
    for x in () if whole is None or whole.isbacked else (whole.X, *whole.layers.values()):
        if sp.issparse(x) and x.format in ("csr", "csc"):
            refuse_pointers(
                x.indptr[:-1], x.indptr[1:], min(len(x.indices), len(x.data)), "of the whole data"
            )
    return to_memory(adata) if adata.isbacked else adata.copy()


def row_numbers(indices: Sequence[int] | Sequence[bool] | np.ndarray | None, n_obs: int) -> np.ndarray:
    """Row numbers of the cells that ``indices``, numbers or a mask, mean."""
    if indices is None:
        return np.arange(n_obs)
    rows = np.asarray(indices)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iub"):
        msg = f"indices must be whole numbers or a mask, one per cell; found {rows.dtype} of shape {rows.shape}."
        raise TypeError(msg)
    if rows.dtype == bool:
        if len(rows) != n_obs:
            msg = f"The mask has {len(rows)} entries for {n_obs} cells."
            raise ValueError(msg)
        return np.flatnonzero(rows)
    rows = rows.astype(np.int64) if rows.size else np.empty(0, dtype=np.int64)
    if rows.size and not (-n_obs <= rows.min() and rows.max() < n_obs):
        msg = f"indices go from {rows.min()} to {rows.max()}; there are {n_obs} cells."
        raise IndexError(msg)
    return rows % n_obs
