from __future__ import annotations

import json
import warnings
from pathlib import Path

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from scipy.spatial.distance import mahalanobis
from sklearn.metrics import f1_score

from cellprior.model import CellPLM
from cellprior.model.learning._annotation import limits_for, name_cells, scores_of
from cellprior.model.learning._annotation_plan import (
    NO_CLASS,
    SPREAD_PRIOR,
    AnnotationHead,
    annotation_loss,
    macro_f1,
    split_cells,
)
from cellprior.model.learning._rejection import (
    Calibration,
    cells_needed,
    explain_unknown,
    find_limits,
    limits_of,
    smallest_reject,
)
from cellprior.weights import WeightsError

N_GENES = 40
NETWORK = {"n_hidden": 32, "n_layers": 2, "n_heads": 2, "n_latent": 8, "dropout_rate": 0.1}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
QUICK = {"max_epochs": 3, "batch_size": 64, **QUIET}
TYPES = ("B", "NK", "T", "novel")


def make_cells(
    n_cells: int, *, seed: int = 0, types: tuple[str, ...] = TYPES[:3], depth: float = 1.0
) -> AnnData:
    """Types that differ in a third of their genes, in two batches; the last twentieth is not labelled.

    At a small depth they overlap.
    """
    rate = np.random.default_rng(0).gamma(1.0, 1.0, size=(len(TYPES), N_GENES))
    rate *= np.where(np.random.default_rng(1).random((len(TYPES), N_GENES)) < 0.3, 6.0, 1.0)
    rng = np.random.default_rng(seed)
    kind = rng.choice(types, n_cells)
    counts = rng.poisson(depth * rate[[TYPES.index(name) for name in kind]]).astype(np.float32)
    label = np.where(np.arange(n_cells) < 0.95 * n_cells, kind, "unknown")
    obs = pd.DataFrame(
        {"kind": kind, "label": label, "batch": rng.choice(["a", "b"], n_cells)},
        index=[f"cell {i}" for i in range(n_cells)],
    )
    return AnnData(
        sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)])
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    adata = make_cells(10)
    CellPLM.setup_anndata(adata)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CellPLM(adata, **NETWORK).save_pretrained(folder)
    return folder


@pytest.fixture
def adata() -> AnnData:
    return make_cells(120)


def attach(weights: Path, adata: AnnData, seed: int = 0) -> CellPLM:
    scvi.settings.seed = seed
    CellPLM.setup_anndata(adata, batch_key="batch", labels_key="label")
    return CellPLM.from_pretrained(weights, adata)


@pytest.fixture(scope="module")
def fine_tuned(weights: Path) -> CellPLM:
    """Learned three types from 600 cells; tests leave it as it is."""
    model = attach(weights, make_cells(600))
    model.fine_tune(trainable="all", max_epochs=25, lr=3e-3, batch_size=128, calibration_size=0.3, **QUIET)
    return model


