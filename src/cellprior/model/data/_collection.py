"""Cells of a collection on disk, for long trainings: several processes, and going on after an interruption.

A collection is what :class:`annbatch.DatasetCollection` writes: many cells, shuffled, in several AnnDatas of one zarr
group. A pass over it is cut into sections, an epoch of the trainer each: after each section held-out cells are looked
at and a checkpoint is written. Which cells a process reads in a section follows from the seed, the number of the
section and of the process alone. So who goes on from a checkpoint reads what would have been read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior._arguments import count
from cellprior.model.data._ranks import rank_and_count

CHUNK = 64  # neighbouring cells that are read together
PRELOADED = 64  # chunks in memory, of which minibatches are drawn


@dataclass(frozen=True)
class Sections:
    """Which cells are read in which section by which process.

    ``first`` and ``last`` are training cells by their number in the collection, the last not one of them;
    ``batch_size`` is of one process, the ``size`` of a section of all together, by default all cells; neighbouring
    cells, as many as a ``chunk``, are read together.
    """

    first: int
    last: int
    batch_size: int
    size: int | None = None
    seed: int = 0
    chunk: int = CHUNK

    @property
    def n_sections(self) -> int:
        """Sections of a pass over the cells, of equal size."""
        n_cells = self.last - self.first
        return max(1, round(n_cells / min(self.size or n_cells, n_cells)))

    def n_batches(self, n_ranks: int) -> int:
        """Minibatches of a process in a section, the same in each."""
        return self._n_chunks(n_ranks) * self.chunk // self.batch_size

    def _n_chunks(self, n_ranks: int) -> int:
        """Chunks of a process in a section."""
        return (self.last - self.first) // self.chunk // self.n_sections // n_ranks

    def chunks(self, section: int, *, rank: int, n_ranks: int) -> list[slice]:
        """Cells that a process reads in a section, counted on over the passes, in this order.

        No cell is in two sections of a pass. Where the cells do not fill them, a few are left out, others in each pass.
        """
        number, within = divmod(section, self.n_sections)
        rng = np.random.default_rng([self.seed, number])
        n_cells = self.last - self.first
        n_whole = n_cells // self.chunk
        start = self.first + int(rng.integers(n_cells - n_whole * self.chunk + 1))
        order = rng.permutation(n_whole)
        share = self._n_chunks(n_ranks)
        begin = (within * n_ranks + rank) * share
        return [
            slice(start + int(i) * self.chunk, start + int(i + 1) * self.chunk)
            for i in order[begin : begin + share]
        ]

    def requests(self, section: int, *, rank: int, n_ranks: int) -> Iterator[dict[str, Any]]:
        """What annbatch is asked for: chunks that are read together, and how their cells make minibatches."""
        chunks = self.chunks(section, rank=rank, n_ranks=n_ranks)
        rng = np.random.default_rng([self.seed, section, rank])
        # as many chunks as make whole minibatches: cells are left over at the end of a section only
        least = self.batch_size // math.gcd(self.batch_size, self.chunk)
        together = max(PRELOADED // least, 1) * least
        for i in range(0, len(chunks), together):
            part = chunks[i : i + together]
            cells = rng.permutation(len(part) * self.chunk)
            if n_whole := len(cells) // self.batch_size:
                yield {"requests": part, "splits": np.split(cells[: n_whole * self.batch_size], n_whole)}


class CollectionCells(pl.LightningDataModule):
    """Cells of an annbatch collection, for ``train(datamodule=...)``; each of several processes reads its own.

    Parameters
    ----------
    path
        Folder that :class:`annbatch.DatasetCollection` has written, its cells shuffled.
    section
        Cells of an epoch of the trainer, of all processes together; by default all training cells.
    seed
        Of the order of the cells.

    Attributes
    ----------
    number
        Of the section that is read next, counted over the passes.

    Raises
    ------
    ImportError
        If annbatch is not installed, or too old.
    ValueError
        If there is no collection, or too few cells for the processes and the batch size.
    """

    by_process = True  # for who trains: the processes do not read the same cells

    def __init__(self, path: Path | str, *, section: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if section is not None:
            count(section=section)
        self.path, self.section, self.seed, self.number = Path(path), section, seed, 0
        self.adatas = _open(self.path)
        self.n_obs = sum(adata.n_obs for adata in self.adatas)
        self.var = self.adatas[0].var

    @property
    def registry(self) -> dict[str, Any]:
        """What :class:`~cellprior.model.data._datamodule.StreamedCells` reads the genes from."""
        state = {"column_names": self.var.index.astype(str)}
        return {"field_registries": {REGISTRY_KEYS.X_KEY: {"state_registry": state}}}

    def set_split(
        self,
        *,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 512,
    ) -> None:
        """Hold out the first cells of the collection, which are any cells, as it is shuffled."""
        share = (
            1 - train_size if validation_size is None and train_size is not None else validation_size or 0.0
        )
        self.batch_size = batch_size
        self.n_val = round(share * self.n_obs)
        self.n_train = self.n_obs - self.n_val
        self.sections = Sections(self.n_val, self.n_obs, batch_size, self.section, self.seed)

    def train_dataloader(self) -> SectionLoader:
        """Training cells of section ``number``, of this process."""
        return SectionLoader(self, held_out=False)

    def val_dataloader(self) -> SectionLoader:
        """Held-out cells, of this process; the last few are left out that do not make a minibatch for each."""
        return SectionLoader(self, held_out=True)

    def held_out(self, n_cells: int) -> AnnData:
        """The first held-out cells, in memory, to evaluate with.

        Parameters
        ----------
        n_cells
            At most.
        """
        left, found = min(n_cells, self.n_val), []
        for adata in self.adatas:
            part = adata[: min(left, adata.n_obs)].to_memory()
            found.append(AnnData(part.X, obs=part.obs, var=part.var))
            left -= part.n_obs
            if not left:
                break
        return ad.concat(found, merge="same")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Tensor]:
        """Counts ``(cells, genes)``, dense."""
        return {REGISTRY_KEYS.X_KEY: torch.from_numpy(batch["X"].toarray().astype(np.float32, copy=False))}


class SectionLoader:
    """Minibatches of one process: of the section that is next, or of the held-out cells."""

    def __init__(self, cells: CollectionCells, *, held_out: bool) -> None:
        self.cells, self.is_held_out = cells, held_out

    def __len__(self) -> int:
        n_ranks = rank_and_count()[1]
        if self.is_held_out:
            return self._n_held_out(n_ranks)
        n_batches = self.cells.sections.n_batches(n_ranks)
        if not n_batches:
            msg = (
                f"{self.cells.path} has {self.cells.n_train:,} training cells, in {self.cells.sections.n_sections} "
                f"sections and {n_ranks} processes too few for minibatches of {self.cells.batch_size}: take larger "
                "sections or smaller minibatches."
            )
            raise ValueError(msg)
        return n_batches

    def _n_held_out(self, n_ranks: int) -> int:
        n_cells = self.cells.n_val
        return min(n_cells, max(n_cells // n_ranks // self.cells.batch_size, 1)) if n_cells else 0

    def __iter__(self) -> Iterator[Any]:
        from annbatch import Loader
        from annbatch.abc import Sampler

        rank, n_ranks = rank_and_count()
        requests = list(self._held_out(rank, n_ranks)) if self.is_held_out else None
        if requests == []:
            return
        cells, length = self.cells, len(self)

        class InOrder(Sampler):
            """Asks annbatch for what is laid down above."""

            batch_size, shuffle = cells.batch_size, False

            def n_batches(self, n_obs: int) -> int:
                return length

            def validate(self, n_obs: int) -> None:
                pass

            def _sample(self, n_obs: int) -> Iterator[Any]:
                yield from requests or cells.sections.requests(cells.number, rank=rank, n_ranks=n_ranks)

        loader = Loader(batch_sampler=InOrder(), preload_to_gpu=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*obsm.*|.*layers.*")  # which are not read
            loader.add_adatas(
                [AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]]) for adata in cells.adatas]
            )
        yield from loader

    def _held_out(self, rank: int, n_ranks: int) -> Iterator[dict[str, Any]]:
        size, n_batches = self.cells.batch_size, self._n_held_out(n_ranks)
        for i in range(rank * n_batches, (rank + 1) * n_batches):
            part = slice(min(i * size, self.cells.n_val - 1), min((i + 1) * size, self.cells.n_val))
            yield {"requests": [part], "splits": [np.arange(part.stop - part.start)]}


def _open(path: Path) -> list[AnnData]:
    """The AnnDatas of a collection, their matrices on disk."""
    try:
        import zarr
        from annbatch import DatasetCollection
    except ImportError as error:
        msg = 'A collection is read by annbatch, for Python 3.12 or newer: pip install "cellprior[annbatch]".'
        raise ImportError(msg) from error
    if not path.is_dir():
        msg = f"There is no collection at {path}; make one with annbatch.DatasetCollection(...).add_adatas(files)."
        raise ValueError(msg)
    collection = DatasetCollection(zarr.open_group(path, mode="r"))
    if collection.is_empty:
        msg = f"{path} holds no cells: add_adatas of annbatch.DatasetCollection puts them there."
        raise ValueError(msg)
    return [
        AnnData(
            ad.io.sparse_dataset(group["X"]),
            obs=ad.io.read_elem(group["obs"]),
            var=ad.io.read_elem(group["var"]),
        )
        for group in collection
    ]
