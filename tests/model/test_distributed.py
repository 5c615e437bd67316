"""Two processes that train together: the same model in both, and losses over the cells of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scvi
import torch

from cellprior.model import CellPLM
from cellprior.model.data import _minibatches as _data
from cellprior.model.data._minibatches import SentenceSampler
from tests.contract.models import blood_cells
from tests.model import ddp_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found; see ``ddp_script.py``."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch cannot let processes on a CPU talk to each other")
    folder = tmp_path_factory.mktemp("ddp")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-W", "ignore", ddp_script.__file__, str(folder)]
    run = subprocess.run(
        script, env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


MODELS = ["cellplm", "cellplm, fine-tuned", "scbert", "multiomeclip"]


@pytest.mark.parametrize("name", MODELS)
def test_both_processes_end_with_the_same_model(processes, name):
    first, second = (process["models"][name]["tensors"] for process in processes)
    assert [process["n_ranks"] for process in processes] == [2, 2]
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_two_processes_falls(processes, name):
    history = processes[0]["models"][name]["history"]
    stem = "annotation_" if "tuned" in name else ""
    for stage in ("train", "validation"):
        losses = history[f"{stem}{stage}_loss"]
        assert np.isfinite(losses).all()
        assert losses[-1] < 0.95 * losses[0]


def test_held_out_cells_of_both_processes_are_matched_together(processes):
    history = processes[0]["models"]["multiomeclip"]["history"]
    assert history["validation_n_cells"][-1] == 30  # a tenth of 300


@pytest.mark.parametrize("name", ["scbert", "scbert, micro-batches", "infonce", "sigmoid"])
def test_a_contrast_has_the_loss_and_the_gradient_of_all_cells_in_one_process(processes, name):
    expected = ddp_script.contrasts(np.arange(ddp_script.N_CELLS))[name]
    assert len(expected) > 20
    for process in processes:
        found = process["contrasts"][name]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_cells_of_one_process_alone_would_have_another_loss():
    share = ddp_script.shares(2)[0]
    for name, expected in ddp_script.contrasts(np.arange(ddp_script.N_CELLS)).items():
        loss = "loss" if "loss" in expected else "contrastive"
        alone = ddp_script.contrasts(share)[name][loss]
        assert abs(float((alone - expected[loss]).detach())) > 1e-3


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_each_process_has_its_own_cells_of_the_same_groups(monkeypatch, shuffle, n_ranks):
    rows, group = np.arange(100, 171), np.repeat([0, 1, 2], [40, 30, 1])
    of_rank = []
    for rank in range(n_ranks):
        monkeypatch.setattr(_data, "rank_and_count", lambda rank=rank: (rank, n_ranks))
        monkeypatch.setattr(_data, "from_first", lambda number: 7)
        sampler = SentenceSampler(rows, group, 8, shuffle)
        of_rank.append(list(sampler))
        assert len(of_rank[-1]) == len(sampler)
    for together in zip(*of_rank, strict=True):
        sizes = [len(own) for own in together]
        assert 1 <= min(sizes) <= max(sizes) <= 8
        assert max(sizes) - min(sizes) <= 1
        groups = {int(group[row - 100]) for own in together for row in own}
        assert len(groups) == 1
        if groups != {2}:  # of which there is one cell, and all processes get it
            assert len({row for own in together for row in own}) == sum(sizes)
    assert {row for own in of_rank for rows in own for row in rows} == set(rows.tolist())


def test_processes_that_begin_anew_without_a_seed_are_refused(monkeypatch):
    adata = blood_cells()[:50].copy()
    CellPLM.setup_anndata(adata)
    model = CellPLM(adata, n_hidden=16, n_layers=1, n_heads=2)
    monkeypatch.setattr(scvi.settings, "_seed", None)
    with pytest.raises(RuntimeError, match="strategy='ddp' .*set scvi.settings.seed"):
        model.train(max_epochs=1, strategy="ddp", devices=2)