def tensors(model: CellPLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# naming cells


def test_new_cells_get_the_names_of_the_types_they_are(fine_tuned):
    query = make_cells(300, seed=1)
    names = fine_tuned.predict(query)
    assert set(names) <= {"B", "NK", "T"}
    assert np.mean(names == query.obs["kind"]) > 0.9


def test_probabilities_are_a_frame_with_cells_and_labels_by_name(fine_tuned):
    query = make_cells(50, seed=1)
    rows = [7, 3, 49]
    soft = fine_tuned.predict(query, rows, soft=True)
    assert soft.index.tolist() == ["cell 7", "cell 3", "cell 49"]
    assert soft.columns.tolist() == ["B", "NK", "T"]
    np.testing.assert_allclose(soft.sum(axis=1), 1.0)
    assert soft.idxmax(axis=1).tolist() == fine_tuned.predict(query, rows).tolist()
    assert fine_tuned.predict(query, []).shape == (0,)


def test_names_do_not_depend_on_the_batch_size(fine_tuned):
    soft = [fine_tuned.predict(soft=True, batch_size=size) for size in (7, 1000)]
    pd.testing.assert_frame_equal(*soft, rtol=1e-4, atol=1e-5)


def test_cells_are_named_and_embedded_without_dropout_whatever_mode_the_network_is_in(fine_tuned):
    expected = fine_tuned.predict(soft=True), fine_tuned.get_latent_representation()
    fine_tuned.module.train()
    pd.testing.assert_frame_equal(fine_tuned.predict(soft=True), expected[0])
    fine_tuned.module.train()
    np.testing.assert_array_equal(fine_tuned.get_latent_representation(), expected[1])


def test_a_query_may_hold_labels_that_training_never_saw(fine_tuned):
    query = make_cells(40, seed=1)
    query.obs["label"] = "of another atlas"
    assert set(fine_tuned.predict(query)) <= {"B", "NK", "T"}


def test_labels_may_be_another_column_and_numbers(weights, adata):
    adata.obs["cluster"] = pd.factorize(adata.obs["kind"])[0]
    model = attach(weights, adata)
    model.fine_tune("cluster", trainable="head", **QUICK)
    assert set(model.predict()) <= {"0", "1", "2"}


# what training changes

NORM = {"pre_latent_norm.weight", "pre_latent_norm.bias"}


@pytest.mark.parametrize("trainable", ["head", "last", "all", "lora"])
def test_training_changes_what_it_says_and_nothing_else(weights, adata, trainable):
    model = attach(weights, adata)
    before = tensors(model)
    model.fine_tune(trainable=trainable, **QUICK)
    after = tensors(model)
    encoder = {name for name in before if name.startswith("encoder.")}
    attention = {f"encoder.{i}.attention.{name}.weight" for i in (0, 1) for name in ("query", "value")}
    embedder = {name for name in before if name.startswith("embedder.")}
    expected = {
        "head": set(),
        "last": {name for name in encoder if name.startswith("encoder.1.")} | NORM,
        "all": embedder | encoder | NORM,
        "lora": attention | NORM,
    }
    assert changed(before, after) == expected[trainable]
    assert {name for name in after if name not in before} == {
        f"annotation.{name}"
        for name in (
            "latent.weight",
            "latent.bias",
            "linear.weight",
            "linear.bias",
            "shift",
            "scale",
            "center",
            "whitening",
            "spread",
        )
    }
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    assert not model.module.training
    if trainable == "lora":
        for name in attention:
            assert np.linalg.matrix_rank((after[name] - before[name]).numpy(), tol=1e-6) <= 8


class DropoutWatch(pl.Callback):
    """Which dropouts are on while a minibatch is trained on."""

    def __init__(self) -> None:
        self.on: list[set[str]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, plan: pl.LightningModule, *_: object) -> None:
        modules = plan.module.named_modules()
        self.on.append({name for name, m in modules if isinstance(m, torch.nn.Dropout) and m.training})


def test_dropout_is_on_in_the_parts_that_train_only(weights, adata):
    watch = DropoutWatch()
    attach(weights, adata).fine_tune(trainable="last", callbacks=[watch], **QUICK)
    last = {f"encoder.1.{name}" for name in ("attention.dropout", "dropout", "ff.2", "ff.4")}
    assert len(watch.on) >= 3  # the second and third epoch follow a validation
    assert all(on == last | {"annotation.dropout"} for on in watch.on)


def test_a_network_whose_hidden_state_cannot_be_made_an_embedding_is_refused(weights, adata, monkeypatch):
    model = attach(weights, adata)
    monkeypatch.delattr(type(model.module), "latent_of")
    with pytest.raises(NotImplementedError, match=r"CellPLM cannot call .* its module has no latent_of"):
        model.fine_tune(max_epochs=1)


def test_the_embedding_stays_as_it_was_when_only_the_head_is_trained(weights, adata):
    model = attach(weights, adata)
    before = model.get_latent_representation()
    model.fine_tune(trainable="head", **QUICK)
    np.testing.assert_array_equal(model.get_latent_representation(), before)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(weights, adata):
    runs = []
    for seed in (0, 0, 1):
        model = attach(weights, adata, seed)
        model.fine_tune(**QUICK)
        runs.append(tensors(model))
    assert not changed(runs[0], runs[1])
    assert changed(runs[0], runs[2])


@pytest.mark.parametrize("transductive", [False, True])
def test_unlabelled_cells_are_in_training_sentences_only_if_asked_for(weights, transductive):
    runs = []
    for factor in (1, 5):
        adata = make_cells(120)
        unlabelled = (adata.obs["label"] == "unknown").to_numpy()
        adata.X = sp.csr_matrix(adata.X.toarray() * np.where(unlabelled, factor, 1)[:, None])
        model = attach(weights, adata)
        model.fine_tune(transductive=transductive, **QUICK)
        runs.append(tensors(model))
    assert bool(changed(*runs)) == transductive


def test_the_epoch_with_the_best_macro_f1_is_kept(weights, adata):
    adata = make_cells(200)
    # labels that nothing can be learned of: the score goes up and down
    adata.obs["label"] = np.random.default_rng(0).permutation(adata.obs["label"])
    model = attach(weights, adata)
    model.fine_tune(trainable="all", max_epochs=8, lr=1e-2, batch_size=1000, validation_size=0.3, **QUIET)
    rows = model.validation_indices
    score = f1_score(adata.obs["label"].iloc[rows], model.predict(indices=rows), average="macro")
    history = model.history["annotation_validation_macro_f1"].iloc[:, 0].astype(float)
    assert history.iloc[-1] < history.max() - 0.02  # the last epoch would be found out
    assert score == pytest.approx(history.max())


def test_training_stops_when_macro_f1_no_longer_rises(weights, adata):
    model = attach(weights, adata)
    model.fine_tune(trainable="head", lr=1e-9, max_epochs=50, patience=2, **QUIET)
    assert len(model.history["annotation_validation_macro_f1"]) < 10


def test_self_supervised_training_goes_on_after_fine_tuning(weights, adata):
    model = attach(weights, adata)
    model.fine_tune(**QUICK)
    with pytest.warns(UserWarning, match="no better than what is known without looking at cells"):
        model.train(max_epochs=1, **QUIET)
    assert "train_loss" in model.history
    assert set(model.predict()) <= {"B", "NK", "T"}


@pytest.mark.filterwarnings(
    "ignore:Category .* in adata.obs:UserWarning"
)  # a sentence of one cell is the point
def test_a_training_sentence_may_be_one_cell(weights, adata):
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) == 0, "alone", adata.obs["batch"])
    model = attach(weights, adata)
    model.fine_tune(trainable="all", validation_size=0, calibration_size=0, **QUICK)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(model).values())
    assert "annotation_validation_loss" not in model.history


