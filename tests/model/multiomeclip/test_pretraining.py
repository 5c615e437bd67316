from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from matplotlib.figure import Figure
from mudata import MuData

from cellprior import pl
from cellprior.genes import PeakMatchError
from cellprior.model.data._counts import csr_tensor
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.model.multiomeclip._module import MLPEncoder
from cellprior.model.multiomeclip._peaks import MaskedPeaks, Popularity, draw_closed, hide
from cellprior.model.multiomeclip._training import ContrastivePlan

from .data import N_CELLS, N_PEAKS, QUIET, cells, multiome, part

# a few epochs are not meant to learn anything
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")

SMALL = {"n_hidden": 32, "n_latent": 16, "n_components": (6, 20), "dropout_rate": 0.2}
FAST = {"plan_kwargs": {"lr": 0.01}, "batch_size": 64, **QUIET}


def untrained(mdata: MuData | None = None, *, seed: int = 0, **options) -> MultiomeCLIP:
    mdata = cells() if mdata is None else mdata
    torch.manual_seed(seed)
    MultiomeCLIP.setup_mudata(mdata)
    return MultiomeCLIP(mdata, **{**SMALL, **options})


def pretrained(mdata: MuData | None = None, *, seed: int = 0, epochs: int = 3, **kwargs) -> MultiomeCLIP:
    model = untrained(mdata, seed=seed)
    model.pretrain_atac(max_epochs=epochs, **{**FAST, **kwargs})
    return model


def atac_of(n_cells: int, seed: int) -> AnnData:
    return cells(n_cells, seed=seed).mod["atac"]


def last(model: MultiomeCLIP, name: str) -> float:
    return float(model.history[name].iloc[-1, 0])


def tensors(model: MultiomeCLIP) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


@pytest.fixture
def counts() -> sp.csr_matrix:
    x = sp.csr_matrix(np.random.default_rng(0).poisson(0.4, (300, 50)).astype(np.float32))
    x.data[:5] = 0  # stored, and closed
    return x


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# what is hidden, and what it is told from


def test_hidden_peaks_are_a_share_of_the_open_ones_and_none_of_them_is_seen(counts):
    visible, row, peak = hide(csr_tensor(counts), 0.3, generator())
    seen, hidden = visible.to_dense().numpy(), np.zeros(counts.shape)
    hidden[row, peak] = 1
    assert set(np.unique(seen)) == {0, 1} and hidden.sum() == len(row)
    np.testing.assert_array_equal(seen + hidden, counts.toarray() > 0)
    assert hidden.sum() / (counts.toarray() > 0).sum() == pytest.approx(0.3, abs=0.02)


def test_the_encoder_reads_a_cell_as_if_it_lacked_the_hidden_peaks(counts):
    torch.manual_seed(0)
    encoder = MLPEncoder(50, 4, is_atac=True, n_components=6, n_hidden=8, n_layers=1, dropout_rate=0.0)
    encoder.fit(counts, seed=0)
    masked = MaskedPeaks(encoder, 4, np.asarray((counts > 0).sum(axis=0)).ravel(), mask_share=0.5)
    visible, row, peak = hide(csr_tensor(counts), 0.5, generator())
    without = counts.toarray()
    without[row, peak] = 0
    # of a bag without half of its peaks, twice as much
    place = 2 * (encoder.inputs(torch.from_numpy(without)) * encoder.spread + encoder.mean) - encoder.mean
    torch.testing.assert_close(
        masked.cell_vectors(visible), encoder(place / encoder.spread), rtol=1e-4, atol=1e-5
    )


