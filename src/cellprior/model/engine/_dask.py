"""The embedding loop on a Dask cluster: the workers read, check and embed; this process asks and collects.

Everything that a worker does is a function of its arguments, so that Dask does it again elsewhere if the worker dies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from cellprior.model.data._cells import Cells
from cellprior.model.engine._encoder import Covariates, Encoder
from cellprior.model.engine._sizes import BatchSize, Chunks, Part

IN_FLIGHT = 2  # parts asked for, per thread of the cluster
PATIENCE = 120.0  # seconds without any worker: a cluster may be on its way to more, or have ended
NO_WORKER = "The Dask cluster has had no worker for {:.0f} seconds. Add workers, or pass the client of another cluster."


class ClusterLostError(RuntimeError):
    """The cluster, or the connection to it, has ended before the work."""


class Block(NamedTuple):
    """Some cells, as they are sent to a worker."""

    n_cells: int
    counts: dict[
        str, tuple[Any, np.ndarray, np.ndarray]
    ]  # rows of the matrix, that of each cell, names of the rows
    covariates: dict[str, np.ndarray]


@dataclass
class Worker:
    """All that is the same for all cells; sent to each worker once.

    The encoder has the network, on the CPU as it is sent; it runs on the worker's first GPU if it has one. The cells
    say how counts are read, without any. For the others see :class:`~cellprior.model.engine._embedding.Embedding`.
    """

    encoder: Encoder
    cells: Cells
    size: BatchSize
    precision: str

    @classmethod
    def of(cls, encoder: Encoder, cells: Cells, size: BatchSize, precision: str) -> Worker:
        """Leave the data behind."""
        counts = {}
        for name, part in cells.counts.items():
            labels = SimpleNamespace(
                var_names=part.matrix.var.index, layers=list(part.adata.layers), raw=None
            )
            counts[name] = replace(part, adata=labels, x=None, row=np.empty(0, dtype=np.int64), match=None)
        return cls(encoder, Cells(pd.DataFrame(), counts, joint=cells.joint), size, precision)

    def ready(self) -> Encoder:
        """The encoder, with the network where it runs."""
        self.encoder.module.to("cuda" if torch.cuda.is_available() else "cpu")
        return self.encoder

    def chunks(self, block: Block) -> Chunks:
        """Counts of the cells of a block, checked, in vocabulary order, a few cells at a time."""
        counts = {}
        for name, (x, row, names) in block.counts.items():
            part = self.cells.counts[name]
            labels = SimpleNamespace(**vars(part.adata), obs_names=names)
            counts[name] = replace(part, adata=labels, x=x, row=row)
        cells, encoder = replace(self.cells, counts=counts), self.ready()
        pieces = np.array_split(np.arange(block.n_cells), -(-block.n_cells // self.size.n_cells))
        sizes = [len(piece) for piece in pieces]
        return Chunks(sizes, lambda start: (encoder.place(cells.read(piece)) for piece in pieces[start:]))

    def covariates(self, block: Block) -> Covariates:
        """What the network is told of the cells of a block."""
        device = self.ready().module.device
        return {name: torch.as_tensor(values, device=device) for name, values in block.covariates.items()}

    def until_it_fits(self, function: Callable[[], Any]) -> Any:
        """Call a function, and where a GPU runs out of memory, again with fewer cells at a time."""
        device = self.ready().module.device.type
        while True:
            try:
                half = self.precision == "bfloat16"
                with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
                    return function()
            except torch.cuda.OutOfMemoryError as error:
                self.size.halve(error)
            torch.cuda.empty_cache()  # not in the handler, whose traceback still holds the tensors


def embed_unit(worker: Worker, block: Block) -> np.ndarray:
    """Latents ``(cells, width)`` of one unit, by one worker."""

    def embed() -> np.ndarray:
        latents = worker.ready().encode(worker.chunks(block), worker.covariates(block))
        return np.concatenate([latent.float().cpu().numpy() for latent in latents])

    return worker.until_it_fits(embed)


@dataclass
class Cluster:
    """A cluster that works on some cells; what it gives are futures.

    ``worker`` is that of the :class:`Worker`; for cells and rows see
    :class:`~cellprior.model.engine._embedding.Embedding`.
    """

    client: Any
    worker: Any
    cells: Cells
    rows: np.ndarray

    def on_cells(self, function: Callable[[Worker, Block], Any], cells: np.ndarray) -> Any:
        """``function(worker, block)`` of some cells, by their positions among ``rows``."""
        import dask

        rows, counts = self.rows[cells], {}
        for name, part in self.cells.counts.items():
            row = part.row[rows]
            has = row >= 0
            block, position = block_of(part.x, row[has]) if has.any() else (part.x[:0], row[has])
            names = np.asarray(part.adata.obs_names[np.unique(row[has])])
            row[has] = position
            counts[name] = (block, row, names)
        covariates = {name: values[rows] for name, values in self.cells.covariates.items()}
        # the call takes a block to pieces, lest Dask miss the arrays in it
        delayed = dask.delayed(_with_block, pure=False)(function, self.worker, len(cells), counts, covariates)
        return self.client.compute(delayed)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, of which some may be futures."""
        return self.client.submit(function, *args, pure=False)


