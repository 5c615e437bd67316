from __future__ import annotations

import numpy as np
import pytest
import torch

from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.model.multiomeclip._inputs import thinned
from cellprior.model.multiomeclip._loss import infonce_chance, same_label, sigmoid_chance, sigmoid_loss
from cellprior.model.multiomeclip._metrics import depth_scores, latent_metrics, matching_metrics
from cellprior.model.multiomeclip._training import PairedCells, PairedSplitter

from .data import N_CELLS, QUIET, cells, multiome

# a few epochs are not meant to learn anything
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")

SMALL = {"n_hidden": 16, "n_latent": 8, "n_components": (6, 8)}
VIT = {
    "encoder": "vit",
    "n_hidden": 16,
    "n_heads": 2,
    "n_layers": 1,
    "n_mlp": 16,
    "n_latent": 8,
    "n_patches": (6, 8),
}


def train(mdata=None, *, setup=None, epochs=2, seed=0, options=None, **kwargs) -> MultiomeCLIP:
    mdata = cells() if mdata is None else mdata
    torch.manual_seed(seed)
    MultiomeCLIP.setup_mudata(mdata, **(setup or {}))
    model = MultiomeCLIP(mdata, **(SMALL if options is None else options))
    model.train(max_epochs=epochs, **{"batch_size": 64, **QUIET, **kwargs})
    return model


def last(model: MultiomeCLIP, name: str) -> float:
    return float(model.history[name].iloc[-1, 0])


def test_the_history_holds_the_metrics_of_held_out_cells_and_of_the_depth_only_control(trained):
    held_out = trained.validation_indices
    assert len(held_out) == 32 and not set(held_out) & set(trained.train_indices)
    raw = {
        name: torch.from_numpy(trained.get_latent_representation(modality=name, center=False)[held_out])
        for name in ("rna", "atac")
    }
    expected = latent_metrics(raw["rna"], raw["atac"])
    for name, value in expected.items():
        assert last(trained, f"validation_{name}") == pytest.approx(value, abs=1e-4), name
    depth = {
        name: np.asarray(trained.adata.mod[name].X.sum(axis=1)).ravel()[held_out] for name in ("rna", "atac")
    }
    control = matching_metrics(depth_scores(depth["rna"], depth["atac"]))
    assert last(trained, "validation_foscttm_floor_depth_only") == pytest.approx(control["foscttm"])
    for k in (1, 10):
        expected = control[f"recall_at_{k}"]
        assert last(trained, f"validation_recall_at_{k}_depth_only") == pytest.approx(expected)
    assert last(trained, "validation_n_cells") == 32
    assert last(trained, "validation_foscttm") < 0.25
    assert last(trained, "train_loss") < last(trained, "train_loss_floor_chance")


def test_components_know_nothing_of_held_out_cells():
    mdata = cells()
    first = train(mdata, seed=3, epochs=1)
    held_out = first.validation_indices
    changed = cells()
    for adata in changed.mod.values():
        x = adata.X.toarray()
        x[held_out] = np.random.default_rng(0).permutation(x[held_out], axis=1)
        adata.X = x
    second = train(changed, seed=3, epochs=1)
    np.testing.assert_array_equal(second.validation_indices, held_out)
    for name, tensor in first.module.state_dict().items():
        torch.testing.assert_close(second.module.state_dict()[name], tensor, msg=name)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    first, second, other = (train(seed=seed).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["rna.layers.0.weight"], other["rna.layers.0.weight"])


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("options", [SMALL, VIT], ids=["mlp", "vit"])
def test_every_encoder_and_loss_learns(kind, options):
    options = {**options, "loss": kind, "dropout_rate": 0.0}
    model = train(epochs=12, options=options, plan_kwargs={"lr": 3e-3, "warmup": 0.1})
    losses = model.history["train_loss"].iloc[:, 0].astype(float).to_numpy()
    assert losses[-1] < 0.9 * losses[0]
    assert last(model, "validation_foscttm") < 0.35
    assert np.isfinite(model.get_latent_representation()).all()


def test_few_cells_at_a_time_train_the_same_model():
    whole, parts = (
        train(options={**VIT, "dropout_rate": 0.0}, epochs=1, micro_batch_size=size) for size in (None, 13)
    )
    for name, tensor in whole.module.named_parameters():
        if not name.endswith("key.bias"):  # changes nothing in a softmax over keys: its gradient is rounding
            torch.testing.assert_close(
                parts.module.get_parameter(name), tensor, rtol=1e-3, atol=1e-5, msg=name
            )