def test_closed_peaks_are_drawn_by_popularity_one_for_each_that_is_hidden_and_never_an_open_one(counts):
    open_cells = np.asarray((counts > 0).sum(axis=0)).ravel()
    measured = np.arange(50) % 7 > 0
    popularity = Popularity(open_cells, 300, measured)
    row = torch.arange(300).repeat_interleave(200)
    found, peak = draw_closed(csr_tensor(counts), row, popularity, generator())
    torch.testing.assert_close(found, row)
    assert (counts.toarray()[found, peak] == 0).all() and measured[peak].all()
    weight = (counts.toarray() == 0) * np.where(measured, open_cells + 1, 0)
    expected = (weight / weight.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(np.bincount(peak, minlength=50) / len(row), expected, atol=3e-3)


def test_a_cell_that_is_open_everywhere_has_no_closed_peak_and_an_empty_one_nothing_to_hide():
    x = np.zeros((3, 20), dtype=np.float32)
    x[0], x[1, :10] = 1, 1
    counts = csr_tensor(sp.csr_matrix(x))
    popularity = Popularity(x.sum(axis=0), 3, np.ones(20, dtype=bool))
    _, row, _ = hide(counts, 0.5, generator())
    found, peak = draw_closed(counts, row, popularity, generator())
    assert set(row.tolist()) == {0, 1} and set(found.tolist()) == {1} and (peak >= 10).all()
    nothing = csr_tensor(sp.csr_matrix((2, 20), dtype=np.float32))
    visible, row, peak = hide(nothing, 0.5, generator())
    assert len(row) == 0 and len(draw_closed(nothing, row, popularity, generator())[0]) == 0
    encoder = MLPEncoder(20, 2, is_atac=True, n_components=2, n_hidden=4, n_layers=1, dropout_rate=0.0)
    masked = MaskedPeaks(encoder, 2, x.sum(axis=0), mask_share=0.5)
    batch, measured = {"X": nothing}, torch.ones(1, 20, dtype=torch.bool)
    losses = masked.training_losses(batch, floor=popularity, measured=measured, rng_seed=0)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_floor_of_popularity_is_the_odds_of_hidden_to_closed_peaks():
    is_open = np.random.default_rng(1).random((300, 50)) < np.linspace(0.1, 0.8, 50)
    popularity = Popularity(is_open.sum(axis=0), 300, np.ones(50, dtype=bool))
    counts = csr_tensor(sp.csr_matrix(is_open, dtype=np.float32))
    hidden, closed = np.zeros(50), np.zeros(50)
    for seed in range(60):
        _, row, peak = hide(counts, 0.5, generator(seed))
        hidden += np.bincount(peak, minlength=50)
        closed += np.bincount(draw_closed(counts, row, popularity, generator(seed))[1], minlength=50)
    np.testing.assert_allclose(popularity.log_odds, np.log(hidden / closed), atol=0.15)
    assert np.ptp(popularity.log_odds.numpy()) > 1


# pretraining


def test_structure_is_learned_and_the_loss_of_held_out_cells_ends_below_that_of_popularity(mdata):
    model = untrained(mdata)
    model.pretrain_atac(atac_of(600, 3), max_epochs=15, train_size=0.8, **FAST)
    assert list(model.history) and not any(name.startswith("train_loss") for name in model.history)
    for stage in ("train", "validation"):
        reached, popularity, chance = (
            last(model, f"{stage}_pretrain_loss{floor}")
            for floor in ("", "_floor_popularity", "_floor_chance")
        )
        assert chance == pytest.approx(math.log(2)) and popularity < chance + 1e-3
        assert reached < popularity - 0.1
    axes = pl.training(model, loss="pretrain_loss", ax=Figure().subplots())
    labels = [line.get_label() for line in axes.get_lines()]
    assert "held-out cells, floor: popularity" in labels and "held-out cells, floor: chance" in labels


@pytest.mark.filterwarnings("default:After training:UserWarning")
def test_nothing_is_learned_where_peaks_are_shuffled_among_cells_and_a_warning_says_so(mdata):
    atac = atac_of(600, 3)
    x, rng = atac.X.toarray(), np.random.default_rng(0)
    atac.X = np.stack([rng.permutation(x[:, i]) for i in range(x.shape[1])], axis=1)
    model = untrained(mdata)
    with pytest.warns(UserWarning, match="loss on held-out cells.*popularity"):
        model.pretrain_atac(atac, max_epochs=15, train_size=0.8, **FAST)
    assert last(model, "validation_pretrain_loss") > last(model, "validation_pretrain_loss_floor_popularity")


def test_only_the_encoder_of_atac_is_trained():
    model = untrained()
    before = tensors(model)
    model.pretrain_atac(max_epochs=2, **FAST)
    changed = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if name.startswith("atac.")} == changed


def test_pretraining_starts_from_the_components_of_its_training_cells_and_from_the_loss_of_popularity():
    model = pretrained(epochs=1, plan_kwargs={"lr": 0.0})
    rows = model.train_indices
    assert len(rows) == 144 and not set(rows) & set(model.validation_indices)
    expected = untrained().module.atac
    expected.fit(sp.csr_matrix(cells().mod["atac"].X[rows]), seed=0)
    np.testing.assert_array_equal(model.module.atac.idf, expected.idf)
    np.testing.assert_allclose(
        np.linalg.svd(model.module.atac.components.T @ expected.components)[1][:3], np.ones(3), atol=1e-3
    )
    for stage in ("train", "validation"):
        floor = last(model, f"{stage}_pretrain_loss_floor_popularity")
        assert last(model, f"{stage}_pretrain_loss") == pytest.approx(floor, abs=1e-6)


