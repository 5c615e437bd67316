"""The embedding loop on a Dask cluster: the workers read, check and embed; this process asks and collects.

Everything that a worker does is a function of its arguments, so that Dask does it again elsewhere if the worker dies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cellprior.model.data._counts import check_counts, csr_tensor, read_rows_of_block, select_columns
from cellprior.model.data._minibatches import ToVocabulary

if TYPE_CHECKING:
    from cellprior.model.engine._embedding import Embedding
    from cellprior.model.engine._sizes import BatchSize, Part

IN_FLIGHT = 2  # parts asked for, per thread of the cluster
PATIENCE = 120.0  # seconds without any worker: a cluster may be on its way to more, or have ended
NO_WORKER = "The Dask cluster has had no worker for {:.0f} seconds. Add workers, or pass the client of another cluster."


class ClusterLostError(RuntimeError):
    """The cluster, or the connection to it, has ended before the work."""


@dataclass
class Worker:
    """All that is the same for all cells; sent to each worker once.

    Attributes
    ----------
    module
        The network, on the CPU as it is sent; it runs on the worker's first GPU if it has one.
    encode
        Of the model class, of which it reads ``module`` only.
    to_vocabulary
        What brings counts into the vocabulary's order.
    gene_index
        Vocabulary row of each column then, None if they are the vocabulary.
    size, precision, options
        See :class:`~cellprior.model.engine._embedding.Embedding`.
    labels
        ``var_names``, ``layers`` and ``layer``, for what is refused.
    """

    module: torch.nn.Module
    encode: Callable[..., Iterable[Tensor]]
    to_vocabulary: ToVocabulary
    gene_index: np.ndarray | None
    size: BatchSize
    precision: str
    options: dict[str, Any]
    labels: SimpleNamespace

    def ready(self) -> Any:
        """The network, where it runs."""
        return on_device_here(self.module)

    def autocast(self) -> torch.autocast:
        """What makes products in the precision asked for."""
        device = self.ready().device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def chunks(self, block: Any, position: np.ndarray, names: np.ndarray) -> Iterator[Tensor]:
        """Counts of a block of the matrix, checked, in vocabulary order, a few cells at a time.

        Parameters
        ----------
        block
            Some rows of the data.
        position
            Which of them each cell is.
        names
            Names of the cells.
        """
        counts = read_rows_of_block(block)[position]
        labels = SimpleNamespace(obs_names=names, **vars(self.labels))
        check_counts(counts, np.arange(len(names)), labels, self.labels.layer)
        counts = select_columns(counts, self.to_vocabulary.column, self.to_vocabulary.n_columns)
        n_pieces = -(-len(names) // self.size.n_cells)
        device = self.ready().device
        for piece in np.array_split(np.arange(len(names)), n_pieces):
            yield csr_tensor(counts[piece[0] : piece[-1] + 1]).to(device)

    def columns(self) -> Tensor | None:
        """``gene_index`` where the network runs."""
        return (
            None if self.gene_index is None else torch.as_tensor(self.gene_index, device=self.ready().device)
        )

    def until_it_fits(self, function: Callable[[], Any]) -> Any:
        """Call a function, and where a GPU runs out of memory, again with fewer cells at a time."""
        while True:
            try:
                with torch.inference_mode(), self.autocast():
                    return function()
            except torch.cuda.OutOfMemoryError as error:
                self.size.halve(error)
            torch.cuda.empty_cache()  # not in the handler, whose traceback still holds the tensors


def on_device_here(module: torch.nn.Module) -> torch.nn.Module:
    """A network that was sent, on the first GPU of this machine if there is one."""
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def embed_unit(worker: Worker, block: Any, position: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Latents ``(cells, width)`` of one unit, by one worker."""

    def embed() -> np.ndarray:
        chunks = worker.chunks(block, position, names)
        model = SimpleNamespace(module=worker.ready())
        latents = worker.encode(model, chunks, worker.columns(), **worker.options)
        return np.concatenate([latent.float().cpu().numpy() for latent in latents])

    return worker.until_it_fits(embed)