def test_minibatches_stay_within_a_batch_and_labels_are_masked(monkeypatch):
    seen = []

    def forward(self, inputs, *, same=None, micro_batch_size=None):
        seen.append((len(inputs["rna"]), same))
        return original(self, inputs, same=same, micro_batch_size=micro_batch_size)

    from cellprior.model.multiomeclip._module import MultiomeCLIPModule

    original = MultiomeCLIPModule.forward
    monkeypatch.setattr(MultiomeCLIPModule, "forward", forward)
    mdata = cells()
    mdata.obs["batch"] = np.where(np.arange(N_CELLS) < 30, "few", "many")
    train(mdata, setup={"batch_key": "batch", "labels_key": "type"}, epochs=1, batch_size=500)
    sizes = sorted(size for size, _ in seen)
    assert len(sizes) == 4 and sum(sizes) == N_CELLS  # two batches, to train on and held out
    assert all(
        same is not None and same.diagonal().all() and 0.1 < same.float().mean() < 0.6 for _, same in seen
    )


def test_early_stopping_ends_with_the_best_epoch():
    model = train(epochs=30, early_stopping=True, early_stopping_patience=3, plan_kwargs={"lr": 0.03})
    reached = model.history["validation_foscttm"].iloc[:, 0].astype(float)
    held_out = model.validation_indices
    raw = [
        torch.from_numpy(model.get_latent_representation(modality=name, center=False)[held_out])
        for name in ("rna", "atac")
    ]
    assert latent_metrics(*raw)["foscttm"] == pytest.approx(reached.min(), abs=1e-4)


def test_training_goes_on_and_the_history_with_it():
    model = train()
    components = model.module.rna.components.clone()
    model.train(max_epochs=3, batch_size=64, **QUIET)
    assert len(model.history["train_loss"]) == 5
    assert torch.equal(model.module.rna.components, components)


def test_a_model_no_better_than_depth_is_warned_of():
    mdata = cells()
    rng = np.random.default_rng(0)
    depth = rng.integers(1, 100, N_CELLS)
    for adata in mdata.mod.values():
        adata.X = rng.multinomial(depth, np.full(adata.n_vars, 1 / adata.n_vars)).astype(np.float32)
    with pytest.warns(UserWarning, match="foscttm on held-out cells.*depth only"):
        train(mdata, epochs=1)


def test_all_cells_can_be_trained_on_and_then_none_are_matched():
    model = train(train_size=1.0)
    assert "validation_foscttm" not in model.history and len(model.train_indices) == N_CELLS
    with pytest.raises(ValueError, match="lower train_size"):
        train(train_size=1.0, early_stopping=True)


@pytest.mark.parametrize(("train_size", "of"), [(0.6, "validation_indices"), (0.8, "train_indices")])
def test_the_means_of_the_modalities_are_those_of_held_out_cells_if_there_are_fifty(train_size, of):
    model = train(train_size=train_size)
    assert (len(model.validation_indices) >= 50) == (of == "validation_indices")
    for name in ("rna", "atac"):
        latent = model.get_latent_representation(indices=getattr(model, of), modality=name, center=False)
        np.testing.assert_allclose(model.module.alignment[name].mean, latent.mean(axis=0), atol=1e-5)


def test_chance_is_the_loss_of_one_score_for_all_pairs():
    same = same_label(torch.tensor([0, 0, 1, -1, 2, 2, 2]))
    for mask in (None, same):
        candidates = [s * 0.01 for s in range(-600, 100)]
        best = min(float(sigmoid_loss(torch.full((7, 7), s), same=mask)) for s in candidates)
        assert sigmoid_chance(7, same=mask) == pytest.approx(best, abs=1e-4)
    assert infonce_chance(7) == pytest.approx(np.log(7))
    assert infonce_chance(7, same=same) == pytest.approx(np.log([6, 6, 7, 7, 5, 5, 5]).mean())


