import numpy as np
import pytest
import torch

from cellprior.evaluate._twin import has_random_weights, random_twin, same_weights
from cellprior.model import CellPLM
from tests.contract.models import PRETRAINED, blood_cells

pytestmark = pytest.mark.filterwarnings("ignore:No assay is named:UserWarning")  # of Nicheformer

ENTRIES = pytest.mark.parametrize("entry", PRETRAINED, ids=lambda entry: entry.name)


@ENTRIES
def test_a_twin_has_the_same_network_and_vocabulary_and_other_weights(entry):
    adata = blood_cells()
    model = entry.attach(adata, batch_key="batch")
    twin = random_twin(model, adata[:100].copy(), seed=1)
    assert type(twin) is type(model)
    assert twin.genes.equals(model.genes)
    # a twin knows no names, should the weights have come with some
    of_network = {name for name in model.module.state_dict() if not name.startswith("annotation.")}
    assert twin.module.state_dict().keys() == of_network
    for name, tensor in model.module.named_parameters():
        if name not in of_network:
            continue
        other = twin.module.get_parameter(name)
        assert other.shape == tensor.shape
        if tensor.ndim > 1:
            assert not torch.equal(other, tensor), name
    assert twin.get_latent_representation().shape == (100, model.module.n_latent)
    assert twin.registry["setup_args"]["batch_key"] == "batch"
    assert has_random_weights(twin)
    assert not has_random_weights(model)
    assert twin.provenance()["weights"] == "random weights"


def test_the_seed_makes_the_twin_and_leaves_the_global_random_state_alone():
    adata = blood_cells()
    model = PRETRAINED[0].attach(adata)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (random_twin(model, adata, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    x, y, z = (twin.module.embedder.gene_embedding for twin in (first, second, other))
    assert torch.equal(x, y)
    assert not torch.equal(x, z)


def test_a_twin_that_was_trained_is_random_no_more():
    adata = blood_cells()[:64].copy()
    CellPLM.setup_anndata(adata)
    model = CellPLM(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4)
    assert has_random_weights(model)
    twin = random_twin(model, adata, seed=0)
    twin.history_ = {"train_loss": None}
    assert not has_random_weights(twin)


@ENTRIES
def test_the_same_weights_on_other_cells_embed_as_the_model_does(entry):
    adata = blood_cells()
    model = entry.attach(adata)
    part = adata[:80].copy()
    copy = same_weights(model, part)
    np.testing.assert_array_equal(copy.get_latent_representation(), model.get_latent_representation(part))
    assert copy.provenance()["weights"] == model.provenance()["weights"]
    assert copy.module is not model.module


def test_data_that_were_not_set_up_are_set_up_as_those_of_the_model():
    adata = blood_cells()
    adata.layers["counts"] = adata.X
    model = PRETRAINED[0].attach(adata, layer="counts", batch_key="batch")
    other = blood_cells()
    other.layers["counts"] = other.X
    args = random_twin(model, other[:20], seed=0).registry["setup_args"]
    assert (args["layer"], args["batch_key"]) == ("counts", "batch")


def test_what_is_no_model_has_no_twin():
    with pytest.raises(TypeError, match="CellPLM or ScBERT is needed.*found str"):
        random_twin("cellplm-starter", blood_cells(), seed=0)
