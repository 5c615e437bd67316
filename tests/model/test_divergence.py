"""A loss that is no longer finite, a training that is broken off, and which cells stay held out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from scvi.train import SaveCheckpoint

from cellprior.model import CellPLM, DivergedError, MultiomeCLIP
from cellprior.model.learning._finite import not_finite
from cellprior.model.learning._fit import KeepBest
from cellprior.model.learning._holdout import noted, recalled
from cellprior.model.multiomeclip._training import align
from tests.model.multiomeclip.data import cells

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")


@pytest.fixture
def adata() -> ad.AnnData:
    """Three types, each with genes of its own."""
    rng = np.random.default_rng(0)
    kind = np.arange(90) % 3
    rate = 1.0 + 4.0 * (np.arange(30) % 3 == kind[:, None])
    names = [f"cell {i}" for i in range(90)]
    obs = pd.DataFrame({"label": np.array(["B", "NK", "T"])[kind]}, index=names)
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(30)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)


def new(adata: ad.AnnData) -> CellPLM:
    scvi.settings.seed = None  # as it is unless someone sets it
    torch.manual_seed(0)
    CellPLM.setup_anndata(adata, labels_key="label")
    return CellPLM(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4)


def new_clip() -> MultiomeCLIP:
    torch.manual_seed(0)
    mdata = cells()
    MultiomeCLIP.setup_mudata(mdata)
    return MultiomeCLIP(mdata, n_hidden=16, n_latent=8, n_components=(6, 8))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


class Spoil(pl.Callback):
    """Makes all weights a number at the end of an epoch, and notes those of each epoch before."""

    def __init__(self, epoch: int, value: float = torch.nan) -> None:
        self.epoch, self.value, self.seen = epoch, value, []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = [(name, p) for name, p in pl_module.module.named_parameters() if p.requires_grad]
        self.seen.append({name: p.clone() for name, p in trained})
        if trainer.current_epoch == self.epoch:
            for _, parameter in trained:
                parameter.fill_(self.value)


class BreakOff(pl.Callback):
    """Ctrl-C, as scvi-tools and Lightning pass it on."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise SystemExit(1)


# divergence


def test_training_that_diverges_ends_with_the_last_weights_that_had_a_finite_loss(adata):
    model = new(adata)
    spoil = Spoil(2)
    with pytest.raises(
        DivergedError, match=r"in epoch 4, with the learning rate 0\.02: .*\{\"lr\": 0\.002\}"
    ):
        model.train(max_epochs=9, batch_size=25, plan_kwargs={"lr": 0.02}, callbacks=[spoil], **QUIET)
    assert not_finite(model.module) is None
    assert (
        len(model.history["train_loss"]) == 3
        and np.isfinite(model.history["train_loss"].to_numpy(float)).all()
    )
    # what it had at the start of the epoch in which it was spoilt, which is the end of the one before
    after = tensors(model)
    assert all(torch.equal(after[name], x) for name, x in spoil.seen[1].items())
    assert np.isfinite(model.get_latent_representation()).all()
    model.train(max_epochs=1, **QUIET)
    assert len(model.history["train_loss"]) == 4


def test_a_rate_that_is_far_too_high_is_named_and_nothing_not_finite_is_left(adata):
    for train in ("train", "fine_tune"):
        model = new(adata)
        model.train(max_epochs=1, **QUIET)
        options = {"plan_kwargs": {"lr": 1e30}} if train == "train" else {"lr": 1e30, "trainable": "all"}
        with pytest.raises(DivergedError, match=r"1e\+30"):
            getattr(model, train)(max_epochs=3, **options, **QUIET)
        assert np.isfinite(model.get_latent_representation()).all()
        with pytest.raises(RuntimeError, match="no labels to give"):
            model.predict()


