"""Hidden states of the cells of a sentence: in memory, or in files, where a sentence may be larger than memory."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellprior._outputs import write_file
from cellprior.model.engine._cores import on_cores

BLOCK_BYTES = 64 * 2**20  # of hidden states in one piece of memory


def _nothing(n_cells: int) -> None:
    pass


class HiddenStates:
    """Hidden states of one sentence by chunk, ``(cells, n_hidden)`` each, in memory.

    They come from the embedder, and each layer and the last norm replace them, chunk by chunk: so many times they
    have been replaced is their *stage*, -1 as long as some are missing. Where there are no gradients, they are parts
    of large blocks that are overwritten: the system gets large blocks back as soon as they are free, where small ones
    leave holes. ``step`` is told the number of cells whenever a chunk has been written.
    """

    def __init__(self, *, step: Callable[[int], None] = _nothing) -> None:
        self.step = step
        self.stage = -1
        self._chunks: list[Tensor] = []

    @classmethod
    def of(cls, chunks: Iterable[Tensor]) -> HiddenStates:
        """Hidden states that are there already, as they are."""
        states = cls()
        states._chunks, states.stage = list(chunks), 0
        return states

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, i: int) -> Tensor:
        return self._chunks[i]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def sizes(self) -> list[int]:
        """Cells of each chunk."""
        return [len(chunk) for chunk in self._chunks]

    def fill(self, chunks: Iterable[Tensor]) -> None:
        """Take the embedder's output."""
        block, used = torch.empty(0, 0), 0
        for chunk in chunks:
            kept = chunk
            if not torch.is_grad_enabled():
                if used + len(chunk) > len(block):
                    n_rows = max(BLOCK_BYTES // (4 * chunk.shape[1]), len(chunk))
                    block, used = chunk.new_empty(n_rows, chunk.shape[1]), 0
                kept = block[used : used + len(chunk)].copy_(chunk)
                used += len(chunk)
            self._chunks.append(kept)
            self.step(len(chunk))
        self.stage = 0

    def replace(self, function: Callable[[int, Tensor], Tensor]) -> None:
        """Replace every chunk by a function of its number and itself."""
        numbers = range(len(self._chunks))
        device = self._chunks[0].device if self._chunks else torch.device("cpu")
        for i, replaced in zip(numbers, self._replaced(function, numbers, device), strict=True):
            chunk = self._chunks[i]
            if torch.is_grad_enabled():
                self._chunks[i] = replaced
            else:
                chunk.copy_(replaced)
            self.step(len(chunk))
        self.stage += 1

    def _replaced(
        self, function: Callable[[int, Tensor], Tensor], numbers: Sequence[int], device: torch.device
    ) -> Iterator[Tensor]:
        """What takes the place of chunks."""
        return on_cores(lambda i: function(i, self[i]), numbers, device)

    def sums(self, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What the cells of this stage know of each other, numbers and tensors, before any is replaced."""
        return compute()

    def release(self) -> Iterator[Tensor]:
        """Give the chunks, and hold none that has been given."""
        while self._chunks:
            yield self._chunks.pop(0)


class StoredStates(HiddenStates):
    """Hidden states in files, one per chunk, of which one or two are in memory at a time.

    Each file is named by chunk and stage, and written whole or not at all, so that a run that was killed goes on with
    the next chunk. The sums of a stage are kept until its chunks have all been replaced: once the first was, they
    cannot be taken again. The ``folder`` is of this sentence alone: what another cut into chunks has left there is
    removed. ``step`` is told at once what is there already.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[int],
        width: int,
        *,
        device: torch.device,
        step: Callable[[int], None] = _nothing,
    ) -> None:
        super().__init__(step=step)
        self.folder, self.width, self.device = folder, width, device
        self._sizes = list(sizes)
        self._stages = self._found()
        for size, stage in zip(self._sizes, self._stages, strict=True):
            step(size * (stage + 1))
        self._update()

    def _found(self) -> list[int]:
        """Stage of each chunk, -1 where there is none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = " ".join(map(str, self._sizes)).encode()
        if (path := self.folder / "sizes").exists() and path.read_bytes() != plan:
            for file in self.folder.iterdir():
                file.unlink()
        write_file(path, plan)
        stages = [-1] * len(self._sizes)
        for file in sorted(self.folder.glob("chunk*")):
            if (match := re.fullmatch(r"chunk(\d+)\.(\d+)", file.name)) is None:
                continue  # was being written
            i, stage = int(match[1]), int(match[2])
            if stages[i] >= 0:  # killed between the next file and the removal of the last
                self._file(i, min(stage, stages[i])).unlink()
            stages[i] = max(stage, stages[i])
        return stages

    def _file(self, i: int, stage: int) -> Path:
        return self.folder / f"chunk{i:06d}.{stage}"

    def _update(self) -> None:
        self.stage = min(self._stages, default=0)

    @property
    def n_filled(self) -> int:
        """Chunks that the embedder need not make again, the first ones."""
        return self._stages.index(-1) if self.stage < 0 else len(self)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, i: int) -> Tensor:
        values = np.fromfile(self._file(i, self._stages[i]), dtype=np.float32)
        return torch.from_numpy(values.reshape(self._sizes[i], self.width)).to(self.device)

    @property
    def sizes(self) -> list[int]:
        """Cells of each chunk."""
        return self._sizes

    def fill(self, chunks: Iterable[Tensor]) -> None:
        """Take the embedder's output for the chunks from ``n_filled`` on."""
        for i, chunk in enumerate(chunks, start=self.n_filled):
            self._write(i, 0, chunk)
        self._update()

    def replace(self, function: Callable[[int, Tensor], Tensor]) -> None:
        """Replace every chunk that has not been replaced before the run was cut short."""
        stage = self.stage
        numbers = [i for i in range(len(self)) if self._stages[i] == stage]
        for i, replaced in zip(numbers, self._replaced(function, numbers, self.device), strict=True):
            self._write(i, stage + 1, replaced)
        self._update()
        self._sums(stage).unlink(missing_ok=True)

    def _write(self, i: int, stage: int, chunk: Tensor) -> None:
        write_file(self._file(i, stage), chunk.float().cpu().numpy().tobytes())
        if stage:
            self._file(i, stage - 1).unlink()
        self._stages[i] = stage
        self.step(len(chunk))

    def _sums(self, stage: int) -> Path:
        return self.folder / f"sums.{stage}"

    def sums(self, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What the cells of this stage know of each other; from the file, if the run was cut short after it."""
        path = self._sums(self.stage)
        if path.exists():
            return torch.load(path, map_location=self.device, weights_only=True)
        found = tuple(compute())
        buffer = io.BytesIO()
        torch.save(found, buffer)
        write_file(path, buffer.getbuffer())
        return found

    def release(self) -> Iterator[Tensor]:
        """Give the chunks."""
        yield from self