def test_complete_cells_are_split_by_share():
    complete = np.ones(100, dtype=bool)
    complete[::4] = False

    def split(**options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        found = PairedSplitter(complete, batch_size=8, rng=rng, train_size=0.8, **options)
        return found.train_idx, found.val_idx, found.test_idx

    first, second, test = split()
    assert len(first) == 60 and len(second) == 15 and not set(first) & set(second) and not len(test)
    assert complete[first].all() and complete[second].all()
    first, second, test = split(validation_size=0.1, shuffle_set_split=False)
    assert first.max() < second.min() and len(second) in (7, 8)
    assert second.max() < test.min() and complete[test].all() and len(test) == 15 - len(second)
    with pytest.raises(ValueError, match="add up to 1"):
        split(validation_size=0.5)


def test_cells_that_are_named_are_trained_on_and_held_out():
    whole = cells()
    mdata = multiome({"rna": whole.mod["rna"], "atac": whole.mod["atac"][:-5].copy()})
    MultiomeCLIP.setup_mudata(mdata)
    model = MultiomeCLIP(mdata, **SMALL)
    complete = np.flatnonzero(model._cells(None).complete)
    assert len(complete) == N_CELLS - 5
    parts = [complete[40:], complete[:30], complete[30:40]]
    model.train(max_epochs=1, datasplitter_kwargs={"external_indexing": parts}, **QUIET)
    for rows, asked in zip(
        (model.train_indices, model.validation_indices, model.test_indices), parts, strict=True
    ):
        np.testing.assert_array_equal(rows, asked)
    seen = [complete[:40], complete[40:]]
    with pytest.warns(UserWarning, match="have been seen in training"):
        model.train(max_epochs=1, datasplitter_kwargs={"external_indexing": seen}, **QUIET)
    lacking = np.flatnonzero(~model._cells(None).complete)
    for wrong, message in (
        ([complete, lacking[:2]], f"2 cells without both modalities, the first is number {lacking[0]}"),
        ([complete, complete[:1]], "1 cells twice"),
        ([complete[:1]], "two at least"),
    ):
        with pytest.raises(ValueError, match=message):
            model.train(max_epochs=1, datasplitter_kwargs={"external_indexing": wrong}, **QUIET)


def test_patches_follow_the_genome_unless_told_otherwise():
    mdata = cells()
    MultiomeCLIP.setup_mudata(mdata)
    ordered, as_it_is = (MultiomeCLIP(mdata, genomic_order=on, **VIT) for on in (True, False))
    names = [ordered.peaks[i].replace(":", "-").split("-") for i in ordered.module.atac.order]
    places = [(int(c.removeprefix("chr")), int(s)) for c, s, _ in names]
    assert places == sorted(places)
    assert as_it_is.module.atac.order.tolist() == list(range(240))
    assert ordered.module.rna.order.tolist() == list(range(60))


def test_training_cells_are_thinned_anew_each_time_and_held_out_cells_never(trained):
    rows = np.arange(20)
    counts = trained._cells().counts
    data = PairedCells(counts, trained.module, rows, None, to_thin=rows[:10], thin_to=0.5)
    for name in ("rna", "atac"):
        seen = [data[[0, 1, 2]][name] for _ in range(2)]
        assert seen[0].shape == seen[1].shape
        assert not torch.equal(*seen)
        assert torch.equal(data[[12, 13]][name], data[[12, 13]][name])
        whole = PairedCells(counts, trained.module, rows, None)
        torch.testing.assert_close(data[[12, 13]][name], whole[[12, 13]][name])
        depth = -1  # the last input
        assert (seen[0][:, depth] <= whole[[0, 1, 2]][name][:, depth] + 1e-5).all()


def test_a_thinned_cell_keeps_the_share_that_is_asked_for_and_its_zeros():
    counts = cells().mod["rna"].X
    found = thinned(counts, 0.5, np.random.default_rng(0))
    share = np.asarray(found.sum(axis=1) / counts.sum(axis=1)).ravel()
    assert 0.35 < share.min() < share.max() <= 1.0 and abs(share.mean() - 0.75) < 0.03
    assert (found > counts).nnz == 0 and (found.data > 0).all()
    assert counts.sum() == cells().mod["rna"].X.sum()


@pytest.mark.parametrize("thin_to", [0, -0.5, 1.5])
def test_a_share_of_counts_that_is_none_is_refused(mdata, thin_to):
    MultiomeCLIP.setup_mudata(mdata)
    model = MultiomeCLIP(mdata, n_hidden=8, n_latent=4, n_components=(4, 4))
    with pytest.raises(ValueError, match=f"thin_to={thin_to}; a share of the counts above 0 is needed"):
        model.train(max_epochs=1, thin_to=thin_to, **QUIET)
