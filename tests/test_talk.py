from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import pytest

import cellprior as cp
from cellprior._talk import bar, tell
from cellprior.cli import main
from tests.contract.models import blood_cells

STARTER = "cellplm-starter"
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning", "ignore:The model has neither")
QUICK = {"accelerator": "cpu", "max_epochs": 1}


@pytest.fixture
def model() -> cp.model.CellPLM:
    adata = blood_cells()[:60].copy()
    adata.obs["half"] = ["one", "other"] * 30
    cp.model.CellPLM.setup_anndata(adata)
    return cp.model.CellPLM(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on the screen: of a bar, its last state."""
    shown = capsys.readouterr()
    assert shown.out == ""
    return [line.rpartition("\r")[2] for line in shown.err.split("\n") if line.strip()]


def test_a_training_says_its_size_before_and_how_it_ended_after_and_nothing_else(model, capsys):
    model.train(**QUICK)
    before, after = said(capsys)
    n = sum(p.numel() for p in model.module.parameters())
    assert before == f"CellPLM: {n:,} parameters. 54 cells to learn from, 6 held out. 1 epoch at most."
    assert re.fullmatch(r"Trained for 1 epoch\. validation_loss: \d+\.?\d*\.", after)


def test_what_is_not_trained_and_which_epoch_is_kept_are_said(model, capsys):
    model.train(**QUICK)
    said(capsys)
    model.fine_tune("half", accelerator="cpu", max_epochs=30, patience=1, trainable="head")
    before, after = said(capsys)
    assert re.match(
        r"CellPLM: [\d,]+ parameters, of which [\d,]+ are trained\. 43 cells to learn from", before
    )
    assert re.match(
        r"Stopped after \d+ of 30 epochs, as it no longer got better\. annotation_validation_loss", after
    )
    assert re.search(r"Kept: the weights of epoch \d+, the best on held-out cells\.$", after)


@pytest.mark.parametrize("verbosity", [0, 1, 2])
def test_lightning_speaks_when_it_is_asked_to(model, caplog, monkeypatch, verbosity):
    cp.settings.verbosity = verbosity
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)  # as Lightning has it
    model.train(**QUICK)
    assert ("GPU available" in caplog.text) == (verbosity == 2)


def test_a_level_that_a_user_has_given_lightnings_log_is_kept(model, caplog, monkeypatch):
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.DEBUG, logger="lightning.pytorch"):
        model.train(**QUICK)
        assert logger.level == logging.DEBUG
    assert "GPU available" in caplog.text


def test_filters_of_warnings_are_as_they_were_after_a_training(model):
    before = list(warnings.filters)
    model.train(**QUICK)
    assert warnings.filters == before


def test_bars_of_embedding_and_training_count_cells_with_their_speed(model, capsys):
    cp.settings.progress = True
    model.train(**QUICK)
    model.get_latent_representation()
    speed = r" of 60 cells \[\d\d:\d\d<\d\d:\d\d, +[\d.]+k? cells/s"
    bars = [line for line in said(capsys) if "%|" in line]
    assert re.match(r"epoch 1: 100%.*54 of 54 cells .* cells/s", bars[0])
    assert re.match(r"embedding: 100%.*60" + speed, bars[1])


def test_bars_are_not_drawn_where_nobody_wants_them(model, capsys):
    cp.settings.verbosity = 0
    model.train(**QUICK)
    model.get_latent_representation()
    cp.settings.verbosity, cp.settings.progress = 1, True
    model.train(**QUICK, enable_progress_bar=False)
    assert not any("%|" in line for line in said(capsys))


def test_a_call_without_bars_has_none_of_the_embeddings_that_it_makes_either(capsys):
    cp.settings.progress = True
    adata = blood_cells()[:80].copy()
    adata.obs["half"] = ["one", "other"] * 40
    for progress, n_bars in ((False, 0), (None, 3)):
        cp.evaluate.linear_probe(adata, STARTER, labels_key="half", seeds=2, progress=progress)
        assert sum("%|" in line for line in said(capsys)) == n_bars, progress


def test_a_step_within_a_step_is_silent(capsys):
    with bar(2, "outer", progress=True) as outer:
        with bar(2, "inner", progress=True) as inner:
            inner.update(2)
        tell("a line of the inner step")
        outer.update(2)
    tell("a line after it")
    lines = said(capsys)
    assert len(lines) == 2
    assert lines[0].startswith("outer: 100%")
    assert lines[1] == "a line after it"


@pytest.mark.parametrize("options", [["-q"], ["--quiet"], ["-q", "--no-progress"]])
def test_a_quiet_command_says_nothing_when_all_is_well(tmp_path: Path, capsys, options):
    blood_cells()[:30].copy().write_h5ad(tmp_path / "in.h5ad")
    command = ["embed", str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad"), "--weights", STARTER]
    assert main([*command, *options]) == 0
    assert said(capsys) == []
    assert (cp.settings.verbosity, cp.settings.progress) == (1, True)  # of the command alone
