import inspect
import re
from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid

import cellprior as cp
from cellprior.evaluate import _ask, _methods, _neighbors, _probes, _task
from cellprior.evaluate._expression import log_normalised
from cellprior.evaluate._null import groups, p_value, permuted
from cellprior.evaluate._splits import HELD_OUT, RANDOM, Split, inner_folds, random_folds
from cellprior.evaluate._structure import structure
from cellprior.evaluate._task import CHOSEN, ON_GENES
from cellprior.model import NotCountsError

QUIET = {"labels_key": "type", "seeds": 2, "progress": False}


def told(adata: AnnData, noise: float = 0.3, key: str = "type") -> np.ndarray:
    """An embedding that is a column of obs and noise."""
    rng = np.random.default_rng(1)
    return pd.get_dummies(adata.obs[key]).to_numpy(float) + noise * rng.standard_normal((adata.n_obs, 3))


def value(table: pd.DataFrame, method: str, metric: str = "macro_f1", **where: object) -> float:
    rows = table[(table["method"] == method) & (table["metric"] == metric)]
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    return float(rows["value"].iloc[0])


def test_every_table_has_its_baselines(cells, capsys):
    adata = cells()
    adata.obsm["X_told"] = told(adata)
    tables = [
        cp.evaluate.zero_shot(adata, "X_told", **QUIET),
        cp.evaluate.linear_probe(adata, "X_told", **QUIET),
    ]
    assert capsys.readouterr().err == ""  # progress=False means no bar
    for table in tables:
        kinds = table.drop_duplicates("method").set_index("method")["kind"]
        assert kinds.to_dict() == {
            "X_told": "embedding",
            "PCA": "baseline",
            "HVG": "baseline",
            CHOSEN: "baseline",
            ON_GENES: "baseline",
            "largest label": "baseline",
        }
        seen = table.drop_duplicates("method").set_index("method")["seen"]
        assert seen[["X_told", "PCA", "HVG", CHOSEN]].tolist() == ["all cells"] * 4
        assert seen[[ON_GENES, "largest label"]].tolist() == ["training cells"] * 2
        scored = table[table["split"] == RANDOM]
        assert scored[["value", "low", "high"]].notna().all().all()
        assert (scored["low"] <= scored["high"]).all()
        assert scored["difference"].notna().sum() == (scored["versus"] != "").sum() > 0


def test_all_protocols_show_their_arguments_with_their_defaults():
    shared = {
        "batch_key": None, "layer": None, "seeds": None, "test_size": 0.2, "scvi_epochs": None, "max_cells": 20_000,
        "embed_options": None, "progress": None,
    }  # fmt: skip
    for function in (
        cp.evaluate.zero_shot,
        cp.evaluate.linear_probe,
        cp.evaluate.few_shot,
        cp.evaluate.report,
    ):
        shown = inspect.signature(function).parameters
        expected = shared | ({"seeds": 10} if function is cp.evaluate.few_shot else {})
        assert {name: shown[name].default for name in expected} == expected
        assert all(p.kind is not p.VAR_KEYWORD for p in shown.values())
        with pytest.raises(TypeError, match="nope"):
            function(AnnData(), "X", labels_key="type", nope=1)


def test_labels_are_read_off_and_noise_is_at_chance(cells):
    adata = cells()
    table = cp.evaluate.linear_probe(adata, {"told": told(adata)}, **QUIET)
    assert value(table, "told") > 0.95
    noise = {"noise": np.random.default_rng(0).standard_normal((adata.n_obs, 5))}
    table = cp.evaluate.linear_probe(adata, noise, **QUIET)
    assert value(table, "noise", "balanced_accuracy") == pytest.approx(1 / 3, abs=0.15)


def test_held_out_donors_are_the_headline_and_their_cells_are_not_learned_from(cells, monkeypatch):
    adata = cells()
    seen = []
    original = _ask.ask

    def spy(task, kind, *args, **kwargs):
        seen.extend((kind, split) for split in task.splits[kind])
        return original(task, kind, *args, **kwargs)

    monkeypatch.setattr("cellprior.evaluate._protocols.ask", spy)
    table = cp.evaluate.linear_probe(adata, {"told": told(adata)}, batch_key="donor", **QUIET)
    assert table["split"].unique().tolist() == [HELD_OUT, RANDOM]
    donor = adata.obs["donor"].to_numpy()
    for kind, split in seen:
        assert not set(split.train) & set(split.test)
        if kind == HELD_OUT:
            assert set(donor[split.test]) == {split.held_out}
            assert split.held_out not in donor[split.train]