def test_the_same_seed_gives_the_same_pretrained_weights_and_another_one_others():
    first, second, other = (tensors(pretrained(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["atac.components"], other["atac.components"])


def test_pretraining_goes_on_and_the_history_with_it():
    model = pretrained(epochs=2)
    start = model.module.atac.components.clone()
    model.pretrain_atac(max_epochs=3, **{**FAST, "plan_kwargs": {"lr": 1e-5}})
    assert len(model.history["train_pretrain_loss"]) == 5
    torch.testing.assert_close(model.module.atac.components, start, atol=2e-4, rtol=0)


def test_cells_without_rna_are_learned_from(mdata):
    rna = part(mdata, "rna", np.arange(50))
    model = pretrained(multiome({"rna": rna, "atac": mdata.mod["atac"]}), train_size=0.9)
    assert len(model.train_indices) + len(model.validation_indices) == N_CELLS


def test_peaks_of_other_data_are_matched_and_those_that_they_lack_are_left_alone(mdata):
    model = untrained(mdata)
    lacking = np.arange(N_PEAKS) % 5 == 0
    atac = atac_of(200, 4)[:, ~lacking].copy()
    moved = [name.removeprefix("chr").replace(":", "-").split("-") for name in atac.var_names]
    atac.var_names = [f"{c}-{int(s) + 60}-{int(e) + 40}" for c, s, e in moved]
    model.pretrain_atac(atac, max_epochs=3, **FAST)
    components = model.module.atac.components
    size = components.abs().amax(dim=1)
    is_open = np.asarray(atac.X[model.train_indices].sum(axis=0)).ravel() > 0
    assert size[lacking].max() < 1e-5 and size[~lacking][is_open].min() > 1e-3
    with pytest.raises(PeakMatchError):
        other = atac_of(50, 4)
        other.var_names = [f"chr17:{i}-{i + 5}" for i in range(0, 2400, 10)]
        untrained().pretrain_atac(other, **FAST)


# and then


def test_a_paired_model_starts_from_the_pretrained_encoder():
    model = pretrained()
    start = tensors(model)
    assert not start["rna.components"].any()
    still = {"plan_kwargs": {"lr": 0.0}, "batch_size": 64, **QUIET}
    model.train(max_epochs=1, **still)
    after = tensors(model)
    assert all(torch.equal(after[name], start[name]) for name in start if name.startswith("atac."))
    assert after["rna.components"].any() and model.training_state_ == {}
    model.train(max_epochs=8, **FAST)
    assert torch.equal(model.module.atac.components, start["atac.components"])
    assert not torch.equal(model.module.atac.layers[0].weight, start["atac.layers.0.weight"])
    assert last(model, "validation_foscttm") < 0.35
    assert len(model.history["train_pretrain_loss"]) == 3 and len(model.history["train_loss"]) == 9
    assert np.isfinite(model.get_latent_representation()).all()


def test_what_was_pretrained_is_kept_if_training_fails():
    model = pretrained()
    components = model.module.atac.components.clone()
    with pytest.raises(RuntimeError, match="out of memory"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContrastivePlan, "training_step", out_of_memory)
        model.train(max_epochs=1, batch_size=64, **QUIET)
    model.train(max_epochs=1, batch_size=64, **QUIET)
    assert torch.equal(model.module.atac.components, components)


def out_of_memory(*args: object) -> None:
    msg = "out of memory"
    raise RuntimeError(msg)


@pytest.mark.parametrize("how", ["save", "bundle"])
def test_a_pretrained_model_is_saved_and_trained_later_as_if_it_had_not_been(tmp_path, how):
    model = pretrained()
    expected = model.get_atac_representation()
    if how == "save":
        model.save(str(tmp_path / "model"))
        again = MultiomeCLIP.load(str(tmp_path / "model"), cells())
    else:
        model.save_pretrained(tmp_path / "model")
        again = MultiomeCLIP.from_pretrained(tmp_path / "model", cells(), device="cpu")
    np.testing.assert_array_equal(again.get_atac_representation(), expected)
    with pytest.raises(RuntimeError, match="train"):
        again.get_latent_representation()
    found = []
    for each in (model, again):
        torch.manual_seed(5)
        each.train(max_epochs=2, batch_size=64, **QUIET)
        found.append(each.get_latent_representation())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_without_pretraining_the_representation_of_atac_is_that_of_its_components(trained, mdata):
    atac = mdata.mod["atac"]
    with torch.no_grad():
        expected = trained.module.atac.places(csr_tensor(sp.csr_matrix(atac.X)))
    for size in (7, None):
        found = trained.get_atac_representation(atac, batch_size=size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        trained.get_atac_representation(indices=[3, 3, 0]), expected[[3, 3, 0]], rtol=1e-4, atol=1e-5
    )


def test_what_cannot_be_pretrained_is_refused_with_what_to_do(trained, mdata):
    with pytest.raises(ValueError, match=r"comes before train\(\)"):
        trained.pretrain_atac()
    with pytest.raises(ValueError, match='encoder="mlp"'):
        untrained(encoder="vit", n_hidden=16, n_heads=2, n_layers=1, n_mlp=16).pretrain_atac()
    model = untrained(mdata)
    for share in (0, 1, 1.5):
        with pytest.raises(ValueError, match=f"mask_share={share}; a share"):
            model.pretrain_atac(mask_share=share)
    with pytest.raises(ValueError, match="1 cells have ATAC.*two at least"):
        model.pretrain_atac(part(mdata, "atac", np.array([3])))
    with pytest.raises(ValueError, match="0 cells have ATAC"):
        model.pretrain_atac(mdata.mod["rna"])
    with pytest.raises(RuntimeError, match="train"):
        model.get_atac_representation()
    with pytest.raises(ValueError, match="5 of 160 cells lack ATAC, the first 'cell155'"):
        trained.get_atac_representation(
            multiome({"rna": mdata.mod["rna"], "atac": part(mdata, "atac", np.arange(155))})
        )
