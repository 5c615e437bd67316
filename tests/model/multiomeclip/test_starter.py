"""The weights that come with the package."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

import cellprior as cp

from .data import multiome

STARTER = "multiomeclip-starter"


@pytest.fixture(scope="module")
def model() -> cp.model.MultiomeCLIP:
    return cp.model.MultiomeCLIP.from_pretrained(STARTER)


@pytest.fixture(scope="module")
def mdata(model) -> MuData:
    """Made-up cells of two kinds, with three quarters of the features that the starter knows, in another order."""
    rng = np.random.default_rng(0)
    names = [f"cell{i}" for i in range(40)]
    parts = {}
    for name, known, depth in (("rna", model.genes["symbol"], 300), ("atac", model.peaks, 100)):
        kept = rng.permutation(len(known))[: len(known) * 3 // 4]
        rates = rng.dirichlet(np.full(len(kept), 0.1), 2)
        x = np.stack([rng.multinomial(depth, rates[i % 2]) for i in range(len(names))]).astype(np.float32)
        parts[name] = AnnData(sp.csr_matrix(x))
        parts[name].obs_names, parts[name].var_names = names, np.asarray(known)[kept]
    return multiome(parts)


def test_the_starter_embeds_rna_atac_or_both_by_its_name(mdata):
    alone = {}
    for name in ("rna", "atac"):
        adata = mdata[name].copy()
        cp.tl.embed(adata, STARTER)
        alone[name] = adata.obsm["X_multiomeclip"]
        assert alone[name].shape == (40, 64) and np.isfinite(alone[name]).all()
        assert adata.uns["cellprior"]["X_multiomeclip"]["weights"] == STARTER
    both = multiome({name: mdata[name].copy() for name in ("rna", "atac")})
    cp.tl.embed(both, STARTER)
    np.testing.assert_allclose(both.obsm["X_multiomeclip"], (alone["rna"] + alone["atac"]) / 2, atol=1e-5)


def test_the_starter_matches_and_names_cells_that_it_has_never_seen(model, mdata):
    pairs = model.match(mdata["atac"], mdata["rna"])
    assert set(pairs["partner"]) <= set(mdata["rna"].obs_names)
    reference = mdata["rna"].copy()
    reference.obs["kind"] = [f"kind {i % 2}" for i in range(40)]
    named = model.transfer_labels(
        reference, reference, labels_key="kind", source="rna", target="rna", n_neighbors=5
    )
    assert (named["label"].to_numpy() == reference.obs["kind"].to_numpy()).mean() > 0.9


def test_the_card_of_the_starter_has_baselines_and_what_it_is_not_for():
    card = str(cp.weights.card(STARTER))
    for word in ("PLS", "sequencing depth alone", "chance", "PCA of RNA", "mm10", "Mouse", "left out"):
        assert word in card