def test_components_of_a_reference_see_its_cells_only_and_those_of_all_cells_are_one_for_all_splits(cells):
    """Counts of the other cells may be anything: components and variable genes of the reference stay the same."""
    adata = cells(n_genes=2500)
    log = log_normalised(adata.X)
    train = np.arange(200)
    other = sp.csr_matrix(np.random.default_rng(5).poisson(3, (40, 2500)))
    changed = log_normalised(sp.vstack([adata.X[:200], other], format="csr"))
    both = (_methods.pca("PCA", _methods.Genes(x), train).fit() for x in (log, changed))
    for first, second in zip(*both, strict=True):
        np.testing.assert_allclose(first.values[:200], second.values[:200], atol=1e-4)
        assert np.abs(first.values[200:] - second.values[200:]).max() > 0.1
    for method in (_methods.pca("PCA", _methods.Genes(log)), _methods.variable_genes(_methods.Genes(log))):
        assert method.fit()[0].values is method.fit()[0].values


def test_components_are_those_of_scikit_learn_whichever_way_they_are_computed(cells):
    log = log_normalised(cells(n_genes=2100).X)
    train = np.arange(0, 240, 2)
    expected = PCA(50, svd_solver="full").fit(log[train].toarray()).transform(log.toarray())
    genes = _methods.Genes(log)
    genes.add("the same again", np.arange(2100))
    assert list(genes.sets) == ["all genes"]
    by_products = _methods._components_of_products(genes.products("all genes"), train)
    for found in (by_products, _methods._components(log.toarray(), train)):
        np.testing.assert_allclose(np.abs(found[:, :20]), np.abs(expected[:, :20]), atol=1e-2)


def test_what_can_be_chosen_is_chosen_within_the_training_cells(cells, monkeypatch):
    """The test cells' labels may be anything: what is said of them stays the same."""
    adata = cells(signal=0.3)
    first = make(adata, told(adata, 0.8))
    second = make(adata, told(adata, 0.8))
    split = first.splits[RANDOM][0]
    second.splits = {RANDOM: [split]}
    first.splits = {RANDOM: [split]}
    second.codes[split.test] = (second.codes[split.test] + 1) % 3
    said = [
        _ask.ask(task, RANDOM, ("nearest neighbours", "linear probe"), progress=False).said
        for task in (first, second)
    ]
    for asked in said[0]:
        np.testing.assert_array_equal(said[0][asked][0], said[1][asked][0])


def test_neighbours_vote_as_in_knn_predict_and_come_from_other_folds():
    rng = np.random.default_rng(0)
    train, test, codes = rng.standard_normal((90, 4)), rng.standard_normal((50, 4)), rng.integers(0, 4, 90)
    for n in (3, 4, 10):
        said = _neighbors.vote(codes[_neighbors.nearest(test, train, n)], 4)
        np.testing.assert_array_equal(said, cp.evaluate.knn_predict(train, codes, test, n_neighbors=n))
    folds = rng.integers(0, 3, 90)
    found = _neighbors.nearest(train, train, 5, apart=(folds, folds))
    assert not (folds[found] == folds[:, None]).any()


def test_the_number_of_neighbours_is_chosen_by_neighbours_of_other_folds():
    rng = np.random.default_rng(0)
    values, folds = rng.standard_normal((120, 4)).astype(np.float32), rng.integers(0, 3, 90)
    split, asked = Split(RANDOM, 0, "", np.arange(90), np.arange(90, 120)), np.arange(0, 90, 2)
    found = _neighbors.pools([_methods.Space("", values, (4,))], split, folds, asked)
    assert [pool.words for pool in found] == ["Euclidean", "cosine"]
    apart = np.linalg.norm(values[:, None] - values[None], axis=2)
    expected = np.where(folds[asked][:, None] == folds, np.inf, apart[asked][:, :90]).argsort(axis=1)[:, :15]
    np.testing.assert_array_equal(found[0].inner, expected)
    np.testing.assert_array_equal(found[0].test, apart[90:, :90].argsort(axis=1)[:, :15])


