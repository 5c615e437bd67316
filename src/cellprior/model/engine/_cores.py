"""Work on several cores: several items at a time, each on one core.

A product that is divided between cores ends when the last of them does. Where other programs run on some of these, as
on a shared node or in a container with a quota, each small product waits for a core that is busy elsewhere. Items that
have a core each do not wait for each other; and their numbers do not depend on how many cores there are.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from cellprior.settings import settings

MOST = 16  # cores by default: each item in work takes memory
Item = TypeVar("Item")
Result = TypeVar("Result")

_here = threading.local()


def on_cores(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """A function of each item, in their order; on a CPU and without gradients, several at a time.

    Items are taken as they are needed, a few ahead. What is computed of one does not use more than one core. The
    function may not change what another call reads.
    """
    if device.type != "cpu" or torch.is_grad_enabled() or getattr(_here, "is_worker", False):
        yield from map(function, items)
        return
    n_cores = n_cores_used()
    if n_cores == 1:
        for item in items:
            with one_thread():
                result = function(item)
            yield result
        return
    state = _State()
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(_pool(n_cores).submit(state.run, function, item))
            if len(pending) > n_cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def n_cores_used() -> int:
    """``settings.n_jobs``; by default the cores that PyTorch and the system allow, :data:`MOST` at most."""
    return settings.n_jobs or min(torch.get_num_threads(), n_cores_allowed(), MOST)


def n_cores_allowed() -> int:
    """Cores that this process may use: those it is bound to, or fewer where a container has a quota of time."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13
        n_cores = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        n_cores = len(os.sched_getaffinity(0))
    else:
        n_cores = os.cpu_count() or 1
    return max(1, min(n_cores, _quota(Path("/sys/fs/cgroup"))))


@cache
def _quota(folder: Path) -> int:
    """Cores of time that a container has, rounded up; without a limit, more than any machine has."""
    try:
        if (folder / "cpu.max").exists():
            time, period = (folder / "cpu.max").read_text().split()
        else:
            time, period = (
                (folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        share = int(time) / int(period)  # "max", or -1, is no limit
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 20
    return -int(-share // 1) if share > 0 else 1 << 20


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one core, in this thread, for a while."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _State:
    """How PyTorch computes in the thread that asks, for the threads that do."""

    def __init__(self) -> None:
        self.is_inference = torch.is_inference_mode_enabled()
        self.is_autocast = torch.is_autocast_enabled("cpu")
        self.dtype = torch.get_autocast_dtype("cpu")

    def run(self, function: Callable[[Item], Result], item: Item) -> Result:
        with (
            torch.inference_mode(self.is_inference),
            torch.no_grad(),
            torch.autocast("cpu", self.dtype, enabled=self.is_autocast),
        ):
            return function(item)


@cache
def _pool(n_cores: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each, the same for all who ask."""
    before = torch.get_num_threads()
    ready = threading.Barrier(n_cores + 1)
    pool = ThreadPoolExecutor(
        n_cores, thread_name_prefix="cellprior", initializer=_become_worker, initargs=(ready,)
    )
    for _ in range(n_cores):
        pool.submit(_nothing)
    ready.wait()
    torch.set_num_threads(before)  # what the threads have set is what a new thread of anybody begins with
    return pool


def _become_worker(ready: threading.Barrier) -> None:
    _here.is_worker = True
    torch.get_num_threads()  # at first use, PyTorch gives a thread what was set last by anybody: let that be over
    torch.set_num_threads(1)
    ready.wait()


def _nothing() -> None:
    pass


if hasattr(os, "register_at_fork"):  # a child has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