def test_a_batch_without_labelled_cells_is_trained_on_neither_alone_nor_as_context(weights, adata):
    adata.obs["batch"] = np.where(adata.obs["label"] == "unknown", "new", adata.obs["batch"])
    for transductive in (False, True):
        model = attach(weights, adata)
        model.fine_tune(transductive=transductive, **QUICK)
        assert np.isfinite(model.history["annotation_train_loss"].astype(float)).all(axis=None)
        new = (adata.obs["batch"] == "new").to_numpy()
        assert set(model.predict(indices=new)) <= {"B", "NK", "T"}


def test_one_labelled_cell_of_a_batch_is_a_sentence_with_or_without_context(weights, adata):
    adata.obs["batch"] = np.where(adata.obs["label"] == "unknown", "new", adata.obs["batch"])
    adata.obs.iloc[-1, adata.obs.columns.get_loc("label")] = "B"
    for transductive in (False, True):
        model = attach(weights, adata)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Category .* in adata.obs", category=UserWarning)
            model.fine_tune(transductive=transductive, validation_size=0, calibration_size=0, **QUICK)
        assert all(torch.isfinite(tensor).all() for tensor in tensors(model).values())
        assert adata.n_obs - 1 in model.train_indices


# the pieces


def test_a_rare_class_weighs_more_and_cells_without_a_class_nothing():
    logits, weights = torch.randn(5, 3, generator=torch.manual_seed(0)), torch.tensor([1.0, 4.0, 2.0])
    target = torch.tensor([0, 1, NO_CLASS, 2, NO_CLASS])
    surprise = -logits.log_softmax(1)
    expected = (surprise[0, 0] + 4 * surprise[1, 1] + 2 * surprise[3, 2]) / 7
    assert annotation_loss(logits, target, weights).item() == pytest.approx(expected.item())
    assert annotation_loss(logits, torch.full((5,), NO_CLASS), weights).item() == 0.0


def test_the_head_sees_hidden_states_of_mean_0_and_mean_deviation_1_over_cells():
    rng = np.random.default_rng(0)
    hidden = (rng.normal(0, [1, 2, 3, 6], (500, 4)) + [100, -50, 0, 7]).astype(np.float32)
    head = AnnotationHead(4, 2, 3)
    head.standardise(hidden)
    seen = (torch.from_numpy(hidden) - head.shift) / head.scale
    np.testing.assert_allclose(seen.mean(dim=0), 0, atol=1e-5)
    assert seen.std(dim=0, correction=0).mean().item() == pytest.approx(1)


