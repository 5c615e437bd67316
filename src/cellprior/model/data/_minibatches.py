"""From an AnnData to minibatches of sparse counts in a model's gene order.

scvi-tools compares genes by position; here they are matched by name, so that a query may hold other genes in
another order. A field that does not compare, a manager that reads rows of any kind of matrix, and a loader that
puts each minibatch into vocabulary order: no copy of the data's matrix is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS
from scvi import settings as scvi_settings
from scvi.data import AnnDataManager
from scvi.dataloaders import DataSplitter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cellprior._arguments import count
from cellprior.model.data._cells import Cells
from cellprior.model.data._counts import (
    by_cell,
    check_counts,
    csr_tensor,
    read_rows,
    select_columns,
)
from cellprior.model.data._ranks import from_first, rank_and_count


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


@dataclass
class ToVocabulary:
    """Bring the columns of a minibatch into vocabulary order and make tensors of it.

    ``column`` is the target column of each gene of the data, -1 for none ``(n_vars,)``; with ``dense``, counts are a
    dense tensor.
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
    """Minibatches of some rows of an AnnData as tensors, the counts in vocabulary order; see :class:`ToVocabulary`.

    With ``shuffle``, new ones are drawn at each pass; with ``by_batch``, each keeps within one category of
    ``batch_key``. All fields are loaded but for ``data_and_attributes``.
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


class _Pieces(Dataset):
    """Counts of given cells."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells

    def __getitem__(self, piece: np.ndarray) -> Any:
        return self.cells.read(piece)


def pieces_of(cells: Cells, pieces: Sequence[np.ndarray]) -> DataLoader:
    """Counts of given cells, a few at a time; read by other processes, if scvi-tools' settings say so."""
    return DataLoader(
        _Pieces(cells),
        sampler=pieces,
        batch_size=None,  # one read of the matrix each
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # of seeds for workers; the global state is left alone
        num_workers=scvi_settings.dl_num_workers,
        persistent_workers=scvi_settings.dl_persistent_workers,
    )


def _as_it_is(counts: Any) -> Any:
    return counts


def first_cells(
    batches: Iterable[Mapping[str, Tensor]], n_cells: int
) -> tuple[list[Mapping[str, Tensor]], Iterable[Mapping[str, Tensor]]]:
    """The first minibatches, of so many cells if there are as many; and all of them, read no second time."""
    waiting, read, n_read = iter(batches), [], 0
    for batch in waiting:
        read.append(batch)
        n_read += len(batch[REGISTRY_KEYS.X_KEY])
        if n_read >= n_cells:
            break
    return read, chain(read, waiting)


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