def test_neighbours_are_chosen_by_the_best_score_within():
    rng = np.random.default_rng(0)
    codes, asked = np.tile([0, 1, 2], 20), np.arange(0, 60, 2)
    at_random = rng.integers(0, 60, (30, 15))
    alike = np.stack([rng.permutation(np.flatnonzero(codes == codes[cell]))[:15] for cell in asked])
    alike[:, 3:] = (
        alike[:, 3:] + 1
    ) % 60  # of another label: three and five are right, of which the more are taken
    found = [_neighbors.Pool(words, inner, at_random) for words, inner in (("a", at_random), ("b", alike))]
    chosen = _neighbors.choose(found, codes[None], asked, 3)[0]
    assert (chosen.pool, chosen.number, chosen.inner, chosen.words) == (1, 5, 1.0, "b, 5 neighbours")
    np.testing.assert_array_equal(chosen.said, _neighbors.vote(codes[at_random[:, :5]], 3))


def test_the_nearest_of_many_cells_are_found_group_by_group():
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((n, 3)).astype(np.float32) for n in (701, 350))
    expected = np.linalg.norm(test[:, None] - train, axis=2).argsort(axis=1)[:, :10]
    np.testing.assert_array_equal(_neighbors.nearest(test, train, 10), expected)


def test_folds_within_the_training_cells_are_whole_batches_if_batches_are_held_out(cells):
    adata = cells()
    task = make(adata, told(adata), batch_key="donor")
    donor = adata.obs["donor"].to_numpy()
    held_out, random = (_ask.Fold(task, task.splits[kind][0], None) for kind in (HELD_OUT, RANDOM))
    donors_of = pd.Series(held_out.folds).groupby(donor[held_out.split.train]).nunique()
    assert (donors_of == 1).all() and len(set(held_out.folds)) == 2
    assert (pd.Series(random.folds).groupby(donor[random.split.train]).nunique() == 5).all()


def test_the_baseline_is_chosen_for_each_split_by_what_it_names_within_it(cells):
    adata = cells()
    task = make(adata, told(adata))
    answers = _ask.Answers(task.splits[RANDOM], task.copies)
    for inner in ((0.9, 0.2), (0.3, 0.8)):
        for name, score in zip(("one", "other"), inner, strict=True):
            of = _neighbors.Chosen(np.array([name]), score, "")
            answers.add(_ask.Asked(name, "baseline", "nearest neighbours"), of)
        _ask._choose_baseline(answers, ("nearest neighbours",))
    said = answers.said[_ask.Asked(CHOSEN, "baseline", "nearest neighbours")]
    assert np.concatenate(said).tolist() == ["one", "other"]


def test_there_is_a_signal_if_the_best_of_all_readings_is_better_than_the_best_of_permuted_labels():
    codes, cells = np.tile([0, 1, 2], 40), np.arange(120)
    labellings = permuted(codes, cells, None)
    assert all(np.bincount(again).tolist() == [40] * 3 for again in labellings)
    assert all((again != codes).mean() > 0.4 for again in labellings[1:])
    rng = np.random.default_rng(0)
    noise = [[rng.integers(0, 3, labellings.shape)] for _ in range(40)]  # on average nobody reads anything
    told = [np.where(rng.random(120) < 0.3, codes, rng.integers(0, 3, (len(labellings), 120)))]
    split = [Split(RANDOM, 0, "", cells[:0], cells)]
    assert p_value([*noise, told], labellings, split) == pytest.approx(1 / 101)
    assert p_value(noise, labellings, split) > 0.05
    assert p_value([[labellings]], labellings, split) == 1  # each labelling is read perfectly


def test_permuted_labels_stay_within_their_batch_and_copies_have_one():
    codes, batches = np.repeat([0, 1], 50), pd.Series(np.tile(["a", "b"], 50))
    held_out = [Split(HELD_OUT, 0, "a", np.arange(50), np.arange(50))]
    within = groups(100, held_out, batches)
    codes[:4] = -1
    alike = np.r_[np.arange(98), 10, 12]
    for again in permuted(codes, alike, within)[1:]:
        assert (again[:4] == -1).all() and again[98] == again[10] and again[99] == again[12]
    one = permuted(codes, np.arange(100), within)[1]
    for name in ("a", "b"):
        own = (batches == name).to_numpy()
        np.testing.assert_array_equal(np.bincount(one[own] + 1), np.bincount(codes[own] + 1))