def _with_block(function: Callable[..., Any], worker: Worker, *block: Any) -> Any:
    return function(worker, Block(*block))


def parts_on_cluster(
    encoder: Encoder,
    cells: Cells,
    rows: np.ndarray,
    units: list[np.ndarray],
    client: Any,
    pending: deque[int],
    size: BatchSize,
    precision: str,
    progress: Callable[[int], Any],
) -> Iterator[Part]:
    """Embed units on a cluster, as :meth:`~cellprior.model.engine._embedding.Embedding.parts` does here, in any order.

    Raises NotCountsError if the data are not raw counts; RuntimeError if workers die again and again on the same
    cells; ClusterLostError if the cluster ends.
    """
    from distributed import KilledWorker, as_completed

    module = encoder.module
    device = module.device
    module.cpu()  # as it is sent
    with connected(client):
        worker = client.scatter(Worker.of(encoder, cells, size, precision), broadcast=True)
    module.to(device)
    cluster = Cluster(client, worker, cells, rows)
    running, unfinished = as_completed([]), {}
    asked: dict[Any, tuple[int, np.ndarray]] = {}
    while pending or asked:
        with connected(client):
            n_threads = sum(client.nthreads().values())
            while pending and len(asked) < max(IN_FLIGHT * n_threads, 1):
                unit = pending.popleft()
                positions = units[unit]
                futures = encoder.submit(cluster, positions)
                futures = futures or [(cluster.on_cells(embed_unit, positions), positions)]
                unfinished[unit] = len(futures)
                for future, of_future in futures:
                    asked[future] = (unit, of_future)
                    running.add(future)
            _await(running, client)
            future = next(running)
        unit, positions = asked.pop(future)
        try:
            with connected(client):
                latent = future.result()
        except KilledWorker as error:
            msg = (
                f"Several workers died one after the other over the same {len(positions)} cells, probably for want of "
                f"memory: give them more, fewer threads each, or a smaller batch_size ({error})."
            )
            raise RuntimeError(msg) from error
        future.release()
        unfinished[unit] -= 1
        progress(encoder.n_stages * len(positions))
        yield Part(unit, positions, latent, not unfinished[unit])


def await_workers(client: Any) -> None:
    """Wait for a first worker, before anything is asked of the cluster: Dask itself would wait for ever.

    Raises ClusterLostError if none comes.
    """
    if client.status != "running":
        raise ClusterLostError(_ending(client))
    try:
        with connected(client):
            client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError as error:
        raise ClusterLostError(NO_WORKER.format(PATIENCE)) from error


@contextmanager
def connected(client: Any) -> Iterator[None]:
    """Say in one way that a cluster has ended, which Dask says in many.

    Raises ClusterLostError if the client is closed, the scheduler gone, or what was sent to the workers lost with
    them.
    """
    try:
        yield
    except ClusterLostError:
        raise
    except CancelledError as error:  # of a future, which nobody here cancels
        raise ClusterLostError(_ending(client)) from error
    except Exception as error:
        if client.status == "running" or isinstance(error, ValueError):  # which is about the data
            raise
        raise ClusterLostError(_ending(client)) from error


def _ending(client: Any) -> str:
    if client.status == "running":
        why = "its workers were lost, and what had been sent to them"
    else:
        why = f"the client was closed, or its scheduler has gone (it is {client.status})"
    return f"The Dask cluster has ended: {why}. Start one, and pass its client."


def _await(running: Any, client: Any) -> None:
    """Wait for a result, not longer than ``PATIENCE`` if nobody is there to work on it."""
    seen = looked = time.monotonic()
    while not running.has_ready():
        time.sleep(0.01)
        if (now := time.monotonic()) - looked < 1:
            continue
        looked = now
        if client.status != "running":
            raise ClusterLostError(_ending(client))
        if client.nthreads():
            seen = now
        elif now - seen > PATIENCE:
            raise ClusterLostError(NO_WORKER.format(now - seen))


def block_of(x: Any, rows: np.ndarray) -> tuple[Any, np.ndarray]:
    """Some rows of a dask array, each once, and which of them each row is."""
    found, position = np.unique(rows, return_inverse=True)
    contiguous = found[-1] - found[0] == len(found) - 1
    return x[int(found[0]) : int(found[-1]) + 1] if contiguous else x[found], position


def refuse_here(x: Any) -> None:
    """Refuse counts that are in this process: a cluster reads a dask array.

    Raises TypeError, with the way out.
    """
    if not hasattr(x, "dask"):
        msg = (
            f"client= needs counts that the workers can read themselves, a dask array; these are a {type(x).__name__}. "
            "Pass the path of the file, or open it with anndata.experimental.read_lazy(path)."
        )
        raise TypeError(msg)
