"""UCE against numbers of the original; every test here is a `test_against_uce`."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cellprior.model.uce import _checkpoint
from cellprior.model.uce._inputs import drawn_genes, released_sentences, sentences, weights_of
from cellprior.model.uce._module import Tokens, UCEModule

from .uce_golden import LENGTH, CaseA, case_a, embed

both = pytest.mark.parametrize("species", ["human", "mouse"])


@pytest.fixture(scope="module")
def case() -> CaseA:
    return case_a()


@pytest.fixture(scope="module")
def module(case, tmp_path_factory) -> UCEModule:
    return case.module(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def weights(case, tmp_path_factory):
    return case.bundle(tmp_path_factory.mktemp("converted"))


def close(found, expected, atol=1e-5) -> None:
    np.testing.assert_allclose(torch.as_tensor(found).numpy(), expected, rtol=1e-5, atol=atol)


# sentences


@both
def test_against_uce_draws_of_its_uniform_numbers_exactly(case, species):
    counts = case.counts(species)
    for i, uniform in enumerate(case[f"{species}/uniforms"]):
        part = slice(counts.indptr[i], counts.indptr[i + 1])
        found = counts.gene[part][drawn_genes(weights_of(counts.value[part]), uniform)]
        np.testing.assert_array_equal(found, case[f"{species}/sampled_gene"][i])


@both
def test_against_uce_whole_sentences_from_its_seed_but_for_genes_at_one_place(case, species):
    genome, stream = case.genome(species), np.random.RandomState(101)
    counts, order = case.counts(species), np.arange(len(genome.number))
    found = released_sentences(counts, genome, order, stream, length=LENGTH)
    np.testing.assert_array_equal(found.length, case[f"{species}/lengths"])
    official = np.concatenate([genome.number, 772 + genome.code, [2, 3, 0]])
    theirs, ours = case[f"{species}/tokens"][:, : found.token.shape[1]], official[found.token]
    tied = case.tied(species)
    assert 0 < tied.sum() < len(tied) / 2
    np.testing.assert_array_equal(ours[~tied], theirs[~tied])
    place = np.full((827, 2), -1)
    place[:, 0] = np.arange(827)  # of what is no gene, itself
    place[genome.number] = np.column_stack([-1 - genome.chromosome, genome.start])
    np.testing.assert_array_equal(place[ours], place[theirs])
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


@both
def test_against_uce_systematic_sentences_exactly(case, species):
    genome = case.genome(species)
    found = sentences(case.counts(species), genome, length=LENGTH, sampling="systematic")
    official = np.concatenate([genome.number, 772 + genome.code, [2, 3, 0]])
    np.testing.assert_array_equal(
        official[found.token], case[f"{species}/systematic_tokens"][:, : found.token.shape[1]]
    )


# the network, from its tokens


@both
@torch.no_grad()
def test_against_uce_hidden_states_and_decoded_ones(case, module, species):
    lengths = case[f"{species}/lengths"].astype(np.int64)
    whole = case.tokens(module, f"{species}/tokens", lengths)
    batch = Tokens(whole.token[:6, : int(whole.length[:6].max())], whole.length[:6])
    close(module.token_table(batch.token[:1]), case[f"{species}/batch0_token_vectors"])
    seen = np.arange(batch.token.shape[1]) < lengths[0]
    for padding, end in (("released", ""), ("masked", "_masked")):
        hidden = module.encode(batch, padding=padding)[:1]
        kept = seen if padding == "masked" else slice(None)
        # as near as float32 is: the original itself is 1e-4 from float64
        close(hidden[:, kept], case[f"{species}/batch0_layer1{end}"][:, kept], atol=1e-4)
        close(module.decoder(hidden)[:, kept], case[f"{species}/batch0_decoded{end}"][:, kept], atol=1e-4)


@both
@torch.no_grad()
def test_against_uce_embeddings_masked_alone_and_with_padding_seen_in_its_batches(case, module, species):
    tokens = case.tokens(module, f"{species}/tokens", case[f"{species}/lengths"])
    masked = module.latent_of(module.pool(tokens))
    close(masked, case[f"{species}/embedding_masked"])
    close(masked, case[f"{species}/embedding_alone"])
    released = []
    for some in torch.arange(len(tokens.token)).split(6):
        part = module.of(tokens, some)
        released.append(module.latent_of(module.pool(part, padding="released")))
    close(torch.cat(released), case[f"{species}/embedding"])
    assert np.abs(case[f"{species}/embedding"] - masked.numpy()).max() > 0.01


@both
@torch.no_grad()
def test_against_uce_logits_that_genes_are_expressed(case, module, species):
    genes = torch.from_numpy(case.row_of_token(module.genome)[case[f"{species}/gene_token"]])
    close(module.gene_table(genes[:8]), case[f"{species}/gene_vectors_raw"])
    latent = torch.from_numpy(case[f"{species}/embedding"][:8])
    close(module.predict(latent, genes), case[f"{species}/logits_raw"])
    close(module.predict_pairs(latent, genes.expand(8, -1)), case[f"{species}/logits_raw"])


@pytest.mark.parametrize(("padding", "name"), [("masked", "masked"), ("released", "released_mask")])
def test_against_uce_a_training_step(case, module, padding, name):
    tokens = case.tokens(module, "train/tokens", case["train/mask"].sum(1))
    latent = module.latent_of(module.pool(tokens, padding=padding))
    close(latent.detach(), case[f"train/{name}_embedding"])
    row = case.row_of_token(module.genome)[case["human/gene_token"]]
    logits = module.predict_pairs(latent, torch.from_numpy(row[case["train/query_gene"]]))
    close(logits.detach(), case[f"train/{name}_logits"])
    loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(case["train/target"]))
    assert loss.item() == pytest.approx(float(case[f"train/{name}_loss"]), rel=1e-6)


# from counts


@both
def test_against_uce_embeddings_of_its_script_from_raw_counts(case, weights, species):
    found = embed(
        weights, case.cells(species), sampling="released", padding="released", seed=101, batch_size=6
    )
    untied = ~case.tied(species)
    close(found[untied], case[f"{species}/embedding"][untied])
    cosine = (found * case[f"{species}/embedding"]).sum(1)
    assert np.median(cosine[~untied]) > 0.99


@both
def test_against_uce_embeddings_of_systematic_sentences_from_raw_counts(case, weights, species):
    found = embed(weights, case.cells(species), sampling="systematic")
    close(found, case[f"{species}/systematic_embedding"])


# the released shape


def test_against_uce_the_unmodified_network_of_four_layers(golden):
    folder = golden / "uce/caseC_4layer_shape"
    recipe = runpy.run_path(str(folder / "recipe_weights.py"))
    shapes = json.loads((folder / "tensors.json").read_text())["tensors"]
    with np.load(folder / "outputs.npz") as file:
        expected = dict(file)
    official = np.unique(np.concatenate([expected["tokens"].ravel(), expected["query_tokens"], [0, 2, 3]]))
    genes = official[~np.isin(official, (0, 2, 3))]  # chromosomes among them, which are rows like others
    tensors = {
        name: torch.from_numpy(recipe["make_tensor"](name, tuple(shape)))
        for name, (shape, _) in shapes.items()
        if name not in ("pe_embedding.weight", "pos_encoder.pe")
    }
    vectors = torch.from_numpy(recipe["token_rows"](official))
    found = _checkpoint.rename({**tensors, "pe_embedding.weight": vectors}, "golden")
    found.pop(_checkpoint.TABLE)
    arguments = _checkpoint.network(found, 5120, None, "golden")
    rows = np.searchsorted(official, [*genes, 2, 3, 0])
    found |= _checkpoint.tables(found, vectors, rows, len(genes))
    found["token_table.weight"] = torch.cat(
        [found["token_table.weight"][:-3], torch.zeros(1, 1280), found["token_table.weight"][-3:]]
    )
    with torch.device("meta"):
        module = UCEModule(len(genes), **arguments)
    module.load_state_dict(found, strict=False, assign=True)
    module.eval()
    ours = np.full(official.max() + 1, -1)
    ours[genes] = np.arange(len(genes))
    ours[[2, 3, 0]] = len(genes) + 1 + np.arange(3)
    tokens = Tokens(torch.from_numpy(ours[expected["tokens"]]), torch.from_numpy(expected["lengths"]))
    with torch.inference_mode():
        close(module.latent_of(module.pool(tokens)), expected["embedding_masked"])
        close(module.latent_of(module.pool(tokens)), expected["embedding_alone"])
        close(module.latent_of(module.pool(tokens, padding="released")), expected["embedding_released"])
        hidden = module.encode(tokens, padding="released")[..., :64]
        close(hidden, expected["layer_outputs_first64"][-1], atol=1e-4)
        latent = torch.from_numpy(expected["embedding_released"])
        query = torch.from_numpy(ours[expected["query_tokens"]])
        close(module.predict(latent, query), expected["logits_raw"])