def test_permuted_labels_are_stratified_like_the_labels_that_the_parts_were_made_from():
    codes = np.random.default_rng(0).choice(3, 100, p=[0.6, 0.3, 0.1])
    splits = random_folds(codes, seeds=5, test_size=0.2)
    for again in permuted(codes, np.arange(100), groups(100, splits, None))[1:]:
        for split in splits:
            np.testing.assert_array_equal(np.bincount(again[split.test]), np.bincount(codes[split.test]))


def test_cells_that_are_divided_again_are_asked_about_by_all_methods_and_their_permutations_once(cells):
    adata = cells()
    task = make(adata, told(adata), seeds=10)
    answers = _ask.ask(task, RANDOM, _ask.ZERO_SHOT, n_per_class=(5,), signal=True, progress=False)
    asked = {(a.reader, a.n_per_class): len(said) for a, said in answers.said.items()}
    assert asked == {
        ("nearest neighbours", None): 10, ("", None): 10, ("linear probe", 5): 5, ("nearest centroid", 5): 5
    }  # fmt: skip
    assert {len(names) for names in answers.by_chance.values()} == {5}
    assert answers.p_value < 0.05
    scores = answers.scores(task.codes)
    assert all(np.isfinite(of["macro_f1"]).all() for of in scores.values())


def test_random_cells_that_come_second_are_divided_once(cells):
    adata = cells()
    assert len(make(adata, told(adata), seeds=None).splits[RANDOM]) == 15
    both = make(adata, told(adata), seeds=None, batch_key="donor").splits
    assert list(both) == [HELD_OUT, RANDOM] and len(both[RANDOM]) == 5


def test_scores_of_structure_are_the_same_on_any_number_of_cores(cells, monkeypatch):
    adata = cells()
    task = make(adata, told(adata))
    found = []
    for n_jobs in (1, 2):
        monkeypatch.setattr(cp.settings, "_n_jobs", n_jobs)
        found.append(structure(task, progress=False).drop(columns="seconds"))
    assert found[0].equals(found[1])


def test_ridge_is_that_of_scikit_learn_by_features_and_by_products():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 80)
    for n_features in (5, 200):
        train, test = (rng.standard_normal((n, n_features)) for n in (80, 30))
        train = train + np.eye(3)[codes] @ rng.standard_normal((3, n_features))
        test = test - train.mean(axis=0)
        train = train - train.mean(axis=0)
        penalty = 0.1 * (train**2).sum() / len(train)
        expected = Ridge(penalty).fit(train, np.eye(3)[codes]).predict(test).argmax(axis=1)
        found = [
            _probes.Ridge(train, test).predict(codes, 3, 0.1),
            _probes.Ridge(train @ train.T, test @ train.T, products=True).predict(codes, 3, 0.1),
            _probes.Ridge(train, test).predict(np.stack([codes, codes]), 3, 0.1)[1],
        ]
        for said in found:
            np.testing.assert_array_equal(said, expected)
        folds = np.arange(80) % 4
        within = _probes.Ridge(train, test).within(codes, folds, 3)[_probes.PENALTIES.index(0.1)]
        for fold in range(4):
            own = folds == fold
            there = Ridge(penalty, fit_intercept=False).fit(
                train[~own], np.eye(3)[codes[~own]] - np.eye(3)[codes[~own]].mean(axis=0)
            )
            guess = there.predict(train[own]) + np.eye(3)[codes[~own]].mean(axis=0)
            np.testing.assert_array_equal(within[own], guess.argmax(axis=1))


def test_logistic_regression_is_chosen_by_folds_it_has_not_learned():
    """As many dimensions of noise as cells are learned by heart, and say nothing of other cells."""
    rng = np.random.default_rng(0)
    noise, codes = rng.standard_normal((90, 80)), np.tile([0, 1, 2], 30)
    chosen = _probes._best_logistic(noise, codes, noise, rng.integers(0, 5, 90), 3)
    assert (chosen.said == codes).mean() > 0.8 > 0.6 > chosen.inner


def test_a_linear_probe_chooses_the_number_of_components():
    rng = np.random.default_rng(0)
    codes = np.tile([0, 1, 2], 40)
    values = rng.standard_normal((120, 60)).astype(np.float32)
    values[:, :3] += 1.5 * np.eye(3)[codes]
    split = Split(RANDOM, 0, "", np.arange(60), np.arange(60, 120))
    folds = inner_folds(codes[:60], copies=np.arange(60), batches=None, seed=0)
    chosen = _probes.best_linear(
        [_methods.Space("all genes", values, (60, 30, 3))], split, codes[:60], folds, 3
    )
    assert chosen.words.endswith(" on 3 components of all genes")
    only = _methods.Space("", values[:, :3], (3,))
    np.testing.assert_array_equal(chosen.said, _probes.best_linear([only], split, codes[:60], folds, 3).said)


