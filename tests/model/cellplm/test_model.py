"""Sentences, precision and the bare network; numbers of the original are compared in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from cellprior.model import CellPLM
from cellprior.model.cellplm import _module
from cellprior.model.cellplm._module import CellPLMModule
from cellprior.model.data._counts import csr_tensor

N_CELLS, N_GENES = 48, 40
NETWORK = {"n_hidden": 32, "n_layers": 2, "n_heads": 4, "n_latent": 8}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def adata() -> AnnData:
    rng = np.random.default_rng(0)
    adata = AnnData(sp.csr_matrix(rng.poisson(rng.gamma(1, 2, (N_CELLS, N_GENES))).astype(np.float32)))
    adata.var_names = [f"GENE{i}" for i in range(N_GENES)]
    adata.obs["batch"] = rng.permutation(np.repeat(["a", "b", "c"], N_CELLS // 3))
    return adata


def attach(adata: AnnData, batch_key: str | None = None, **network: object) -> CellPLM:
    """A CellPLM with random weights that calls itself trained."""
    CellPLM.setup_anndata(adata, batch_key=batch_key)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CellPLM(adata, **NETWORK, **network)
    model.is_trained_ = True
    return model


def test_cells_see_their_own_batch_and_no_other(adata):
    together = attach(adata, "batch").get_latent_representation()
    one_sentence = attach(adata.copy()).get_latent_representation()
    for name in "abc":
        cells = (adata.obs["batch"] == name).to_numpy()
        alone = attach(adata[cells].copy()).get_latent_representation()
        np.testing.assert_allclose(together[cells], alone, **CLOSE)
    assert np.abs(together - one_sentence).max() > 1e-3


@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_cells_that_are_not_asked_for_are_not_in_the_sentence(adata, batch_key):
    cells = np.random.default_rng(1).permutation(N_CELLS)[:20]
    by_indices = attach(adata, batch_key).get_latent_representation(indices=cells, batch_size=3)
    by_subset = attach(adata[cells].copy(), batch_key).get_latent_representation()
    np.testing.assert_allclose(by_indices, by_subset, **CLOSE)


@pytest.mark.filterwarnings("ignore:Category .* in adata.obs:UserWarning")
def test_a_sentence_may_have_one_cell(adata):
    adata.obs["batch"] = [f"cell {i}" for i in range(N_CELLS)]
    model = attach(adata, "batch")
    latent = model.get_latent_representation()
    alone = np.concatenate([model.get_latent_representation(indices=[i]) for i in range(N_CELLS)])
    np.testing.assert_allclose(latent, alone, **CLOSE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_projections_that_are_computed_again_are_those_that_are_kept(adata, monkeypatch, precision):
    model = attach(adata)
    kept = model.get_latent_representation(batch_size=7, precision=precision)
    monkeypatch.setattr(_module, "KEEP_BYTES", 0)
    again = model.get_latent_representation(batch_size=7, precision=precision)
    np.testing.assert_array_equal(again, kept)


def test_half_the_bits_give_nearly_the_same_embedding_whatever_the_batch_size(adata):
    model = attach(adata)
    exact = torch.from_numpy(model.get_latent_representation())
    for batch_size in (5, None):
        half = model.get_latent_representation(precision="bfloat16", batch_size=batch_size)
        assert half.dtype == np.float32
        assert torch.cosine_similarity(torch.from_numpy(half), exact).min() > 0.999


def test_the_mixture_is_of_no_concern_to_a_vae_and_decides_in_a_gmvae(adata):
    vae = attach(adata)
    np.testing.assert_array_equal(
        vae.get_latent_representation(mixture="argmax"), vae.get_latent_representation(mixture="sampled")
    )
    gmvae = attach(adata, latent="gmvae", n_clusters=3)
    expected, argmax = (gmvae.get_latent_representation(mixture=name) for name in ("expected", "argmax"))
    assert np.abs(expected - argmax).max() > 1e-3


def test_with_a_target_sum_sequencing_depth_does_not_matter(adata):
    deeper = adata.copy()
    deeper.X = deeper.X * 9
    for target_sum, same in ((1e4, True), (None, False)):
        shallow, deep = (
            attach(data, target_sum=target_sum).get_latent_representation() for data in (adata, deeper)
        )
        assert (np.abs(shallow - deep).max() < 1e-4) == same


# the network without AnnData


@pytest.fixture
def module() -> CellPLMModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CellPLMModule(N_GENES, **NETWORK, dropout_rate=0.5).eval()


@pytest.fixture
def counts() -> torch.Tensor:
    return torch.poisson(torch.full((9, N_GENES), 0.7), generator=torch.Generator().manual_seed(0))


def test_tensors_go_in_and_the_latent_comes_out(module, counts):
    latent = module.encode(counts)
    assert latent.shape == (9, 8)
    sparse = module.encode(csr_tensor(sp.csr_matrix(counts.numpy())))
    np.testing.assert_allclose(sparse.detach(), latent.detach(), **CLOSE)
    some = torch.arange(N_GENES - 1, 20, -1)
    zeroed = torch.zeros_like(counts).index_copy_(1, some, counts[:, some])
    by_index = module.encode(counts[:, some], gene_index=some)
    np.testing.assert_allclose(by_index.detach(), module.encode(zeroed).detach(), **CLOSE)


def test_every_parameter_of_the_encoder_has_a_gradient(module, counts):
    module.encode(counts).square().sum().backward()
    without = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert {name.split(".")[0] for name in without} == {"decoder", "latent"}
    assert {name for name in without if name.startswith("latent")} == {
        "latent.log_var.weight",
        "latent.log_var.bias",
    }


def test_dropout_acts_in_training_only(module, counts):
    assert torch.equal(module.encode(counts), module.encode(counts))
    module.train()
    assert not torch.equal(module.encode(counts), module.encode(counts))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"n_hidden": 30}, "n_hidden=30 must be divisible by n_heads=4 and by 4"),
        ({"n_hidden": 6, "n_heads": 3}, "n_hidden=6 must be divisible by n_heads=3 and by 4"),
        ({"latent": "ae"}, 'latent=\'ae\' is not known; choose "vae" or "gmvae"'),
    ],
)
def test_an_impossible_network_is_an_error(network, message):
    with pytest.raises(ValueError, match=message):
        CellPLMModule(N_GENES, **{**NETWORK, **network})
