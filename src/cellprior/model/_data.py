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
from scvi.data.fields import LayerField
from scvi.dataloaders import DataSplitter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from cellprior.model._distributed import from_first, rank_and_count
from cellprior.model._on_disk import refuse_vanished

N_CHECKED = (
    256  # cells whose counts are looked at before anything long begins; the others follow as they are read
)


class NotCountsError(ValueError):
    """The matrix does not hold raw counts."""


class CountsField(LayerField):
    """Raw counts in ``X`` or a layer, of whatever genes or peaks; ``argument`` of the setup names the layer."""

    def __init__(
        self, registry_key: str, layer: str | None, *, argument: str = "layer", feature: str = "gene"
    ) -> None:
        self.argument, self.feature = argument, feature
        # scvi's own count check draws from the global random state, and its format correction replaces the user's X
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)

    def validate_field(self, adata: ad.AnnData) -> None:
        """Refuse data without cells, and data whose first cells are not counts."""
        super().validate_field(adata)
        if adata.n_obs == 0 or adata.n_vars == 0:
            msg = f"The AnnData has {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed."
            raise ValueError(msg)
        rows = np.arange(min(N_CHECKED, adata.n_obs))
        counts = read_rows(self.get_field_data(adata), rows)
        check_counts(counts, rows, adata, self.attr_key, argument=self.argument, feature=self.feature)

    def transfer_field(self, state_registry: dict, adata_target: ad.AnnData, **kwargs: Any) -> dict:
        """Register the target by itself: its genes are matched by name, their number need not agree."""
        return self.register_field(adata_target)


class CountsManager(AnnDataManager):
    """Manager whose dataset keeps counts sparse."""

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
        x = self.data.get(REGISTRY_KEYS.X_KEY)
        if isinstance(x, sp.csc_matrix | sp.csc_array):
            self.data[REGISTRY_KEYS.X_KEY] = (
                x.tocsr()
            )  # once, as rows of CSC cost a pass over the matrix each

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


def read_rows(x: Any, rows: np.ndarray) -> sp.csr_matrix:
    """Rows of a matrix as float32 CSR, in the order asked for.

    Parameters
    ----------
    x
        Dense or sparse, in memory, backed by a file, or a dask array, ``(cells, genes)``.
    rows
        Row numbers in any order.

    Raises
    ------
    OSError
        If the file cannot be read, or has gone.
    """
    contiguous = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    if isinstance(x, np.ndarray) or sp.issparse(x):
        return read_rows_of_block(x[int(rows[0]) : int(rows[-1]) + 1] if contiguous else x[rows])
    try:
        if contiguous:
            found = read_rows_of_block(x[int(rows[0]) : int(rows[-1]) + 1])
        else:
            # files want increasing rows; anndata gives them back sorted and says nothing
            ordered, position = np.unique(rows, return_inverse=True)
            found = read_rows_of_block(x[ordered])[position]
        refuse_vanished(x)
    except OSError as error:
        msg = f"The counts of cells {rows.min()} to {rows.max()} cannot be read from the file: {error}"
        raise OSError(error.errno, msg) from error
    return found


def read_rows_of_block(block: Any) -> sp.csr_matrix:
    """A slice of any kind of matrix as float32 CSR without duplicates."""
    if hasattr(block, "compute"):
        block = block.compute()
    if isinstance(block, ad.abc.CSRDataset | ad.abc.CSCDataset):
        block = block.to_memory()
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
        For NaN, infinity, negative or fractional values.
    """
    bad = ~np.isfinite(counts.data) | (counts.data < 0) | (counts.data != np.rint(counts.data))
    if not bad.any():
        return
    at = int(np.argmax(bad))
    value = counts.data[at]
    cell = adata.obs_names[rows[np.searchsorted(counts.indptr, at, side="right") - 1]]
    name = adata.var_names[counts.indices[at]]
    kind = "not finite" if not np.isfinite(value) else "negative" if value < 0 else "not an integer"
    where = "X" if layer is None else f"layers[{layer!r}]"
    others = [name for name in adata.layers if name is not None and name != layer]
    named = f"{argument}={others[0]!r}" if others else f"{argument}=..."
    advice = f"name it: {named}" if others else f"put them in a layer and name it: {named}"
    msg = (
        f"{where} does not hold raw counts: cell {cell!r}, {feature} {name!r} is {value:g}, which is {kind}. "
        f"Raw counts are needed. If another layer has them, {advice} (layers here: {others or 'none'}). "
        "If only log-normalised values are left, cellprior.pp.recover_counts(adata) gives the counts back where "
        "that is possible exactly; it takes adata.raw too. Estimated counts, such as those of Salmon or RSEM, may "
        "be rounded first."
    )
    raise NotCountsError(msg)


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
        check_whole(batch_size=batch_size)
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
    return adata.to_memory() if adata.isbacked else adata.copy()


def check_whole(**arguments: Any) -> None:
    """Refuse arguments that are no whole numbers from 1 on.

    Raises
    ------
    ValueError
        With name and value.
    """
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            msg = f"{name}={value!r}; a whole number is needed, 1 or more."
            raise ValueError(msg)


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
