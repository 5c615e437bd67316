"""Cells are embedded on several cores, and nobody sees it in the numbers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import cellprior as cp
from cellprior.model.engine import _cores
from cellprior.model.engine._cores import n_cores_allowed, on_cores
from tests.contract.models import PRETRAINED

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:No assay is named:UserWarning")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cp.settings.n_jobs = None


@pytest.mark.parametrize("entry", PRETRAINED, ids=lambda entry: entry.name)
def test_the_embedding_is_the_same_to_the_last_bit_on_any_number_of_cores(entry):
    adata = entry.make_data()[:300].copy()
    model = entry.attach(adata)
    found = []
    for n_jobs, threads in ((1, 1), (1, 4), (2, 1), (5, 3)):
        cp.settings.n_jobs = n_jobs
        torch.set_num_threads(threads)
        found.append(model.get_latent_representation(batch_size=64))
        assert torch.get_num_threads() == threads
    for latent in found[1:]:
        np.testing.assert_array_equal(latent, found[0])
    model.release()


def test_items_are_worked_on_at_the_same_time_on_one_core_each_and_come_in_their_order():
    cp.settings.n_jobs = 3
    together = threading.Barrier(3, timeout=60)  # none goes on before three have begun
    taken = []

    def items():
        for i in range(9):
            taken.append(i)
            yield i

    def work(i: int) -> tuple[int, int, bool]:
        together.wait()
        return i, torch.get_num_threads(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        results = on_cores(work, items(), CPU)
        assert next(results) == (0, 1, True)
        assert len(taken) <= 5  # a few ahead
        assert list(results) == [(i, 1, True) for i in range(1, 9)]


def test_with_gradients_or_inside_of_an_item_nothing_is_divided():
    cp.settings.n_jobs = 2
    here = threading.current_thread()
    assert set(on_cores(lambda _: threading.current_thread(), range(4), CPU)) == {here}

    def nested(_: int) -> bool:
        return set(on_cores(lambda _: threading.current_thread(), range(3), CPU)) == {
            threading.current_thread()
        }

    with torch.no_grad():
        assert all(on_cores(nested, range(4), CPU))


def test_an_error_in_an_item_is_raised_and_the_next_call_works():
    cp.settings.n_jobs = 2
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            list(on_cores(lambda i: 1 // i, [1, 0, 2, 3, 4, 5], CPU))
        assert list(on_cores(lambda i: i + 1, [1, 2, 3], CPU)) == [2, 3, 4]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, 1 << 20),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 1 << 20),
        ({}, 1 << 20),
    ],
)
def test_the_quota_of_a_container_is_known(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _cores._quota(tmp_path) == expected
    assert n_cores_allowed() >= 1


def test_n_jobs_that_is_no_number_of_cores_is_refused(monkeypatch):
    for wrong in (0, -1, "many"):
        with pytest.raises(ValueError, match="from 1 on is needed"):
            cp.settings.n_jobs = wrong
    monkeypatch.setenv("CELLPRIOR_N_JOBS", "3")
    assert cp.settings.n_jobs == 3
