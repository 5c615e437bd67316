"""UCE's face: one cell, one vector, of any species; training, and genes that are expressed."""

from __future__ import annotations

import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from cellprior.evaluate import masked_prediction
from cellprior.genes import GeneMatchError
from cellprior.model import UCE
from cellprior.model.uce._draws import average_of_draws
from cellprior.model.uce._encoder import SEVERAL_SPECIES
from cellprior.model.uce._floors import PresenceFloors
from tests.contract.models import blood_cells, tiny_uce
from tests.parity.uce_golden import case_a, embed

# a few epochs are too few to be good, and the models say so
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The golden case A of human and mouse: weights that make much of little."""
    return case_a().bundle(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def human_weights(tmp_path_factory):
    return case_a().bundle(tmp_path_factory.mktemp("human"), ("human",))


def together() -> ad.AnnData:
    parts = {species: case_a().cells(species) for species in ("human", "mouse")}
    return ad.concat(parts, join="outer", fill_value=0, index_unique="-")


@pytest.fixture(scope="module")
def model(weights):
    model = UCE.from_pretrained(weights, together())
    yield model
    model.release()


# one cell, one vector


@pytest.mark.parametrize("how", [{}, {"n_draws": 3}, {"sampling": "systematic"}, {"seed": 7}])
def test_a_cell_has_the_same_vector_alone_in_any_batch_and_in_any_order(model, how):
    expected = model.get_latent_representation(**how)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-5)
    order = np.random.default_rng(0).permutation(len(expected))
    shuffled = model.get_latent_representation(indices=order, batch_size=17, **how)
    np.testing.assert_allclose(shuffled, expected[order], rtol=0, atol=1e-6)
    for i in (0, 30):
        alone = model.get_latent_representation(indices=[i], **how)
        np.testing.assert_allclose(alone[0], expected[i], rtol=0, atol=1e-6)


def test_a_file_of_two_species_one_of_each_and_nine_cells_give_the_same_vectors(model, weights):
    expected = model.get_latent_representation()
    found = [embed(weights, case_a().cells(species)) for species in ("human", "mouse")]
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=1e-6)
    few = embed(weights, case_a().cells("human")[:9].copy())
    np.testing.assert_allclose(few, expected[:9], rtol=0, atol=1e-6)


def test_other_draws_are_other_vectors_and_not_far(model):
    expected = model.get_latent_representation()
    for how in ({"seed": 1}, {"n_draws": 4}, {"sampling": "systematic"}, {"padding": "released"}):
        cosine = (model.get_latent_representation(**how) * expected).sum(1)
        assert 0.7 < np.median(cosine) < 1 - 1e-5, how


def test_the_spread_falls_as_one_over_the_draws_and_is_what_the_vectors_differ_by(model):
    spread, vectors = {}, {}
    for n in (1, 4, 16):
        vectors[n], spread[n] = model.get_latent_representation(n_draws=n, return_spread=True)
        assert spread[n].shape == (41,)
    assert np.isnan(spread[1]).all()
    np.testing.assert_array_equal(vectors[1], model.get_latent_representation())
    assert 2.5 < np.mean(spread[4]) / np.mean(spread[16]) < 6.5
    far, _ = model.get_latent_representation(n_draws=100, seed=1, return_spread=True)
    for n in (4, 16):
        assert np.mean(1 - (vectors[n] * far).sum(1)) == pytest.approx(np.mean(spread[n]), rel=0.5)


def test_the_spread_is_that_of_directions_around_a_known_one():
    torch.manual_seed(0)
    draws = torch.nn.functional.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.1 * torch.randn(2000, 8, 4), dim=2)
    mean, spread = average_of_draws(draws.flatten(0, 1), 8)
    assert (1 - mean[:, 0]).mean().item() == pytest.approx(spread.mean().item(), rel=0.1)


def test_cells_without_counts_have_a_finite_vector(weights):
    adata = case_a().cells("human")
    adata.X[[0, 5]] = 0
    found = embed(weights, adata)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[5], rtol=0, atol=1e-6)
    np.testing.assert_allclose(embed(weights, adata, sampling="released")[0], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n_draws": 0}, "n_draws=0"),
        ({"sampling": "random"}, "sampling='random' is not known"),
        ({"padding": "none"}, "padding='none' is not known"),
        ({"sampling": "released", "n_draws": 2}, "has one draw"),
        ({"padding": "released", "sampling": "systematic"}, "has one draw"),
        ({"sampling": "released", "seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"padding": "released", "batch_size": 0}, "batch_size=0"),
    ],
)
def test_an_argument_that_is_not_known_is_refused(model, how, message):
    with pytest.raises(ValueError, match=message):
        model.get_latent_representation(**how)


# species


def test_a_species_that_the_weights_lack_is_refused_by_name(human_weights, weights):
    with pytest.raises(GeneMatchError, match="mouse .or rat. gene names.*know human"):
        UCE.from_pretrained(human_weights, case_a().cells("mouse"))
    fish = case_a().cells("human")
    fish.var_names = fish.var_names.str.lower()
    with pytest.raises(GeneMatchError, match="zebrafish.*know human and mouse"):
        UCE.from_pretrained(weights, fish)
    model = UCE.from_pretrained(human_weights, case_a().cells("human"))
    with pytest.raises(GeneMatchError, match="know human"):
        model.get_latent_representation(case_a().cells("mouse"))
    model.release()


def test_the_species_can_be_said_and_is_kept_for_queries(weights, tmp_path):
    capitals = case_a().cells("mouse")
    capitals.var_names = capitals.var_names.str.upper()
    expected = embed(weights, case_a().cells("mouse"))
    UCE.setup_anndata(capitals, species="mouse")
    model = UCE.from_pretrained(weights, capitals)
    np.testing.assert_array_equal(model.get_latent_representation(), expected)
    np.testing.assert_array_equal(model.get_latent_representation(capitals[:5].copy()), expected[:5])
    model.save(tmp_path / "saved", save_anndata=True)
    model.save_pretrained(tmp_path / "bundle")
    again = UCE.load(str(tmp_path / "saved"))
    np.testing.assert_array_equal(again.get_latent_representation(), expected)
    np.testing.assert_array_equal(embed(tmp_path / "bundle", case_a().cells("mouse")), expected)
    for each in (model, again):
        each.release()


def test_of_a_doublet_the_genes_of_one_species_are_read_and_that_is_said(weights):
    both = together()
    mixed = both[[0]].copy()
    mixed.X = both.X[[0]] * 4 + both.X[[30]]
    with pytest.warns(UserWarning, match="another species than their own: doublets"):
        found = embed(weights, mixed)
    alone = case_a().cells("human")[[0]].copy()
    alone.X = alone.X * 4
    np.testing.assert_allclose(found, embed(weights, alone), rtol=0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some cells have more")
        embed(weights, together())
    assert "most counts" in SEVERAL_SPECIES


# genes


def test_whether_genes_are_expressed_is_said_of_any_species_by_any_name(model):
    names = ["ACTB", "Actb", "CD3D"]
    probability = model.predict_expressed(["GAPDH", "Krt8"], indices=[0, 40])
    assert probability.index.tolist() == model.adata.obs_names[[0, 40]].tolist()
    assert ((0 < probability) & (probability < 1)).all(axis=None)
    symbols = model.genes["symbol"].tolist()
    latent = torch.from_numpy(model.get_latent_representation(indices=[0, 40]))
    rows = torch.tensor([symbols.index("GAPDH"), symbols.index("Krt8")])
    expected = model.module.predict(latent, rows).sigmoid()
    np.testing.assert_allclose(probability, expected.detach(), rtol=0, atol=1e-6)
    shared = next(n for n in symbols if n.upper() != n and n.upper() in symbols)  # in both species
    own, other = (model.predict_expressed([n], indices=[0]).iloc[0, 0] for n in (shared, shared.upper()))
    assert own != other
    mouse = model.predict_expressed([shared.upper()], indices=[0], species="mouse").iloc[0, 0]
    assert mouse == pytest.approx(own, abs=1e-6)
    with pytest.raises(KeyError, match="NOTAGENE.*no gene of the vocabulary"):
        model.predict_expressed(["NOTAGENE"])
    with pytest.raises(KeyError, match="species='rat': the weights know human, mouse"):
        model.predict_expressed(names[:1], species="rat")
    with pytest.raises(TypeError, match="one text"):
        model.predict_expressed("ACTB")


def test_genes_may_be_asked_for_by_the_names_that_the_data_have():
    adata = blood_cells()[:20].copy()
    model = UCE.from_pretrained(tiny_uce(), adata)
    frame = model.gene_match.to_frame()
    retired = frame[frame["route"] == "retired_symbol"].iloc[0]
    found = model.predict_expressed([retired["name"], retired["gene"]])
    np.testing.assert_array_equal(found.iloc[:, 0], found.iloc[:, 1])
    model.release()


def test_a_name_that_several_species_have_needs_the_species(model):
    genes = model.genes
    twice = genes["symbol"].str.lower()
    name = twice[twice.duplicated()].iloc[0]  # spelled as in neither
    with pytest.raises(KeyError, match="a gene of human, mouse: say which species, species='human'"):
        model.predict_expressed([name])


def test_vectors_of_genes_are_what_the_first_layer_makes_of_their_proteins(model):
    found = model.get_gene_representation()
    assert found.shape == (model.gene_match.n_matched, 32)
    human = model.get_gene_representation(species="human")
    assert human.shape == (410, 32)
    name = case_a().cells("human").var_names[0]
    np.testing.assert_array_equal(found.loc[name], human.loc[name])
    table = torch.from_numpy(case_a()["param/pe_embedding.weight"])
    official = case_a().offsets["human"] + [n.upper() for n in case_a().names("human")].index(name.upper())
    encoded = model.module.token_encoder(torch.nn.functional.normalize(table[[official]], dim=1))
    np.testing.assert_allclose(found.loc[name], encoded[0], rtol=0, atol=1e-6)


# training


def test_training_lowers_the_loss_beside_its_floors_and_leaves_the_proteins_alone(weights):
    scvi.settings.seed = 0
    model = UCE.from_pretrained(weights, together())
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    model.train(max_epochs=8, batch_size=8, plan_kwargs={"lr": 3e-3, "n_queries": 40}, **QUIET)
    history = {name: values.iloc[:, 0] for name, values in model.history.items()}
    assert history["train_presence"].iloc[-1] < history["train_presence"].iloc[0]
    assert history["validation_presence_floor_chance"].iloc[-1] == pytest.approx(np.log(2), rel=1e-5)
    for predictor in ("gene_rate", "gene_rate_at_depth"):
        assert history[f"validation_presence_floor_{predictor}"].iloc[-1] < np.log(2)
        assert f"validation_presence_accuracy_floor_{predictor}" in history
    kept = {
        name.partition(".")[0]
        for name, x in model.module.state_dict().items()
        if torch.equal(x, before[name])
    }
    assert kept == {
        "gene_number", "gene_chromosome", "gene_start", "gene_species", "chromosome_code",
        "token_table", "gene_table", "token_encoder", "gene_encoder",
    }  # fmt: skip
    model.release()


def test_without_proteins_the_vectors_of_genes_are_learned():
    adata = blood_cells()[:60].copy()
    UCE.setup_anndata(adata)
    network = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_feedforward": 16, "n_latent": 8}
    network |= {"decoder_width": 8, "binary_widths": [8], "sentence_length": 32}
    model = UCE(adata, **network)
    before = model.module.token_table.weight.detach().clone()
    model.train(max_epochs=1, batch_size=32, **QUIET)
    assert not torch.equal(model.module.token_table.weight, before)
    assert model.get_latent_representation().shape == (60, 8)
    model.release()


def test_the_floor_at_depth_knows_that_deep_cells_express_more_and_the_rate_is_a_share():
    rng = np.random.default_rng(0)
    depth = rng.choice([0.2, 2.0], 400)
    level = rng.gamma(0.5, 1.0, 60)
    counts = torch.from_numpy(rng.poisson(depth[:, None] * level)).float()
    adata = ad.AnnData(counts.numpy(), var=pd.DataFrame(index=[f"G{i}" for i in range(60)]))
    UCE.setup_anndata(adata)
    network = {"n_hidden": 4, "n_layers": 1, "n_heads": 1, "n_feedforward": 4, "n_latent": 4}
    model = UCE(adata, **network, decoder_width=4, binary_widths=[4], sentence_length=8)
    known = torch.ones(1, 60, dtype=torch.bool)
    floors = PresenceFloors.fit(model.module, [{"X": counts[:200]}, {"X": counts[200:]}], known)
    expressed = (counts > 0).float()
    np.testing.assert_allclose(floors.expressed, expressed.sum(0))
    np.testing.assert_allclose(floors.cells, (expressed.sum(1) > 0).sum())
    query, n = torch.arange(60).expand(400, -1), expressed.sum(1)
    found = floors.predict(query, known.expand(400, -1), n)
    np.testing.assert_allclose(found["gene_rate"][0], expressed.mean(0), atol=0.01)
    at_depth = found["gene_rate_at_depth"]
    np.testing.assert_allclose(at_depth.sum(1), n, atol=0.1)  # as many genes as the cell expresses
    truth = 1 - np.exp(-depth[:, None] * level)
    better = [np.abs(p - truth).mean() for p in (found["gene_rate"].numpy(), at_depth.numpy())]
    assert better[1] < better[0] / 2
    # as many are asked for that are expressed as not: the odds are those of the cell
    logits = floors.logits(query, known.expand(400, -1), n, n_positive=n, n_negative=60 - n)
    both = (n > 0) & (n < 60)
    np.testing.assert_allclose(logits["gene_rate"][both], found["gene_rate"][both].logit(), atol=1e-4)
    model.release()


def test_masked_prediction_compares_with_the_floors():
    model = UCE.from_pretrained(tiny_uce(), blood_cells()[:90].copy())
    table = masked_prediction(model, seeds=2, mask_shares=(0.3,), progress=False)
    assert set(table["metric"]) == {"cross_entropy", "accuracy"}
    value = table[table["metric"] == "cross_entropy"].set_index("method")["value"]
    assert set(value.index) == {"model", "chance", "gene_rate", "gene_rate_at_depth"}
    assert value["chance"] == pytest.approx(np.log(2), rel=1e-4)
    assert value["gene_rate"] < value["chance"]
    model.release()


def test_labels_of_one_species_are_given_to_cells_of_another(weights):
    scvi.settings.seed = 0
    adata = case_a().cells("human")
    adata.obs["kind"] = np.where(np.arange(26) % 2, "a", "b")
    UCE.setup_anndata(adata, labels_key="kind")
    model = UCE.from_pretrained(weights, adata)
    before = model.get_latent_representation()
    model.fine_tune(max_epochs=2, calibration_size=0.0, **QUIET)
    assert set(model.predict(case_a().cells("mouse"))) <= {"a", "b"}
    model.fine_tune(trainable="head", max_epochs=1, calibration_size=0.0, **QUIET)
    assert np.abs(model.get_latent_representation() - before).max() > 1e-6  # the first trained the last layer
    model.release()