def test_a_probe_reads_the_scale_of_the_training_cells_only():
    rng = np.random.default_rng(0)
    train, test, far = rng.normal(3, 2, (60, 4)), rng.normal(3, 2, (20, 4)), rng.normal(1000, 500, (20, 4))
    scaled, *others = _probes.one_scale(train, test, far)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    assert scaled.var(axis=0).mean() == pytest.approx(1)
    for given, found in zip((test, far), others, strict=True):  # the same map for all cells
        np.testing.assert_allclose(found, scaled[0] + (given - train[0]) / np.sqrt(train.var(axis=0).mean()))
    codes = (train[:, 0] > 3).astype(int)
    for tuned in (False, True):
        alone = _probes.linear(train, codes, test, tuned=tuned)
        beside = _probes.linear(train, codes, np.vstack([test, far]), tuned=tuned)
        np.testing.assert_array_equal(beside[:20], alone)


def test_the_nearest_centroid_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 90)
    train, test = rng.normal(codes[:, None], 1, (90, 4)), rng.normal(1, 1, (40, 4))
    expected = NearestCentroid().fit(train, codes).predict(test)
    np.testing.assert_array_equal(_probes.nearest_centroid(train, codes, test), expected)


def test_few_labels_know_less_than_many(cells):
    adata = cells(signal=0.5)
    table = cp.evaluate.few_shot(
        adata,
        {"told": told(adata, noise=0.6)},
        n_per_class=(2, 40),
        labels_key="type",
        seeds=5,
        progress=False,
    )
    for method in ("told", "PCA"):
        few, many = (value(table, method, n_per_class=n, reader="linear probe") for n in (2, 40))
        assert few + 0.05 < many
    assert set(table["reader"]) == {"linear probe", "nearest centroid"}


def test_a_type_with_fewer_cells_than_asked_for_gives_all_it_has(cells):
    adata = cells()
    adata.obs["type"] = np.where(np.arange(240) < 12, "rare", adata.obs["type"])
    table = cp.evaluate.few_shot(adata, {"told": adata.X.toarray()}, n_per_class=[50], **QUIET)
    assert table["value"].notna().all()


def test_each_draw_of_a_held_out_donor_is_a_split_of_its_own(cells):
    adata = cells()
    table = cp.evaluate.few_shot(adata, {"told": told(adata)}, n_per_class=[5], batch_key="donor", **QUIET)
    assert table.groupby("split")["n_splits"].first().to_dict() == {HELD_OUT: 6, RANDOM: 2}


def test_all_cells_are_scored_for_structure_with_the_picked_resolution_named(cells):
    adata = cells(n_types=7)
    embeddings = {"batches": told(adata, 0.05, "donor"), "types": adata.X.toarray()}
    table = cp.evaluate.zero_shot(adata, embeddings, batch_key="donor", **QUIET)
    whole = table[table["split"] == "all cells"].set_index(["method", "metric"])
    assert whole.loc[("batches", "batch_leak"), "value"] > 0.9
    assert whole.loc[("batches", "ilisi"), "value"] < 0.1 < whole.loc[("types", "ilisi"), "value"]
    assert whole.loc[("types", "ari"), "value"] > 0.8 > whole.loc[("batches", "ari"), "value"]
    assert "ari_picked_by_labels" in whole.loc["types"].index
    scgraph = whole.loc[("types", "scgraph")]
    assert np.isnan(scgraph["value"]) == (scgraph["reason"] != "")


def test_weights_bring_their_genes_and_their_network_at_random():
    adata = blood()
    table = cp.evaluate.linear_probe(adata, "cellplm-starter", labels_key="label", seeds=2, progress=False)
    methods = set(table["method"])
    assert "random weights of cellplm-starter" in methods
    assert value(table, "cellplm-starter") > value(table, "random weights of cellplm-starter")


def test_an_embedding_of_tl_embed_brings_the_same_baselines_and_stays_as_it_is():
    adata = blood()
    cp.tl.embed(adata, "cellplm-starter")
    before = adata.obsm["X_cellplm"].copy()
    table = cp.evaluate.linear_probe(adata, "X_cellplm", labels_key="label", seeds=2, progress=False)
    assert "random weights of X_cellplm" in set(table["method"])
    np.testing.assert_array_equal(adata.obsm["X_cellplm"], before)