def test_a_loss_of_held_out_cells_that_is_not_finite_ends_the_training(adata, monkeypatch):
    model = new(adata)
    original = type(model.module).training_losses

    def losses(self: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = original(self, *args, **kwargs)
        return found if self.training else {**found, "loss": found["loss"] * torch.nan}

    monkeypatch.setattr(type(model.module), "training_losses", losses)
    with pytest.raises(DivergedError, match="The loss of held-out cells was nan in epoch 1"):
        model.train(max_epochs=2, **QUIET)


def test_weights_that_are_not_finite_neither_embed_nor_predict_nor_are_saved(adata, tmp_path):
    model = new(adata)
    model.fine_tune(trainable="all", max_epochs=1, **QUIET)
    with torch.no_grad():
        next(model.module.parameters()).view(-1)[0] = torch.inf
    for use in (
        model.get_latent_representation,
        model.predict,
        lambda: model.save(tmp_path / "saved"),
        lambda: model.save_pretrained(tmp_path / "bundle"),
    ):
        with pytest.raises(DivergedError, match="not finite"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_an_epoch_with_nan_is_not_written(adata, tmp_path):
    model = new(adata)
    callbacks = [Spoil(0), SaveCheckpoint(dirpath=str(tmp_path))]
    with pytest.raises(DivergedError):
        model.train(max_epochs=5, callbacks=callbacks, enable_checkpointing=True, **QUIET)
    for folder in tmp_path.iterdir():
        assert not_finite(CellPLM.load(str(folder), adata=adata).module) is None


def test_what_both_modalities_learn_ends_with_weights_that_can_be_used():
    model = new_clip()
    with pytest.raises(DivergedError, match="learning rate 0.01"):
        model.train(max_epochs=9, batch_size=64, plan_kwargs={"lr": 0.01}, callbacks=[Spoil(2)], **QUIET)
    assert np.isfinite(model.get_latent_representation()).all()
    model = new_clip()
    with pytest.raises(DivergedError, match=r"1e\+30"):
        model.pretrain_atac(max_epochs=3, plan_kwargs={"lr": 1e30}, **QUIET)
    assert not_finite(model.module) is None


# the best epoch


def test_weights_that_end_badly_are_replaced_by_those_of_the_best_epoch(adata):
    model, spoil = new(adata), Spoil(5, 0.0)
    model.fine_tune(trainable="all", max_epochs=6, lr=1e-2, callbacks=[spoil], **QUIET)
    f1, loss = (
        model.history[f"annotation_validation_{name}"].iloc[:, 0].astype(float).to_numpy()
        for name in ("macro_f1", "loss")
    )
    best = max(range(len(f1)), key=lambda epoch: (f1[epoch], -loss[epoch]))
    assert all(torch.equal(tensors(model)[name], x) for name, x in spoil.seen[best].items())
    clip, spoil = new_clip(), Spoil(5, 0.0)
    clip.train(max_epochs=6, batch_size=64, early_stopping=True, callbacks=[spoil], **QUIET)
    best = int(clip.history["validation_foscttm"].iloc[:, 0].astype(float).argmin())
    assert all(torch.equal(tensors(clip)[name], x) for name, x in spoil.seen[best].items())


@pytest.mark.parametrize(("loss", "kept"), [("loss", 2), (None, 1)])
def test_of_equal_epochs_that_with_the_lower_loss_is_kept_or_else_the_first(loss, kept):
    plan, best = SimpleNamespace(module=torch.nn.Linear(1, 1)), KeepBest("f1", "max", loss)
    trainer = SimpleNamespace(sanity_checking=False)
    epochs = [(0.5, 0.1), (0.9, 0.3), (0.9, 0.2), (0.9, 0.2), (0.8, 0.0), (torch.nan, 0.0)]
    for epoch, (f1, value) in enumerate(epochs):
        torch.nn.init.constant_(plan.module.weight, epoch)
        trainer.current_epoch = epoch
        trainer.callback_metrics = {"f1": torch.tensor(f1), "loss": torch.tensor(value)}
        best.on_validation_end(trainer, plan)
    best.on_train_end(trainer, plan)
    assert plan.module.weight.item() == kept


# broken off


def test_weights_and_alignment_of_a_training_that_is_broken_off_belong_together():
    model = new_clip()
    model.train(max_epochs=2, batch_size=64, **QUIET)
    with pytest.raises(SystemExit):
        model.train(max_epochs=6, batch_size=64, plan_kwargs={"lr": 0.01}, callbacks=[BreakOff()], **QUIET)
    found = {name: x.clone() for name, x in model.module.state_dict().items() if name.startswith("alignment")}
    align(model, model._cells(), model.train_indices, model.validation_indices)
    for name, x in found.items():
        torch.testing.assert_close(model.module.state_dict()[name], x)
    assert len(model.history["train_loss"]) == 3  # the first epoch of the second run is in it


# which cells are held out


@pytest.mark.parametrize("way", ["at once", "save", "save_pretrained"])
def test_cells_that_were_held_out_stay_so(adata, tmp_path, way):
    model = new(adata)
    model.train(max_epochs=1, **QUIET)
    model.fine_tune(max_epochs=1, **QUIET)
    first = {
        part: set(adata.obs_names[rows])
        for part, rows in recalled(model.split_["train"], adata.obs_names).items()
    }
    taught = recalled(model.split_["fine_tune"], adata.obs_names)["calibration"]
    assert len(first["validation"]) == 9 and len(taught) == 14
    calibration = set(adata.obs_names[taught])
    if way != "at once":
        getattr(model, way)(tmp_path / "model")
        shuffled = adata[np.random.default_rng(1).permutation(90)].copy()
        load = CellPLM.load if way == "save" else CellPLM.from_pretrained
        model = load(tmp_path / "model", adata=shuffled)
    model.train(max_epochs=1, **QUIET)
    assert set(model.adata.obs_names[model.validation_indices]) == first["validation"]
    assert set(model.adata.obs_names[model.train_indices]) == first["train"]
    model.fine_tune("label", max_epochs=1, **QUIET)
    rows = recalled(model.split_["fine_tune"], model.adata.obs_names)["calibration"]
    assert set(model.adata.obs_names[rows]) == calibration
    assert not set(model.adata.obs_names[model.train_indices]) & calibration


def test_held_out_cells_that_have_been_seen_are_told(adata, tmp_path):
    model = new(adata)
    model.train(max_epochs=1, **QUIET)
    seen = model.train_indices
    with pytest.warns(UserWarning, match="other cells are held out") as said:
        model.train(max_epochs=1, train_size=0.5, **QUIET)
    n_seen = len(np.intersect1d(model.validation_indices, seen))
    assert f"{n_seen} of these 45 have been seen in training" in str(said[0].message)
    model.save_pretrained(tmp_path / "bundle")
    other = CellPLM.from_pretrained(tmp_path / "bundle", adata[:60].copy())
    with pytest.warns(
        UserWarning, match=r"trained before, on 90 cells, which by their names are not these 60"
    ):
        other.train(max_epochs=1, **QUIET)


def test_pairs_that_were_held_out_stay_so():
    model = new_clip()
    model.train(max_epochs=1, batch_size=64, train_size=0.8, **QUIET)
    held_out = model.validation_indices
    model.train(max_epochs=1, batch_size=64, **QUIET)
    np.testing.assert_array_equal(model.validation_indices, held_out)
    assert len(held_out) == 32


def test_a_split_is_known_again_whatever_the_order_of_the_cells():
    rng = np.random.default_rng(0)
    names = pd.Index([f"c{i}" for i in rng.permutation(1001)])
    parts = {"train": np.arange(0, 1001, 2), "validation": np.arange(1, 1001, 4)}
    state = noted(names, parts)
    order = rng.permutation(1001)
    again = recalled(state, names[order])
    for part, rows in parts.items():
        assert set(names[order][again[part]]) == set(names[rows])
    assert recalled(state, names[:-1]) is None
    assert recalled(state, names.str.replace("c7", "d7")) is None
