"""Geneformer against numbers of the original; every test here is a `test_against_geneformer`."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cellprior.model import Geneformer
from cellprior.model.data._counts import csr_tensor, read_rows
from cellprior.model.geneformer._checkpoint import rename
from cellprior.model.geneformer._inputs import rank_tokens
from cellprior.model.geneformer._vocabulary import read_tokens, shipped

from .geneformer_golden import Golden

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LAYERS = (-1, 0)


@pytest.fixture(params=["v1", "v2"])
def case(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture
def module(case: Golden, tmp_path: Path):
    return case.module(tmp_path)


def test_against_geneformer_tokens_exactly(case, module):
    sparse = csr_tensor(read_rows(case.counts.numpy(), np.arange(24)))
    for counts in (case.counts, sparse):
        tokens = module.tokens(counts)
        np.testing.assert_array_equal(tokens[case.kept], case["input_ids"][:, : tokens.shape[1]])
        assert (
            tokens[~case.kept] != 0
        ).sum() == 2 * module.special  # <cls> and <eos> of a cell without genes
        assert tokens.shape[1] == case["length"].max() == 96


def test_against_geneformer_tokens_of_real_cells_with_the_real_dictionaries(golden, mirror):
    vocabulary = shipped()
    theirs = read_tokens(
        *(mirror / f"{name}_gc30M.pkl" for name in ("token_dictionary", "gene_median_dictionary"))
    )
    np.testing.assert_array_equal(vocabulary.scale, theirs.scale)
    ids = vocabulary.genes["ensembl_id"].where(
        vocabulary.genes["ensembl_id"] != "", vocabulary.genes["symbol"]
    )
    their_ids = theirs.genes["ensembl_id"].where(theirs.genes["ensembl_id"] != "", theirs.genes["symbol"])
    assert ids.tolist() == their_ids.tolist()
    adata = ad.read_h5ad(golden / "geneformer" / "real_v1" / "counts.h5ad")
    row = {name: i for i, name in enumerate(ids)}
    known = np.array([name in row for name in adata.var["ensembl_id"]])
    rows = np.array([row[name] for name in adata.var["ensembl_id"][known]])
    order = np.argsort(rows)
    counts = csr_tensor(read_rows(adata.X[:, np.flatnonzero(known)[order]], np.arange(16)))
    tokens = rank_tokens(
        counts, torch.from_numpy(vocabulary.scale), n_positions=2048, special=False,
        gene_index=torch.from_numpy(rows[order]),
    )  # fmt: skip
    with np.load(golden / "geneformer" / "real_v1" / "outputs.npz") as outputs:
        np.testing.assert_array_equal(tokens, outputs["input_ids"][:, : tokens.shape[1]].astype(np.int64))
        assert tokens.shape[1] == outputs["length"].max() == 2048


@torch.inference_mode()
def test_against_geneformer_hidden_states_of_every_layer(case, module):
    tokens = case["input_ids"][:2]
    n_layers = len(module.encoder)
    assert len(case["hidden_states"]) == n_layers + 1
    for i, theirs in enumerate(case["hidden_states"]):
        ours = module.states(tokens, layer=i - n_layers)
        np.testing.assert_allclose(ours[tokens != 0], theirs[tokens != 0], **TOLERANCE)
        assert not ours[tokens == 0].any()


@torch.inference_mode()
def test_against_geneformer_attention(case, module):
    tokens = case["input_ids"][:1, : case["length"][0]]
    found = module.encoder[0].attention_map(module.embedder(tokens))[0, :1]
    n = tokens.shape[1]
    np.testing.assert_allclose(found, case["attention_layer0_cell0"][:, :n, :n], **TOLERANCE)
    np.testing.assert_allclose(module.attention(tokens).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@torch.inference_mode()
def test_against_geneformer_cells(case, module, layer):
    found = module.encode(case.counts, pooling="mean", layer=layer)
    np.testing.assert_allclose(found[case.kept], case[f"emb_cell_layer{layer}"], **TOLERANCE)
    assert not found[~case.kept].any()  # a mean over no genes
    if module.special:
        found = module.encode(case.counts, layer=layer)
        np.testing.assert_allclose(found[case.kept], case[f"emb_cls_layer{layer}"], **TOLERANCE)
        assert found[~case.kept].isfinite().all()
        assert found[~case.kept].any()


def test_against_geneformer_in_the_users_order_where_the_original_returns_another(case, tmp_path):
    theirs = case.arrays["cell_id"].tolist()
    assert case.arrays["extract_embs_order"].tolist() != theirs
    adata = case.adata()
    case.write(tmp_path / "official")
    model = Geneformer.from_pretrained(tmp_path / "official", adata)
    for layer in LAYERS:
        found = model.get_latent_representation(pooling="mean", layer=layer)
        np.testing.assert_allclose(found[case.kept], case[f"emb_cell_layer{layer}"], **TOLERANCE)
    model.release()


def test_against_geneformer_vectors_of_genes_in_context(case, tmp_path):
    case.write(tmp_path / "official")
    adata = case.adata()[case.kept].copy()
    model = Geneformer.from_pretrained(tmp_path / "official", adata)
    found = model.get_gene_representation()
    assert found.index.tolist() == adata.var_names[model.gene_match.index >= 0].tolist()
    vectors = found.groupby(
        model.genes["ensembl_id"].to_numpy()[model.gene_match.index[model.gene_match.index >= 0]]
    )
    genes = [name for name in case.arrays["emb_gene_ids"] if not name.startswith("<")]
    theirs = case["emb_gene_layer-1"][[not name.startswith("<") for name in case.arrays["emb_gene_ids"]]]
    np.testing.assert_allclose(vectors.first().loc[genes], theirs, **TOLERANCE)
    model.release()


def test_against_geneformer_masked_loss_and_its_gradients(case, module):
    shown, labels = case["mlm_input_ids"], case["mlm_labels"]
    logits = module.predict_genes(module.states(shown)[labels != -100])
    loss = F.cross_entropy(logits, labels[labels != -100])
    assert loss.item() == pytest.approx(float(case.arrays["mlm_loss"]), rel=5e-6)
    np.testing.assert_allclose(logits[::6].detach(), case["mlm_logits_at_labels"], rtol=1e-5, atol=2e-5)
    loss.backward()
    theirs = dict(
        zip(case.arrays["mlm_grad_names"].tolist(), case.arrays["mlm_grad_l2"].tolist(), strict=True)
    )
    ours = dict(module.named_parameters())
    theirs = rename({name: torch.tensor(value) for name, value in theirs.items()}, "golden")
    assert set(theirs) == set(ours)
    for name, norm in theirs.items():
        expected = 0.0 if name.endswith("key.bias") else norm.item()  # which the softmax does not see
        assert ours[name].grad.norm().item() == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    of_padding = ours["embedder.tokens.weight"].grad[0].norm().item()
    assert of_padding == pytest.approx(float(case.arrays["mlm_grad_word_embeddings_row0_l2"]), rel=1e-4)


def test_against_geneformer_the_other_file_and_the_other_places_of_dictionaries(tmp_path):
    case = Golden.load("v1")
    expected = case.module(tmp_path / "plain").state_dict()
    for options in (
        {"folder": tmp_path / "binary", "binary": True},
        {"folder": tmp_path / "inside", "dictionaries": tmp_path / "inside" / "dictionaries"},
        {"folder": tmp_path / "repository" / "V1", "dictionaries": tmp_path / "repository" / "geneformer"},
    ):
        found = case.module(**options).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_against_geneformer_folders_that_the_original_wrote(golden, tmp_path, version):
    case, stored = Golden.load(version), golden / "geneformer" / "caseA" / version
    (tmp_path / "dictionaries").symlink_to(stored / "dictionaries")
    for path in (stored / "checkpoint").iterdir():
        (tmp_path / path.name).symlink_to(path)
    model = Geneformer.from_pretrained(tmp_path, case.adata())
    found = model.get_latent_representation(pooling="mean")
    np.testing.assert_allclose(found[case.kept], case["emb_cell_layer-1"], **TOLERANCE)
    model.release()