def test_macro_f1_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=60)
    named = np.where(rng.random(60) < 0.6, truth, rng.integers(4, size=60))
    assert macro_f1(truth, named) == pytest.approx(f1_score(truth, named, average="macro", labels=[0, 1, 2]))


def test_held_out_cells_are_by_class_for_validation_and_no_cell_has_two_uses():
    code = np.repeat([0, 1, 2, NO_CLASS, 3], [500, 40, 3, 7, 2])
    split = split_cells(code, validation_size=0.1, calibration_size=0.2, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(np.concatenate(split)), np.flatnonzero(code != NO_CLASS))
    train, validation, calibration = (np.bincount(code[rows], minlength=4) for rows in split)
    assert validation.tolist() == [50, 4, 1, 0]
    assert (train > 0).all()
    assert calibration[3] == 0
    assert abs(calibration.sum() - 109) <= 2


# saying "unknown"


def test_a_fixed_share_of_known_cells_is_rejected_and_errors_keep_the_promise():
    rng = np.random.default_rng(0)
    reject, rejected, errors, far = 0.1, [], [], []
    for _ in range(200):
        novelty, confidence = rng.gamma(5.0, 1.0, 2400), 1 - 0.7 * rng.random(2400) ** 2
        correct = rng.random(2400) < confidence  # wrong in 23 % of all cells
        limits = find_limits(novelty[:400], confidence[:400], correct[:400], reject=reject)
        unknown = (novelty >= limits.novelty) | (confidence <= limits.confidence)
        far.append(np.mean((novelty >= limits.novelty)[400:]))
        rejected.append(np.mean(unknown[400:]))
        errors.append(np.mean(~correct[400:][~unknown[400:]]))
    assert 0.09 < np.mean(far) <= 0.102
    assert np.mean(np.array(errors) <= reject) >= 0.9
    assert 0.1 < np.mean(rejected) < 0.8


def test_cells_that_are_named_well_are_rejected_for_novelty_only():
    rng = np.random.default_rng(0)
    rejected = []
    for _ in range(200):
        novelty = rng.gamma(5.0, 1.0, 1100)
        limits = find_limits(novelty[:100], rng.random(100), np.ones(100, dtype=bool), reject=0.1)
        assert limits.confidence == -np.inf
        rejected.append(np.mean(novelty[100:] >= limits.novelty))
    assert 0.08 < np.mean(rejected) <= 0.105


def test_one_wrong_name_among_the_most_confident_cells_does_not_make_all_cells_unknown():
    n_cells = 200
    confidence = np.linspace(0.5, 1.0, n_cells)
    correct = np.arange(n_cells) != n_cells - 10
    novelty = np.random.default_rng(0).random(n_cells)
    assert find_limits(novelty, confidence, correct, reject=0.1).confidence == -np.inf


@pytest.mark.parametrize("reject", [0.01, 0.05, 0.1, 0.3])
def test_from_the_number_of_cells_that_is_asked_for_a_promise_can_be_kept(reject):
    def named(n: int) -> bool:
        score = np.linspace(0.1, 1.0, n)
        return find_limits(score, score, np.ones(n, dtype=bool), reject=reject).confidence == -np.inf

    assert named(cells_needed(reject))
    with pytest.warns(UserWarning, match="all cells are called unknown"):
        assert not named(cells_needed(reject) - 1)


def test_where_names_are_guesses_every_cell_is_unknown():
    score = np.linspace(0.1, 1.0, 200)
    with pytest.warns(UserWarning, match="all cells are called unknown"):
        limits = find_limits(score, score, np.arange(200) % 2 == 0, reject=0.1)
    assert limits.confidence == np.inf


def test_an_unseen_type_is_mostly_unknown_and_known_cells_are_mostly_named(fine_tuned):
    query = make_cells(1000, seed=2, types=(*TYPES[:3] * 3, "novel"))
    names = fine_tuned.predict(
        query, reject=0.1
    )  # a tenth more unknown cells than usual are no reason to warn
    unknown = names == "unknown"
    novel = (query.obs["kind"] == "novel").to_numpy()
    assert unknown[novel].mean() > 0.8
    assert 0.02 < unknown[~novel].mean() < 0.3
    assert np.mean(names[~unknown & ~novel] == query.obs["kind"][~unknown & ~novel]) > 0.9