def parts_on_cluster(embedding: Any, client: Any, pending: Iterable[int]) -> Iterator[Part]:
    """Embed units on a cluster, as :meth:`~cellprior.model.engine._embedding.Embedding.parts` does here, in any order.

    Parameters
    ----------
    embedding
        With ``worker()``, what is sent to each worker once; and ``submit(client, worker, cells)``, the futures of the
        latents of one unit, with the cells of each.
    client
        Of the cluster.
    pending
        Numbers of the units.

    Raises
    ------
    NotCountsError
        If the data are not raw counts.
    RuntimeError
        If workers die again and again on the same cells.
    ClusterLostError
        If the cluster ends.
    """
    from distributed import KilledWorker, as_completed

    from cellprior.model.engine._sizes import Part

    module = embedding.model.module
    device = module.device
    module.cpu()  # as it is sent
    with connected(client):
        worker = client.scatter(embedding.worker(), broadcast=True)
    module.to(device)
    queue, running, unfinished = deque(pending), as_completed([]), {}
    asked: dict[Any, tuple[int, np.ndarray]] = {}
    while queue or asked:
        with connected(client):
            n_threads = sum(client.nthreads().values())
            while queue and len(asked) < max(IN_FLIGHT * n_threads, 1):
                unit = queue.popleft()
                futures = embedding.submit(client, worker, embedding.units[unit])
                unfinished[unit] = len(futures)
                for future, cells in futures:
                    asked[future] = (unit, cells)
                    running.add(future)
            _await(running, client)
            future = next(running)
        unit, cells = asked.pop(future)
        try:
            with connected(client):
                latent = future.result()
        except KilledWorker as error:
            msg = (
                f"Several workers died one after the other over the same {len(cells)} cells, probably for want of "
                f"memory: give them more, fewer threads each, or a smaller batch_size ({error})."
            )
            raise RuntimeError(msg) from error
        future.release()
        unfinished[unit] -= 1
        embedding.progress(embedding.n_stages * len(cells))
        yield Part(unit, cells, latent, not unfinished[unit])


def await_workers(client: Any) -> None:
    """Wait for a first worker, before anything is asked of the cluster: Dask itself would wait for ever.

    Raises
    ------
    ClusterLostError
        If none comes.
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

    Raises
    ------
    ClusterLostError
        If the client is closed, the scheduler gone, or what was sent to the workers lost with them.
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


class Blocks:
    """Rows of a dask array, to be computed where they are needed."""

    def __init__(self, embedding: Embedding) -> None:
        self.rows, self.obs_names = embedding.rows, embedding.manager.adata.obs_names
        self.x = embedding.manager.get_from_registry("X")

    def submit(self, client: Any, function: Callable[..., Any], worker: Any, cells: np.ndarray) -> Any:
        """``function(worker, block, position, names)`` of some cells, on a worker."""
        import dask

        block, position = block_of(self.x, self.rows[cells])
        names = np.asarray(self.obs_names[self.rows[cells]])
        return client.compute(dask.delayed(function, pure=False)(worker, block, position, names))


def block_of(x: Any, rows: np.ndarray) -> tuple[Any, np.ndarray]:
    """Some rows of a dask array, each once, and which of them each row is."""
    found, position = np.unique(rows, return_inverse=True)
    contiguous = found[-1] - found[0] == len(found) - 1
    return x[int(found[0]) : int(found[-1]) + 1] if contiguous else x[found], position


def refuse_here(x: Any) -> None:
    """Refuse counts that are in this process: a cluster reads a dask array.

    Raises
    ------
    TypeError
        With the way out.
    """
    if not hasattr(x, "dask"):
        msg = (
            f"client= needs counts that the workers can read themselves, a dask array; these are a {type(x).__name__}. "
            "Pass the path of the file, or open it with anndata.experimental.read_lazy(path)."
        )
        raise TypeError(msg)
