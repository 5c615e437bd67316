"""Labels of one species read on another."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from cellprior.evaluate import across_species, knn_predict, macrogenes
from cellprior.evaluate._intervals import Resampling, interval
from cellprior.evaluate._species import MACROGENES, SYMBOLS, macrogene_weights
from cellprior.evaluate._splits import Split

N_FAMILIES, N_TYPES, WIDTH = 60, 3, 12


def species(seed: int, names: str, *, symbols: bool = False) -> tuple[AnnData, pd.DataFrame]:
    """Cells of three types; two genes of each family of proteins, called as the other species' or not at all."""
    rng = np.random.default_rng(seed)
    family = np.repeat(np.arange(N_FAMILIES), 2)
    proteins = np.random.default_rng(99).normal(size=(N_FAMILIES, WIDTH))  # the same in both
    vectors = proteins[family] + 0.05 * rng.normal(size=(len(family), WIDTH))
    label = np.arange(90) % N_TYPES
    rate = np.where(family[None] % N_TYPES == label[:, None], 6.0, 1.0) * rng.gamma(5, 0.2, len(family))
    index = [f"{names}{i}" for i in range(len(family))]
    obs = pd.DataFrame({"kind": [f"type {c}" for c in label]}, index=[f"{names}cell{i}" for i in range(90)])
    adata = AnnData(rng.poisson(rate).astype(np.float32), obs=obs, var=pd.DataFrame(index=index))
    return adata, pd.DataFrame(vectors, index=index)


@pytest.fixture(scope="module")
def both():
    """The symbols of one are those of the other, in no order of families: what is called alike is not alike."""
    reference, of_reference = species(0, "GENE")
    query, of_query = species(1, "Gene")
    names = query.var_names[np.random.default_rng(2).permutation(query.n_vars)]
    query.var_names, of_query.index = names, names
    noise = np.random.default_rng(3)
    reference.obsm["noise"], query.obsm["noise"] = noise.normal(size=(90, 4)), noise.normal(size=(90, 4))
    return reference, query, (of_reference, of_query)


def test_macrogenes_find_types_by_like_proteins_where_symbols_mislead(both):
    reference, query, vectors = both
    table = across_species(reference, query, "noise", "kind", vectors=vectors, n_macrogenes=30)
    value = table[table["metric"] == "macro_f1"].set_index("method")["value"]
    assert value[f"{MACROGENES}, each species standardised"] > 0.95
    assert value[MACROGENES] > 0.95
    assert value[SYMBOLS] < 0.6
    assert value["noise"] < 0.6
    assert set(table["kind"]) == {"embedding", "baseline"}
    worst = table.set_index(["method", "metric"]).loc[("noise", "macro_f1")]
    assert worst["versus"].startswith(MACROGENES)
    assert worst["low"] <= worst["value"] <= worst["high"]
    assert worst["difference_high"] < 0


def test_an_embedding_that_knows_is_better_than_symbols_and_arrays_are_as_good_as_keys(both):
    reference, query, _ = both
    codes = [np.eye(3)[np.arange(90) % 3] for _ in range(2)]
    table = across_species(reference, query, {"oracle": tuple(codes)}, "kind")
    of_oracle = table[table["method"] == "oracle"]
    assert (of_oracle["value"] == 1).all()
    assert (of_oracle["difference_low"] > 0).all()
    assert not table["method"].str.contains(MACROGENES).any()  # no vectors were given


def test_symbols_are_paired_whatever_their_capitals_and_only_where_each_is_there_once():
    reference, _ = species(0, "GENE")
    query, _ = species(1, "Gene")
    table = across_species(reference, query, {"nothing": (np.zeros((90, 1)), np.zeros((90, 1)))}, "kind")
    value = table[table["metric"] == "macro_f1"].set_index("method")["value"]
    assert value[SYMBOLS] > 0.95
    query.var_names = ["Same"] * query.n_vars
    with pytest.raises(ValueError, match="0 symbols in common"):
        across_species(reference, query, {"nothing": (np.zeros((90, 1)), np.zeros((90, 1)))}, "kind")


def test_weights_of_macrogenes_fall_with_the_rank_of_their_distance():
    rng = np.random.default_rng(0)
    proteins = rng.normal(size=(90, 5))
    weight = macrogene_weights(proteins, 10, seed=0)
    rank = np.arange(1, 11)
    np.testing.assert_allclose(np.sort(weight[0].toarray()[0])[::-1], 2 * np.log1p(1 / rank) ** 2, rtol=1e-6)
    nearest = weight.argmax(axis=1).ravel()
    for group in np.unique(nearest):  # genes of one macrogene are nearer to each other than to others
        own = np.asarray(nearest).ravel() == group
        center = proteins[own].mean(0)
        assert (
            np.linalg.norm(proteins[own] - center, axis=1).mean()
            < np.linalg.norm(proteins[~own] - center, axis=1).mean()
        )


def test_intervals_across_species_are_those_of_all_other_tables(both):
    reference, query, _ = both
    table = across_species(reference, query, "noise", "kind").set_index(["method", "metric"])
    for metric in ("macro_f1", "balanced_accuracy"):
        row = table.loc[("noise", metric)]
        codes = pd.factorize(query.obs["kind"], sort=True)[0]
        train = pd.factorize(reference.obs["kind"], sort=True)[0]
        said = knn_predict(reference.obsm["noise"], train, query.obsm["noise"])
        one = Split("", 0, "", np.arange(len(train)), np.arange(len(codes)))
        again = Resampling(len(codes), [one]).classification(codes, [said])[metric]
        np.testing.assert_allclose(row[["value", "low", "high"]].astype(float), interval(again))


def test_what_cannot_be_compared_is_refused(both):
    reference, query, vectors = both
    cells = [reference, query]
    other = query.copy()
    other.obs["kind"] = "else"
    unlike = {"a": (np.zeros((90, 2)), np.zeros((90, 3)))}
    for call, error, message in (
        (lambda: across_species(reference, other, "noise", "kind"), ValueError, "0 labels are in both"),
        (lambda: across_species(reference, query, "noise", "type"), KeyError, "'type' not found"),
        (lambda: across_species(reference, query, "X_uce", "kind"), KeyError, "'X_uce' is not in obsm of both"),
        (lambda: across_species(reference, query, unlike, "kind"), ValueError, r"a has the shapes \(90, 2\)"),
        (lambda: macrogenes(cells, vectors[:1]), ValueError, "2 species and vectors of 1"),
        (lambda: macrogenes(cells, (vectors[0], vectors[1].iloc[:, :5])), ValueError, "12, 5 numbers"),
        (lambda: macrogenes(cells, (vectors[0], vectors[0])), ValueError, "0 of 120 genes"),
        (lambda: macrogenes(cells, (vectors[0] * np.nan, vectors[1])), ValueError, "not finite"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