def test_cells_that_weights_were_trained_on_are_found_if_the_weights_say_so(tmp_path):
    adata = blood()
    model = cp.model.CellPLM.from_pretrained("cellplm-starter")
    model.trained_on_ = None
    model.save_pretrained(tmp_path / "mine", card="# Mine")
    say = {"labels_key": "label", "seeds": 2}
    silent = _task.make_task(adata, str(tmp_path / "mine"), **say)
    assert "is not known here" in silent.notes[-1] and silent.methods[0].seen == "not known"
    known = cp.weights.fingerprints(adata.X, cp.genes.match(adata.var, model.genes).index)
    asked = known[silent.codes >= 0]
    assert 0 < (asked > 0).sum() < (known > 0).sum()
    for cells, seen, words in (
        (known, "these cells", f"{(asked > 0).sum()} of the {len(asked)}"),
        (known[:0], "not known", "is not known here"),  # most genes of the weights are missing
    ):
        cp.weights.write_trained_on(tmp_path / "mine", cells)
        task = _task.make_task(adata, str(tmp_path / "mine"), **say)
        assert task.methods[0].seen == seen and words in task.notes[-1]
        cp.tl.embed(adata, str(tmp_path / "mine"), key_added="X_mine")
        of_key = _task.make_task(adata, "X_mine", **say)
        assert {m.name: m.seen for m in of_key.methods}["X_mine"] == seen


def test_no_cell_is_said_to_be_unknown_of_data_in_which_a_known_one_would_not_be_found(shared_data):
    adata = ad.read_h5ad(shared_data / "rna" / "pbmc3k_seurat.h5ad")[:200].copy()
    ribosomal = adata.var_names.str.contains("^RP[LS]")
    thin = adata.copy()
    thin.X.data = np.random.default_rng(0).binomial(thin.X.data.astype(int), 0.02).astype(np.float32)
    for cells, n in (
        (adata, 0),
        (adata[:, ~ribosomal].copy(), None),
        (adata[:, ribosomal | (np.arange(adata.n_vars) < 6000)].copy(), None),
        (thin, None),
    ):
        with cp.model.CellPLM.opened("cellplm-starter", cells) as model:
            assert _task.trained_on(model, cells.X) == n


def blood() -> AnnData:
    from tests.contract.models import blood_cells

    adata = blood_cells()[::3].copy()
    adata.obs["label"] = adata.obs["bulk_labels"]
    return adata


def test_the_data_are_left_as_they_are(cells):
    adata = cells()
    adata.obsm["X_told"] = told(adata)
    before = adata.copy()
    cp.evaluate.zero_shot(adata, "X_told", batch_key="donor", **QUIET)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert adata.uns == {} and set(adata.obsm) == {"X_told"}
    assert (adata.X != before.X).nnz == 0


def test_backed_data_and_a_layer_give_the_same_table(cells, tmp_path):
    adata = cells()
    adata.obsm["X_told"] = told(adata)
    expected = cp.evaluate.linear_probe(adata, "X_told", **QUIET)
    adata.layers["counts"] = adata.X
    adata.X = log_normalised(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    found = cp.evaluate.linear_probe(backed, "X_told", layer="counts", **QUIET)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))


def test_of_many_cells_some_are_drawn(cells):
    adata = cells()
    task = make(adata, told(adata), max_cells=100)
    assert task.n_obs == 100
    assert "100 of 240 cells" in task.notes[0]


def test_copies_of_cells_are_noticed(cells):
    adata = cells()
    again = adata[:7].copy()
    again.obs_names = [f"copy {i}" for i in range(7)]
    twice = ad.concat([adata, again])
    assert any("7 cells have the same counts" in note for note in make(twice, told(twice)).notes)
    assert not any("same counts" in note for note in make(adata, told(adata)).notes)


@pytest.mark.parametrize("word", ["unlabelled", "Unknown", "NA", " unassigned "])
def test_cells_whose_label_says_that_there_is_none_are_not_asked_about_and_the_note_names_it(cells, word):
    adata = cells()
    embedding = told(adata)
    adata.obs["type"] = adata.obs["type"].where(np.arange(240) >= 100, word)
    task = make(adata, embedding)
    assert task.labels == ["type 0", "type 1", "type 2"] and (task.codes[:100] == -1).all()
    assert task.notes[0] == f"100 cells are not asked about: without a label (also {word})."
    adata.obs["type"] = adata.obs["type"].replace(word, "Unknown T")
    assert "Unknown T" in make(adata, embedding).labels


