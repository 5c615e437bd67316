"""Batch sizes: what is chosen, and what a GPU that runs out of memory changes. There is no GPU: errors are raised."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

from cellprior.model import CellPLM, ScBERT
from cellprior.model._base import PretrainedModel
from cellprior.model.engine._encoder import Encoder
from cellprior.model.engine._sizes import MAX_CHUNK, MIN_CHUNK, BatchSize, fitting
from tests.contract.models import blood_cells, tiny_scbert

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture
def adata() -> AnnData:
    return blood_cells()[:150].copy()


@pytest.fixture(params=["CellPLM", "CellPLM, two batches", "ScBERT"])
def model(request: pytest.FixtureRequest, adata: AnnData) -> PretrainedModel:
    if request.param == "ScBERT":
        return ScBERT.from_pretrained(tiny_scbert(), adata)
    CellPLM.setup_anndata(adata, batch_key="batch" if "two" in request.param else None)
    return CellPLM.from_pretrained("cellplm-starter", adata)


def small_memory(model: PretrainedModel, monkeypatch: pytest.MonkeyPatch, n_cells: int) -> list[int]:
    """Let the network fail above a number of cells as CUDA does; gives the sizes that are tried."""
    tried: list[int] = []

    def out_of_memory(module: Any, inputs: tuple) -> None:
        tried.append(len(inputs[0]))
        if tried[-1] > n_cells:
            msg = "CUDA out of memory. Tried to allocate 2.00 GiB."
            raise torch.cuda.OutOfMemoryError(msg)

    if isinstance(model, CellPLM):
        model.module.embedder.register_forward_pre_hook(out_of_memory)
    else:
        pool = model.module.pool
        monkeypatch.setattr(
            model.module, "pool", lambda x, **how: out_of_memory(None, (x,)) or pool(x, **how)
        )
    return tried


def test_where_memory_runs_out_fewer_cells_at_a_time_give_the_same_with_one_warning(model, monkeypatch):
    expected = model.get_latent_representation()
    tried = small_memory(model, monkeypatch, 40)
    with pytest.warns(
        UserWarning, match="ran out of memory with 128 cells at a time; going on with 64"
    ) as said:
        latent = model.get_latent_representation(batch_size=128)
    assert len([warning for warning in said if "memory" in str(warning.message)]) == 1
    np.testing.assert_allclose(latent, expected, **CLOSE)
    assert max(tried) > 40 > tried[-1] > 20  # no smaller than it must be


def test_a_batch_size_that_fits_warns_of_nothing(model, monkeypatch):
    small_memory(model, monkeypatch, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.get_latent_representation(batch_size=32)


def test_when_not_even_a_handful_fits_the_error_says_what_to_do(model, monkeypatch):
    small_memory(model, monkeypatch, 0)
    with (
        pytest.warns(UserWarning, match="ran out of memory"),
        pytest.raises(RuntimeError, match=r'does not hold 16 cells at a time.*device="cpu".*hidden='),
    ):
        model.get_latent_representation(batch_size=64)


def test_what_is_added_up_over_cells_is_not_added_twice_when_memory_runs_out(adata, monkeypatch):
    model = ScBERT.from_pretrained(tiny_scbert(), adata)
    expected = model.get_gene_representation(indices=range(20))
    tokens, calls = model.module.tokens, []

    def fails_once(counts: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(len(counts))
        if len(calls) == 2:
            msg = "CUDA out of memory."
            raise torch.cuda.OutOfMemoryError(msg)
        return tokens(counts, **options)

    monkeypatch.setattr(model.module, "tokens", fails_once)
    monkeypatch.setattr(model, "default_batch_size", 16)
    monkeypatch.setattr(Encoder, "units", lambda self, n_cells, batch, size: [np.arange(n_cells)])
    monkeypatch.setattr("cellprior.model.engine._sizes.MIN_CHUNK", 8)
    with pytest.warns(UserWarning, match="ran out of memory"):
        found = model.get_gene_representation(indices=range(20))
    assert calls[:2] == [10, 10]
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_the_batch_size_is_that_of_the_models_choice_on_a_cpu_and_of_the_free_memory_on_a_gpu(monkeypatch):
    cost = Encoder(SimpleNamespace(n_hidden=1024, n_latent=512)).cell_bytes(19_374)
    cpu, cuda = (
        {"device": torch.device(name), "cell_bytes": cost, "default": 1024} for name in ("cpu", "cuda")
    )
    assert BatchSize(None, **cpu).n_cells == 1024
    for free, expected in ((80 * 2**30, MAX_CHUNK), (8 * 2**30, 4096), (2**30, 512), (2**20, MIN_CHUNK)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * 2**30))
        assert BatchSize(None, **cuda).n_cells == expected
        assert BatchSize(100, **cuda).n_cells == 100


def test_what_fits_is_a_quarter_of_the_memory_or_up_to_half_less():
    for n_bytes in np.random.default_rng(0).integers(2**28, 2**34, 50):
        n_cells = fitting(int(n_bytes), 16 * 20_000 + 64 * 1024)
        used = n_cells * (16 * 20_000 + 64 * 1024)
        assert n_bytes / 8 <= used <= n_bytes / 4 or n_cells == MAX_CHUNK


@pytest.mark.parametrize(("cells", "columns", "shape"), [(1, None, "(1, 16)"), (None, 4, "(150, 4)")])
def test_a_network_that_does_not_give_a_row_per_cell_is_refused(adata, monkeypatch, cells, columns, shape):
    model = ScBERT.from_pretrained(tiny_scbert(), adata)
    pool = model.module.pool
    monkeypatch.setattr(model.module, "pool", lambda *args, **how: pool(*args, **how)[:cells, :columns])
    said = f"ScBERTModule and its ScBERTEncoder give numbers of shape {shape} for 150 cells, instead of (150, 16)"
    with pytest.raises(ValueError, match=re.escape(said)):
        model.get_latent_representation(batch_size=150)
