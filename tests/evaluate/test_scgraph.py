from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import trim_mean

from cellprior.evaluate import scgraph, silhouette
from cellprior.evaluate._scgraph import batch_pcas, consensus_distances, label_scores
from tests.evaluate.simulated import Cells, cells, corners, noise

DATA = Path(__file__).parent / "data"
NAMES = ["A", "B", "C", "D", "E"]  # "rare" has 8 cells and does not count
BATCHES = ["b0", "b1", "b2"]  # b3 has 50 cells and does not count


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Numbers of the paper's code."""
    return json.loads((DATA / "scgraph_golden.json").read_text())


@pytest.fixture(scope="module")
def toy() -> dict[str, np.ndarray]:
    with np.load(DATA / "scgraph_toy_batch_pca.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def simulated() -> Cells:
    return cells()


def codes(labels: Any) -> np.ndarray:
    return pd.Index(NAMES).get_indexer(pd.Index(labels))


def toy_consensus(toy: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    pcas = [(toy[f"pca_{b}"].astype(dtype), codes(toy[f"labels_{b}"])) for b in BATCHES]
    return consensus_distances(pcas, 5, trim=0.05)


def test_the_consensus_is_that_of_the_paper_with_a_type_that_one_batch_lacks(toy, expected):
    order = codes(expected["consensus"]["labels"])
    matrix = np.array(expected["consensus"]["matrix"])
    np.testing.assert_allclose(toy_consensus(toy, "float32")[np.ix_(order, order)], matrix, atol=1e-12)
    np.testing.assert_allclose(toy_consensus(toy, "float64")[np.ix_(order, order)], matrix, atol=1e-6)


@pytest.mark.parametrize("name", ["X_pca", "X_2d", "X_islands", "X_random", "X_batch"])
def test_scores_are_those_of_the_paper_in_its_precision_and_differ_by_rounding_in_ours(toy, expected, name):
    by_label = [expected["per_type"][name]["weighted"][k] for k in NAMES]
    for dtype, tolerance in [("float32", 1e-10), ("float64", 5e-5)]:
        consensus = toy_consensus(toy, dtype)
        found = label_scores(toy[f"emb_{name}"].astype(dtype), codes(toy["labels"]), consensus, trim=0.05)
        np.testing.assert_allclose(found, by_label, atol=tolerance)
        score = expected["results"][name]["Corr-Weighted"]
        assert found.mean() == pytest.approx(score, abs=1e-10 if dtype == "float32" else 1e-5)


def test_from_expression_to_score_as_the_paper(golden, expected):
    adata = ad.read_h5ad(golden / "scgraph" / "scgraph_toy.h5ad")
    batch = pd.Index(BATCHES).get_indexer(pd.Index(adata.obs["batch"]))
    for expression in (adata.X, adata.X.toarray().astype(np.float64)):
        label = codes(adata.obs["cell_type"])
        pcas = [(pca, label[rows]) for rows, pca in batch_pcas(expression, batch)]
        consensus = consensus_distances(pcas, 5, trim=0.05)
        for name, scores in expected["results"].items():
            found = label_scores(np.asarray(adata.obsm[name]), label, consensus, trim=0.05).mean()
            assert found == pytest.approx(scores["Corr-Weighted"], abs=1e-4), name


def test_with_five_labels_there_is_no_score_but_a_reason(golden):
    adata = ad.read_h5ad(golden / "scgraph" / "scgraph_toy.h5ad")
    table = scgraph(dict(adata.obsm), adata.X, adata.obs["cell_type"], adata.obs["batch"])
    assert table["score"].isna().all()
    assert table["reason"].str.contains("5 labels of at least 10 cells").all()


def test_types_pushed_into_random_corners_win_the_silhouette_and_lose_scgraph(simulated):
    gamed = corners(simulated.types)
    table = scgraph(
        {"pca": simulated.pca, "gamed": gamed, "noise": noise(450)},
        simulated.log_expression,
        simulated.types,
        simulated.batches,
    )
    assert silhouette(gamed, simulated.types) > silhouette(simulated.pca, simulated.types) + 0.2
    assert table["score"]["pca"] > 0.9
    assert table["score"]["gamed"] < 0.5
    assert table["score"]["noise"] < 0.5
    assert (table["reason"] == "").all()


def test_sparse_and_dense_expression_and_labels_of_any_type_give_the_same(simulated):
    embeddings = {"pca": simulated.pca}
    expected = scgraph(embeddings, simulated.log_expression, simulated.types, simulated.batches)
    numbers = [k if k % 2 else str(k) for k in np.unique(simulated.types, return_inverse=True)[1].tolist()]
    found = scgraph(
        {"pca": simulated.pca.astype(np.float32)},
        simulated.log_expression.toarray(),
        numbers,
        pd.Categorical(simulated.batches),
    )
    assert found["score"]["pca"] == pytest.approx(expected["score"]["pca"], abs=1e-5)


def by_hand(points: np.ndarray, types: np.ndarray, pcas: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The score label by label, from principal components and types of each batch."""

    def distance(x: np.ndarray, of: np.ndarray, one: str, other: str) -> float:
        return float(np.linalg.norm(trim_mean(x[of == one], 0.05) - trim_mean(x[of == other], 0.05)))

    def mean_in_batches(one: str, other: str) -> float | None:
        both = [(x, of) for x, of in pcas if {one, other} <= set(of)]
        parts = [
            distance(x, of, one, other) / max(distance(x, of, k, other) for k in set(of)) for x, of in both
        ]
        return float(np.mean(parts)) if parts else None

    scores = []
    for label in np.unique(types):
        reference = {k: mean_in_batches(k, label) for k in np.unique(types) if k != label}
        reference = {k: mean for k, mean in reference.items() if mean is not None}
        found = [distance(points, types, k, label) for k in reference]
        weights = [1 / mean for mean in reference.values()]
        covariance = np.cov(found, list(reference.values()), aweights=weights)
        scores.append(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return float(np.mean(scores))


def test_small_batches_rare_types_and_pairs_that_no_batch_has_do_not_count(simulated):
    types, batches = simulated.types.copy(), simulated.batches.astype(object)
    types[[5, 200, 400]] = "rare"
    keep = np.where(types == "type 0", batches == "x", (types != "type 1") | (batches != "x"))
    types, batches, points = types[keep], batches[keep], simulated.pca[keep]
    batches[::20] = "small"  # its cells count in the embedding only
    expression = simulated.log_expression[keep]
    table = scgraph({"pca": points}, expression, types, batches, min_batch=80)

    frequent = types != "rare"
    large = pd.Index(["x", "y", "z"]).get_indexer(pd.Index(batches))
    pcas = [(pca[frequent[rows]], types[rows][frequent[rows]]) for rows, pca in batch_pcas(expression, large)]
    assert not any({"type 0", "type 1"} <= set(of) for _, of in pcas)
    assert table["score"]["pca"] == pytest.approx(by_hand(points[frequent], types[frequent], pcas), abs=1e-6)


def test_a_collapsed_embedding_has_no_score_and_leaves_the_others_theirs(simulated):
    embeddings = {"collapsed": np.full((450, 3), 0.1), "pca": simulated.pca, "equal": np.zeros((450, 8))}
    code = np.unique(simulated.types, return_inverse=True)[1]
    embeddings["equal"][np.arange(450), code] = 0.7
    table = scgraph(embeddings, simulated.log_expression, simulated.types, simulated.batches)
    assert table["score"].isna().tolist() == [True, False, True]
    assert table["reason"].tolist() == [
        "the embedding has all labels at one distance from each other",
        "",
        "the embedding has all labels at one distance from each other",
    ]


def test_batches_with_few_cells_or_genes_that_do_not_vary_are_survived_or_left_out(simulated):
    expression = simulated.log_expression.toarray()
    expression[simulated.batches == "x"] = 0.0
    expression[simulated.batches == "y", 3:] = 0.0
    batch = pd.Index(["x", "y", "z"]).get_indexer(pd.Index(simulated.batches))
    batch[np.flatnonzero(batch == 2)[4:]] = -1
    shapes = {batch[rows[0]]: pca.shape for rows, pca in batch_pcas(expression, batch)}
    assert shapes == {1: (150, 2), 2: (4, 3)}
    table = scgraph({"pca": simulated.pca}, expression, simulated.types, batch, min_batch=150)
    assert table["reason"]["pca"] == "1 batches of at least 150 cells and with varying genes; 2 needed"


def test_one_batch_is_no_consensus(simulated):
    table = scgraph({"pca": simulated.pca}, simulated.log_expression, simulated.types, np.zeros(450))
    assert table["reason"]["pca"].startswith("1 batches of at least 100 cells")


def test_labels_or_batches_that_are_all_too_small_give_a_reason(simulated):
    arguments = ({"pca": simulated.pca}, simulated.log_expression, simulated.types, simulated.batches)
    assert scgraph(*arguments, min_label=1000)["reason"]["pca"].startswith("0 labels of at least 1000 cells")
    assert scgraph(*arguments, min_batch=1000)["reason"]["pca"].startswith("0 batches of at least 1000 cells")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x: np.rint(x), "integers only: these are counts"),
        (lambda x: x - 1.0, "negative values: it is scaled"),
        (lambda x: np.where(x == x.max(), np.nan, x), "not finite"),
        (lambda x: x[:, :0], r"shape \(450, 0\)"),
        (lambda x: x[:-1], "labels has 450 entries for 449 cells"),
    ],
)
def test_expression_that_is_not_log_normalised_is_refused(simulated, change, error):
    expression = change(simulated.log_expression.toarray())
    with pytest.raises(ValueError, match=error):
        scgraph({"pca": simulated.pca}, expression, simulated.types, simulated.batches)


def test_an_embedding_of_other_cells_is_named(simulated):
    embeddings = {"pca": simulated.pca, "short": simulated.pca[:-1]}
    with pytest.raises(ValueError, match="Embedding 'short' has 449 cells, log_expression 450"):
        scgraph(embeddings, simulated.log_expression, simulated.types, simulated.batches)


@pytest.mark.parametrize("trim", [-0.1, 0.5])
def test_no_embedding_and_a_trim_that_leaves_nothing_are_refused(simulated, trim):
    arguments = (simulated.log_expression, simulated.types, simulated.batches)
    with pytest.raises(ValueError, match="at least one embedding"):
        scgraph({}, *arguments)
    with pytest.raises(ValueError, match=f"trim={trim}"):
        scgraph({"pca": simulated.pca}, *arguments, trim=trim)