def test_far_more_unknown_cells_than_promised_are_explained(fine_tuned):
    strange = make_cells(200, seed=2, types=("novel",))
    with pytest.warns(UserWarning, match="are called 'unknown'") as said:
        found = name_cells(fine_tuned, strange, reject=0.1, batch_size=None, guess="here")
    message = str(said[0].message)
    n_unknown = int(np.sum(found.names == "unknown"))
    assert f"{n_unknown} of 200 cells" in message and n_unknown == found.n_far + found.n_uncertain > 160
    assert f"{found.n_far} are too far from every type, {found.n_uncertain} too uncertain" in message
    assert "another protocol, depth, species" in message and "best guess for each cell is here" in message
    np.testing.assert_array_equal(found.best_guess, fine_tuned.predict(strange))
    named = found.names != "unknown"
    np.testing.assert_array_equal(found.names[named], found.best_guess[named])


def test_the_reject_that_is_told_names_as_many_cells_as_told_and_no_smaller_one_does():
    rng = np.random.default_rng(0)
    confidence = rng.random(400)
    calibration = Calibration(rng.random(400), confidence, rng.random(400) < confidence)
    novelty, unsure = rng.random(100), 0.3 + 0.39 * rng.random(100)
    reject, n_named = smallest_reject(calibration, novelty, unsure, share=0.5)

    def named(reject: float) -> int:
        return 100 - np.sum(limits_of(*calibration, reject=reject).unknown(novelty, unsure))

    assert named(reject) == n_named > 50
    assert all(named(r / 100) <= 50 for r in range(1, round(100 * reject)))
    limits = limits_of(*calibration, reject=0.2)
    told = f"reject={reject:g} is the smallest that names half of them .{n_named} of 100."
    with pytest.warns(UserWarning, match=told) as said:
        explain_unknown(calibration, limits, novelty, unsure, reject=0.2, unknown="?", guess="here")
    far, uncertain = (int(x.sum()) for x in limits.unknown(novelty, unsure))
    assert f"{far} are too far from every type, {uncertain} too uncertain" in str(said[0].message)
    assert "lacks genes that tell types" in str(said[0].message) and uncertain > far
    # cells that are too far are told even where all cells are unknown anyway; those of the calibration are not
    guesses = Calibration(calibration.novelty, confidence, np.zeros(400, dtype=bool))
    limits = limits_of(*guesses, reject=0.2)
    assert limits.confidence == np.inf
    with pytest.warns(UserWarning, match="100 are too far .*No reject names any of them"):
        explain_unknown(guesses, limits, novelty + 1, unsure, reject=0.2, unknown="?", guess="here")
    explain_unknown(guesses, limits, novelty, unsure, reject=0.2, unknown="?", guess="here")