def test_types_of_whole_numbers_in_a_column_of_fractions_are_asked_about(cells):
    adata = cells()
    embedding = told(adata)
    adata.obs["type"] = adata.obs["type"].str[-1].astype(float).where(np.arange(240) >= 7)
    assert make(adata, embedding).notes[0] == "7 cells are not asked about: without a label."


def test_a_batch_of_few_cells_is_not_held_out_and_named(cells):
    adata = cells()
    adata.obs["donor"] = adata.obs["donor"].where(np.arange(240) >= 6, "tiny")
    task = make(adata, told(adata), batch_key="donor")
    assert [split.held_out for split in task.splits[HELD_OUT]] == ["donor 0", "donor 1", "donor 2"]
    assert all(np.isin(np.arange(6), split.train).all() for split in task.splits[HELD_OUT])
    assert task.notes[0].startswith("Never held out") and task.notes[0].endswith("cells have: tiny.")


def test_a_type_that_is_one_cell_many_times_is_named_as_not_asked_about(cells):
    adata = cells()
    clone = ad.concat([adata[:1]] * 12, index_unique="-")
    clone.obs["type"] = "clone"
    both = ad.concat([adata[1:], clone])
    notes = make(both, both.X.toarray()).notes
    assert "Never asked about, as all of it are copies: clone." in notes


