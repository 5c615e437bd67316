"""Hidden states in memory and in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cellprior.model.cellplm._hidden import HiddenStates, StoredStates

SIZES, WIDTH = [3, 1, 2], 4


@pytest.fixture
def chunks() -> list[Tensor]:
    return list(torch.randn(sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(0)).split(SIZES))


def stored(folder: Path, sizes: list[int] = SIZES) -> StoredStates:
    return StoredStates(folder, sizes, WIDTH, device=torch.device("cpu"))


def killed(i: int, chunk: Tensor) -> Tensor:
    """Twice the chunk, and nothing after the first."""
    if i:
        raise KeyboardInterrupt
    return 2 * chunk


@pytest.mark.parametrize("where", ["memory", "files"])
def test_chunks_are_kept_replaced_and_given_back(tmp_path, chunks, where):
    steps: list[int] = []
    states = HiddenStates() if where == "memory" else stored(tmp_path)
    states.step = steps.append
    assert states.stage == -1
    with torch.inference_mode():
        states.fill(iter(chunks))
        for stage in (0, 1):
            assert states.stage == stage
            states.replace(lambda i, h: h + i)
    assert (len(states), states.sizes, states.stage) == (3, SIZES, 2)
    for i, (found, chunk) in enumerate(zip(states.release(), chunks, strict=True)):
        torch.testing.assert_close(found, chunk + 2 * i)
    assert steps == 3 * SIZES


def test_in_memory_a_gradient_goes_through(chunks):
    chunks = [chunk.requires_grad_() for chunk in chunks]
    states = HiddenStates()
    states.fill(chunks)
    states.replace(lambda i, h: h.square())
    sum(h.sum() for h in states).backward()
    for chunk in chunks:
        torch.testing.assert_close(chunk.grad, 2 * chunk.detach())


def test_in_files_a_stage_goes_on_with_the_sums_from_before_it_began(tmp_path, chunks):
    states = stored(tmp_path)
    states.fill(iter(chunks[:1]))
    assert (states.stage, states.n_filled) == (-1, 1)
    states = stored(tmp_path)
    states.fill(iter(chunks[states.n_filled :]))
    (total, n_cells) = states.sums(lambda: (torch.cat(list(states)).sum(0), 6))
    with pytest.raises(KeyboardInterrupt):
        states.replace(killed)
    states = stored(tmp_path)
    assert (states.stage, states.n_filled) == (0, 3)
    again, n_again = states.sums(lambda: pytest.fail("they cannot be taken again"))
    assert torch.equal(again, total)
    assert n_again == n_cells
    states.replace(lambda i, h: 2 * h)
    assert states.stage == 1
    for found, chunk in zip(states, chunks, strict=True):
        assert torch.equal(found, 2 * chunk)
    assert states.sums(lambda: ("new",)) == ("new",)


def test_of_two_files_of_a_chunk_the_later_is_read(tmp_path, chunks):
    states = stored(tmp_path)
    states.fill(iter(chunks))
    before = (tmp_path / "chunk000000.0").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        states.replace(killed)
    (tmp_path / "chunk000000.0").write_bytes(before)  # killed before it was removed
    (tmp_path / "chunk000001.1.part").write_bytes(b"half of it")  # killed while it was written
    states = stored(tmp_path)
    assert torch.equal(states[0], 2 * chunks[0])
    assert torch.equal(states[1], chunks[1])
    assert not (tmp_path / "chunk000000.0").exists()


def test_what_another_cut_has_left_is_removed(tmp_path, chunks):
    stored(tmp_path).fill(iter(chunks))
    states = stored(tmp_path, [2, 4])
    assert (states.stage, states.n_filled) == (-1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["sizes"]


def test_files_that_are_there_count_as_progress(tmp_path, chunks):
    states = stored(tmp_path)
    states.fill(iter(chunks))
    states.replace(lambda i, h: h)
    steps: list[int] = []
    StoredStates(tmp_path, SIZES, WIDTH, device=torch.device("cpu"), step=steps.append)
    assert sum(steps) == 2 * sum(SIZES)