def test_novelty_is_the_distance_to_the_nearest_type_in_the_embedding_over_the_type_s_spread(fine_tuned):
    rows = np.concatenate([fine_tuned.train_indices, fine_tuned.validation_indices])
    latent = fine_tuned.get_latent_representation(indices=np.sort(rows)).astype(np.float64)
    kind = fine_tuned.adata.obs["label"].iloc[np.sort(rows)].to_numpy()
    centers = {label: latent[kind == label].mean(axis=0) for label in ("B", "NK", "T")}
    within = np.concatenate([latent[kind == label] - center for label, center in centers.items()])
    scatter = np.cov(within.T, bias=True)
    precision = np.linalg.inv((scatter + np.eye(8) * np.trace(scatter) / 8) / 2)

    def distance(cells, label):
        return np.array([mahalanobis(cell, centers[label], precision) for cell in cells])

    own = {label: distance(latent[kind == label], label) for label in centers}
    usual = np.median(np.concatenate(list(own.values())))
    spread = {
        label: (len(d) * np.median(d) + SPREAD_PRIOR * usual) / (len(d) + SPREAD_PRIOR)
        for label, d in own.items()
    }
    query = make_cells(40, seed=3, types=TYPES)
    latent = fine_tuned.get_latent_representation(query)
    expected = np.min([distance(latent, label) / spread[label] for label in centers], axis=0)
    np.testing.assert_allclose(scores_of(fine_tuned, query, None, None)[1], expected, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:No share of the calibration cells:UserWarning")  # then no name is wrong
def test_names_of_whole_runs_are_wrong_as_rarely_as_promised_in_nine_of_ten(weights):
    errors, before, unknown = [], [], []
    options = {"trainable": "all", "max_epochs": 8, "lr": 5e-3, "batch_size": 64, **QUIET}
    for seed in range(10):
        model = attach(weights, make_cells(800, seed=seed, depth=0.03), seed)
        model.fine_tune(validation_size=0.1, calibration_size=0.4, **options)
        query = make_cells(2000, seed=100 + seed, depth=0.03)
        truth = query.obs["kind"].to_numpy()
        names = model.predict(query, reject=0.1)
        named = names != "unknown"
        errors.append(np.sum((names != truth) & named) / max(named.sum(), 1))
        before.append(np.mean(model.predict(query) != truth))
        unknown.append(np.mean(~named))
    assert np.mean(before) > 0.1  # there is something to keep
    assert np.sum(np.array(errors) <= 0.1) >= 9
    assert np.median(unknown) < 0.5


def test_a_smaller_reject_rejects_fewer_cells_for_novelty(fine_tuned):
    limits = [limits_for(fine_tuned, reject).novelty for reject in (0.05, 0.1, 0.3)]
    assert limits == sorted(limits, reverse=True)


# saving


@pytest.mark.filterwarnings(
    "ignore:.* cells are called 'unknown':UserWarning"
)  # a quarter are of an unseen type
@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_a_saved_model_gives_the_same_names_and_probabilities(fine_tuned, tmp_path, way):
    query = make_cells(60, seed=1, types=TYPES)
    if way == "save":
        fine_tuned.save(tmp_path / "model")
        again = CellPLM.load(tmp_path / "model", adata=make_cells(600), accelerator="cpu")
    else:
        fine_tuned.save_pretrained(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["annotation"]["labels"] == ["B", "NK", "T"]
        again = attach(tmp_path / "model", make_cells(60))
    pd.testing.assert_frame_equal(again.predict(query, soft=True), fine_tuned.predict(query, soft=True))
    names = fine_tuned.predict(query, reject=0.1)
    np.testing.assert_array_equal(again.predict(query, reject=0.1), names)
    assert "unknown" in names


def test_a_bundle_whose_head_is_not_the_one_it_describes_is_refused(fine_tuned, tmp_path):
    fine_tuned.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for annotation in ({}, {**config["annotation"], "labels": ["B", "T"]}):
        path.write_text(json.dumps({**config, "annotation": annotation}))
        with pytest.raises(WeightsError, match="annotation.linear.weight"):
            attach(tmp_path / "model", make_cells(60))


def test_a_model_that_is_fine_tuned_again_forgets_the_old_labels(weights, adata):
    model = attach(weights, adata)
    model.fine_tune(**QUICK)
    adata.obs["half"] = np.where(np.arange(adata.n_obs) % 2, "odd", "even")
    model.fine_tune("half", **QUICK)
    assert model.predict(soft=True).columns.tolist() == ["even", "odd"]


# what is refused


def test_predict_before_fine_tune_says_what_to_do(weights, adata):
    with pytest.raises(RuntimeError, match="call fine_tune first"):
        attach(weights, adata).predict()


@pytest.mark.parametrize("reject", [0, 1, -0.1, 10])
def test_reject_is_a_share(fine_tuned, reject):
    with pytest.raises(ValueError, match="between 0 and 1"):
        fine_tuned.predict(reject=reject)


def test_reject_and_probabilities_do_not_mix(fine_tuned):
    with pytest.raises(ValueError, match="Give one of them"):
        fine_tuned.predict(reject=0.1, soft=True)


def test_a_promise_that_too_few_cells_can_keep_is_not_made(weights, adata):
    model = attach(weights, adata)
    model.fine_tune(trainable="head", **QUICK)
    with pytest.raises(ValueError, match=r"from \d+ calibration cells on; there are 17"):
        model.predict(reject=0.1)
    with pytest.warns(UserWarning, match="The split that is asked for is not that of the training before"):
        model.fine_tune(trainable="head", calibration_size=0, **QUICK)
    with pytest.raises(ValueError, match="there are 0"):
        model.predict(reject=0.1)


def test_labels_that_cannot_be_learned_are_refused(weights, adata):
    adata.obs["one"] = "T"
    adata.obs["none"] = "unknown"
    adata.obs["holes"] = adata.obs["kind"].where(np.arange(adata.n_obs) != 5)
    model = attach(weights, adata)
    for key, error, message in (
        ("one", ValueError, "holds only 'T'; at least two"),
        ("none", ValueError, "only 'unknown', which stands for no label"),
        (
            "holes",
            ValueError,
            r"missing \(NaN\) in 1 of 120 cells, the first 'cell 5'.*'unknown' \(unlabeled_category\)",
        ),
        ("typo", KeyError, "'typo' not found"),
    ):
        with pytest.raises(error, match=message):
            model.fine_tune(key, **QUICK)
    for sizes in ({"validation_size": 0.5, "calibration_size": 0.5}, {"validation_size": -0.1}):
        with pytest.raises(ValueError, match="no cells to train on"):
            model.fine_tune(**sizes, **QUICK)
    assert model.annotation_ == {}


class Interruption(pl.Callback):
    def on_train_epoch_end(self, *_: object) -> None:
        msg = "power cut"
        raise RuntimeError(msg)


def test_a_model_whose_fine_tuning_broke_off_gives_no_names_and_is_otherwise_whole(weights, adata):
    model = attach(weights, adata)
    names = set(tensors(model))
    with pytest.raises(RuntimeError, match="power cut"):
        model.fine_tune(trainable="lora", callbacks=[Interruption()], **QUICK)
    with pytest.raises(RuntimeError, match="call fine_tune first"):
        model.predict()
    assert set(tensors(model)) == names
    assert np.isfinite(model.get_latent_representation()).all()


def test_without_labels_fine_tuning_asks_for_them(weights, adata):
    CellPLM.setup_anndata(adata)
    with pytest.raises(ValueError, match="give labels_key"):
        CellPLM.from_pretrained(weights, adata).fine_tune()
    with pytest.raises(ValueError, match='choose one of "last", "all", "head", "lora"'):
        CellPLM.from_pretrained(weights, adata).fine_tune("kind", trainable="encoder")


def test_a_label_with_one_cell_is_named_and_trained_on(weights, adata):
    adata.obs["fine"] = np.where(np.arange(adata.n_obs) == 0, "rare", adata.obs["label"])
    model = attach(weights, adata)
    with pytest.warns(UserWarning, match=r"'rare' \(1\)"):
        model.fine_tune("fine", **QUICK)
    assert model.predict(soft=True).columns.tolist() == ["B", "NK", "T", "rare"]
    assert 0 in model.train_indices


def test_a_random_network_is_not_frozen_without_a_word(adata):
    scvi.settings.seed = 0
    CellPLM.setup_anndata(adata, labels_key="label")
    with pytest.warns(UserWarning, match="much of it stays random"):
        CellPLM(adata, **NETWORK).fine_tune(trainable="head", **QUICK)
    model = CellPLM(adata, **NETWORK)
    model.fine_tune(trainable="all", **QUICK)
    assert set(model.predict()) <= {"B", "NK", "T"}


# real cells


def test_left_out_b_cells_of_pbmc3k_are_unknown_and_the_others_are_named(shared_data):
    cells = ad.read_h5ad(shared_data / "rna" / "pbmc3k_seurat.h5ad")
    truth = cells.obs["cell_type"].astype(str).to_numpy()
    held_out = np.random.default_rng(0).random(cells.n_obs) < 0.3
    adata = cells[~held_out & (truth != "B")].copy()
    scvi.settings.seed = 0
    CellPLM.setup_anndata(adata, labels_key="cell_type")
    model = CellPLM.from_pretrained("cellplm-starter", adata)
    model.fine_tune(max_epochs=20, batch_size=256, **QUIET)
    names, truth = model.predict(cells[held_out], reject=0.1), truth[held_out]
    unknown, unseen = names == "unknown", truth == "B"
    assert unknown[unseen].mean() > 0.8
    assert 0.05 < unknown[~unseen].mean() < 0.35  # more than a tenth, as kinds of T cell overlap
    assert np.mean(names[~unknown & ~unseen] != truth[~unknown & ~unseen]) <= 0.1