@pytest.mark.parametrize(
    "change", [lambda x: x + 1e8, lambda x: x * 1e30, lambda x: x * 1e-30, lambda x: x * 1e60]
)
def test_an_embedding_far_from_zero_or_of_any_unit_is_read_as_it_is(cells, change):
    adata = cells()
    embedding = told(adata).astype(np.float64)
    tables = [
        cp.evaluate.zero_shot(adata, {"given": values}, **QUIET).query("split == 'random cells'")
        for values in (embedding, change(embedding))
    ]
    assert value(tables[1], "given") == pytest.approx(value(tables[0], "given"), abs=0.01)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.ones((240, 3)), "the same for all cells"),
        (np.ones((240, 3), dtype=complex), "holds complex128; real numbers"),
        (np.full((240, 3), "a"), "'given' holds <U1"),
    ],
)
def test_what_is_no_embedding_is_refused_by_name(cells, values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make(cells(), values)


def test_arguments_that_mean_nothing_are_refused_by_name(cells):
    adata = cells()
    for options, said in (
        ({"seeds": 2.5}, "seeds=2.5; a whole number"),
        ({"max_cells": 0}, "max_cells=0"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            make(adata, told(adata), **options)
    with pytest.raises(ValueError, match=r"n_per_class=\[0\]"):
        cp.evaluate.report(adata, {"told": told(adata)}, "type", n_per_class=(0,))
    with pytest.raises(ValueError, match="are names of baselines"):
        cp.evaluate.report(adata, {"random weights of mine": told(adata)}, "type")
    adata.obs = pd.concat([adata.obs, adata.obs[["type"]]], axis=1)
    with pytest.raises(ValueError, match="several columns that are called 'type'"):
        make(adata, np.zeros((240, 2)))


def test_of_many_types_that_are_left_out_the_first_are_named_and_all_are_counted(cells):
    adata = cells()
    types, embedding = adata.obs["type"], told(adata)
    for rare, n, end in (
        (lambda i: f"rare {i:02}", 14, "cells: rare 00, rare 01, rare 02"),
        (lambda i: "rare", 3, "cells: rare."),
    ):
        adata.obs["type"] = [rare(i) if i < n else kind for i, kind in enumerate(types)]
        note = make(adata, embedding).notes[0]
        assert note.startswith(f"{n} cells are not asked about") and end in note
        assert note.endswith("rare 09, ... (14 types).") == (n == 14)


def make(adata: AnnData, embedding: np.ndarray, **options: object) -> _task.Task:
    arguments = {
        "labels_key": "type",
        "batch_key": None,
        "layer": None,
        "seeds": 2,
        "test_size": 0.2,
        "scvi_epochs": None,
        "max_cells": 10_000,
    }
    return _task.make_task(adata, {"given": embedding}, **{**arguments, **options})


BAD: dict[str, tuple[Callable[[AnnData], dict], type[Exception], str]] = {
    "no such label": (lambda a: {"labels_key": "nope"}, KeyError, "nope"),
    "no such batch": (lambda a: {"batch_key": "nope"}, KeyError, "nope"),
    "no such layer": (lambda a: {"layer": "nope"}, KeyError, "nope"),
    "no embedding": (lambda a: {"embeddings": {}}, ValueError, "No embedding"),
    "a name that a baseline has": (
        lambda a: {"embeddings": {"PCA": told(a)}},
        ValueError,
        "names of baselines",
    ),
    "other cells": (lambda a: {"embeddings": {"x": told(a)[:-1]}}, ValueError, "one row for each of the 240"),
    "not a number": (lambda a: {"embeddings": {"x": np.full((240, 2), np.nan)}}, ValueError, "not finite"),
    "neither key nor weights": (lambda a: {"embeddings": "X_nope"}, cp.weights.WeightsError, "X_nope"),
    "one label": (lambda a: {"labels_key": "same"}, ValueError, "at least two"),
    "one batch": (lambda a: {"batch_key": "same"}, ValueError, "Only the batch"),
    "a cell without batch": (lambda a: {"batch_key": "some"}, ValueError, "1 cells have no batch"),
    "options of nothing": (lambda a: {"embed_options": {"x": {}}}, ValueError, "embed_options has"),
    "half counts": (lambda a: {"layer": "half"}, NotCountsError, "raw counts"),
    "no cells asked for": (lambda a: {"n_per_class": [0]}, ValueError, "from 1 up"),
    "no seeds": (lambda a: {"seeds": 0}, ValueError, "seeds=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_is_wrong(cells, case):
    adata = cells()
    adata.obs["same"] = "same"
    adata.obs["some"] = adata.obs["donor"].where(np.arange(adata.n_obs) > 0)
    adata.layers["half"] = adata.X * 0.5
    change, error, message = BAD[case]
    arguments = {
        "embeddings": {"told": told(adata)},
        "labels_key": "type",
        "progress": False,
        **change(adata),
    }
    with pytest.raises(error, match=message):
        cp.evaluate.few_shot(adata, **arguments)


def test_scvi_is_a_baseline_where_asked_for(cells):
    adata = cells()
    table = cp.evaluate.linear_probe(
        adata,
        {"told": told(adata)},
        labels_key="type",
        batch_key="donor",
        seeds=1,
        scvi_epochs=2,
        progress=False,
    )
    assert np.isfinite(value(table, "scVI"))
    assert table.loc[table["method"] == "scVI", "seconds"].iloc[0] > 0


def test_baselines_read_genes_as_the_models_do_and_the_table_says_what_was_left_out(cells):
    adata = cells()
    antibodies = sp.csr_matrix(np.random.default_rng(0).poisson(500, (adata.n_obs, 4)).astype(np.float32))
    types = {"feature_types": ["Gene Expression"] * adata.n_vars + ["Antibody Capture"] * 4}
    var = pd.DataFrame(types, index=[*adata.var_names, "CD3", "CD4", "CD8", "CD19"])
    joint = AnnData(sp.hstack([adata.X, antibodies], format="csr"), obs=adata.obs, var=var)
    options = {"labels_key": "type", "batch_key": None, "layer": None, "seeds": 2, "test_size": 0.2}
    alone, both = (
        _task.make_task(x, {"told": told(adata)}, **options, scvi_epochs=None, max_cells=1000)
        for x in (adata, joint)
    )
    assert (alone.log != both.log).nnz == 0
    assert any("4 columns are no genes" in note for note in both.notes) and len(alone.notes) < len(both.notes)


def test_logistic_regressions_at_once_are_those_of_scikit_learn_one_by_one():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 150)
    x = rng.standard_normal((150, 4)) + np.eye(3, 4)[codes]
    plans = [(0.1, np.arange(150) < 100), (1.0, np.arange(150) >= 30)]
    found = _probes.logistic(_probes._with_constant(x), codes, 3, plans, steps=400)
    for (strength, learned), weights in zip(plans, found, strict=True):
        expected = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(x[learned], codes[learned])
        np.testing.assert_allclose(
            weights[:4] - weights[:4].mean(axis=1, keepdims=True), expected.coef_.T, atol=2e-3
        )
        np.testing.assert_array_equal(
            (_probes._with_constant(x) @ weights).argmax(axis=1), expected.predict(x)
        )
