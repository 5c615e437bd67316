"""What the model classes share, beyond the promises in tests/contract: shown with a tiny CellPLM."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData

from cellprior.model import CellPLM, MultiomeCLIP, NotCountsError, ScBERT
from cellprior.model.files._loading import load_strictly
from cellprior.weights import WeightsError, write_bundle

N_CELLS, N_GENES = 30, 60
NETWORK = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture(scope="module")
def genes() -> pd.DataFrame:
    number = pd.Series(range(N_GENES)).astype(str)
    return pd.DataFrame(
        {
            "ensembl_id": "ENSG" + number.str.zfill(11),
            "symbol": "GENE" + number,
            "previous_symbols": "OLD" + number,
        }
    )


@pytest.fixture(scope="module")
def bundle(genes: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = CellPLM._module_cls(N_GENES, **NETWORK).state_dict()
    return write_bundle(
        tmp_path_factory.mktemp("weights") / "tiny",
        state_dict=tensors,
        config={"model": "CellPLM", "network": NETWORK},
        genes=genes,
        card="# Tiny\n",
    )


@pytest.fixture
def adata() -> AnnData:
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(2, (N_CELLS, N_GENES)).astype(np.float32))
    obs = pd.DataFrame(
        {"sample": np.where(np.arange(N_CELLS) % 2, "odd", "even"), "kind": "T"},
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))


@pytest.fixture
def model(bundle: Path, adata: AnnData) -> CellPLM:
    return CellPLM.from_pretrained(bundle, adata)


@pytest.fixture
def latent(model: CellPLM) -> np.ndarray:
    return model.get_latent_representation()


# setup


def test_setup_refuses_a_view(adata):
    with pytest.raises(ValueError, match=r"adata = adata\.copy\(\)"):
        CellPLM.setup_anndata(adata[:5])


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"gene_key": "nope"}, r"'nope' not found in adata\.var; its columns are \['name'\]"),
        ({"batch_key": "nope"}, r"'nope' not found in adata\.obs; its columns are \['sample', 'kind'\]"),
        ({"labels_key": "nope"}, r"'nope' not found in adata\.obs; its columns are \['sample', 'kind'\]"),
    ],
)
def test_a_column_that_does_not_exist_is_named(adata, setup, message):
    adata.var["name"] = adata.var_names
    with pytest.raises(KeyError, match=message):
        CellPLM.setup_anndata(adata, **setup)


def test_the_column_of_gene_names_can_be_said(adata, bundle, latent):
    adata.var["shifted"] = np.roll(adata.var_names, 1)
    CellPLM.setup_anndata(adata, gene_key="shifted")
    shifted = CellPLM.from_pretrained(bundle, adata)
    assert shifted.gene_match.source == "shifted"
    assert np.abs(shifted.get_latent_representation() - latent).max() > 0.01


def test_labels_that_are_numbers_can_be_used(adata, bundle, latent):
    adata.obs["number"] = np.arange(N_CELLS) % 3
    CellPLM.setup_anndata(adata, labels_key="number")
    np.testing.assert_array_equal(CellPLM.from_pretrained(bundle, adata).get_latent_representation(), latent)


def test_scvi_can_show_the_setup_and_the_model(model, capsys):
    model.view_anndata_setup()
    assert "CellPLM.setup_anndata" in capsys.readouterr().out
    repr(model)
    shown = capsys.readouterr().out
    assert "CellPLM: 60 genes, n_hidden=16" in shown
    assert "Trained" in shown


# models from scratch and from weights


def test_a_model_from_scratch_has_the_genes_of_its_data_and_does_not_embed_before_it_is_trained(adata):
    CellPLM.setup_anndata(adata)
    model = CellPLM(adata, **NETWORK)
    assert model.genes["symbol"].tolist() == adata.var_names.tolist()
    assert model.gene_match.coverage == 1
    with pytest.raises(RuntimeError, match="train"):
        model.get_latent_representation()


def test_a_vocabulary_may_be_a_list_of_ids_and_symbols(adata):
    CellPLM.setup_anndata(adata)
    ids = [f"ENSG{i:011d}" for i in range(3)]
    model = CellPLM(adata, genes=[*ids, *adata.var_names[10:]], **NETWORK)
    assert model.genes["ensembl_id"].tolist() == ids + [""] * 50
    assert model.genes["symbol"].tolist() == ["", "", "", *adata.var_names[10:]]
    assert model.gene_match.n_matched == 50


def test_the_weights_are_those_of_the_file_and_the_model_says_where_they_are_from(model, bundle):
    import safetensors.torch

    stored = safetensors.torch.load_file(bundle / "model.safetensors")
    tensors = model.module.state_dict()
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())
    assert not model.module.training
    assert model.pretrained_["weights"] == str(bundle)
    assert len(model.pretrained_["sha256"]) == 64


def test_a_folder_that_is_neither_bundle_nor_checkpoint_is_refused(adata, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(WeightsError, match=f"{tmp_path.name}.* holds no bundle"):
        CellPLM.from_pretrained(tmp_path, adata)


def test_half_precision_on_disk_is_single_in_memory(adata, bundle, genes, latent, tmp_path):
    tensors = CellPLM.from_pretrained(bundle, adata).module.state_dict()
    config = {"model": "CellPLM", "network": NETWORK}
    write_bundle(
        tmp_path / "half", state_dict=tensors, config=config, genes=genes, card="", dtype=torch.float16
    )
    model = CellPLM.from_pretrained(tmp_path / "half", adata)
    assert {tensor.dtype for tensor in model.module.state_dict().values()} == {torch.float32}
    np.testing.assert_allclose(model.get_latent_representation(), latent, atol=0.02)


def test_strict_loading_lists_ten_problems_at_most_and_changes_nothing(model):
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    wrong = {f"foreign{i}": torch.zeros(1) for i in range(20)} | {
        name: tensor + 1 for name, tensor in before.items()
    }
    with pytest.raises(
        WeightsError, match=r"^x\.ckpt does not fit .*foreign0 has no place.*; \.\.\.\. Nothing"
    ) as error:
        load_strictly(model.module, wrong, "x.ckpt")
    assert str(error.value).count("has no place") == 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


# bundles


def test_a_bundle_is_not_overwritten_unless_asked_to(model, tmp_path):
    model.save_pretrained(tmp_path / "mine", card="# Mine\n")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "# Mine\n"
    model.save_pretrained(tmp_path / "mine", overwrite=True)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("# CellPLM\n")
    assert "Loaded from" in card


def test_a_bundle_holds_nothing_of_the_data(model, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md",
        "config.json",
        "genes.tsv",
        "model.safetensors",
    ]
    content = b"".join(path.read_bytes() for path in (tmp_path / "mine").iterdir())
    assert b"even" not in content  # a batch


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; at least one cell"),
        ({"batch_size": -3}, "batch_size=-3; at least one cell"),
        ({"precision": "float16"}, 'precision=\'float16\' is not known; choose "float32" or "bfloat16"'),
        ({"mixture": "median"}, "mixture='median' is not known"),
    ],
)
def test_an_impossible_option_is_an_error(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.get_latent_representation(**options)


@pytest.mark.parametrize("indices", [[0.5, 1.7], ["c0", "c1"], [[0, 1]], 3])
def test_cells_that_are_not_a_list_of_whole_numbers_or_a_mask_are_an_error(model, indices):
    with pytest.raises((TypeError, IndexError), match="indices"):
        model.get_latent_representation(indices=indices)


# data that change under the model's feet


def test_data_assigned_later_are_matched_anew(model, adata, latent):
    reversed_genes = adata[:, ::-1].copy()
    CellPLM.setup_anndata(reversed_genes)
    model.adata = reversed_genes
    np.testing.assert_allclose(model.get_latent_representation(), latent, **CLOSE)
    assert model.gene_match.var_names.equals(reversed_genes.var_names)


def test_a_model_loaded_without_data_takes_data_by_assignment(model, adata, latent, tmp_path):
    model.save(tmp_path / "saved")
    loaded = CellPLM.load(tmp_path / "saved", adata=False)
    loaded.adata = adata
    np.testing.assert_array_equal(loaded.get_latent_representation(), latent)


def test_genes_that_are_taken_from_the_attached_data_are_not_mistaken_for_others(model, adata):
    adata._inplace_subset_var(np.arange(N_GENES)[::-2])  # as sc.pp.filter_genes does
    expected = model.get_latent_representation(adata.copy())
    np.testing.assert_allclose(model.get_latent_representation(), expected, **CLOSE)


def test_cells_that_are_taken_from_the_attached_data_are_gone(model, adata):
    adata._inplace_subset_obs(np.arange(10))
    expected = model.get_latent_representation(adata.copy())
    np.testing.assert_allclose(model.get_latent_representation(), expected, **CLOSE)


def test_counts_that_are_normalised_in_place_are_noticed(model, adata):
    adata.X = adata.X.log1p()
    with pytest.raises(NotCountsError):
        model.get_latent_representation()


def test_a_setup_by_another_model_class_does_no_harm(bundle, adata):
    CellPLM.setup_anndata(adata, batch_key="sample")
    model = CellPLM.from_pretrained(bundle, adata)
    latent = model.get_latent_representation()
    adata.obs["one"] = "one"
    scvi.model.SCVI.setup_anndata(adata, batch_key="one")
    np.testing.assert_array_equal(model.get_latent_representation(), latent)


def test_data_of_one_model_can_be_a_query_of_another_and_so_can_a_copy(model, bundle, adata, latent):
    part = adata[:20].copy()
    part.uns.clear()
    other = CellPLM.from_pretrained(bundle, part)
    np.testing.assert_array_equal(other.get_latent_representation(adata), latent)
    np.testing.assert_array_equal(model.get_latent_representation(), latent)
    copy = adata.copy()
    np.testing.assert_array_equal(model.get_latent_representation(copy), latent)
    np.testing.assert_array_equal(model.get_latent_representation(), latent)


@pytest.mark.parametrize("how", ["a copy", "a view", "read again"])
def test_a_model_of_a_part_or_a_copy_of_data_has_their_setup(bundle, adata, tmp_path, how):
    adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    CellPLM.setup_anndata(adata, layer="counts", batch_key="sample")
    latent = CellPLM.from_pretrained(bundle, adata).get_latent_representation()
    odd = adata.obs["sample"] == "odd"
    part = adata[odd] if how == "a view" else adata[odd].copy()
    if how == "read again":
        part.write_h5ad(tmp_path / "x.h5ad")
        part = ad.read_h5ad(tmp_path / "x.h5ad")
    model = CellPLM.from_pretrained(bundle, part)
    assert model.registry["setup_args"]["batch_key"] == "sample"
    np.testing.assert_allclose(model.get_latent_representation(), latent[odd], **CLOSE)
    assert part.is_view == (how == "a view")


def test_the_share_of_counts_is_known_in_memory_and_not_asked_of_a_file(bundle, adata, tmp_path):
    adata.var_names = [*adata.var_names[:40], *(f"FOREIGN{i}" for i in range(20))]
    share = adata.X[:, :40].sum() / adata.X.sum()
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert CellPLM.from_pretrained(bundle, adata).gene_match.counts_share == pytest.approx(share)
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    assert CellPLM.from_pretrained(bundle, backed).gene_match.counts_share is None


@pytest.mark.parametrize(("name", "reader"), [("x.best.ckpt", CellPLM), ("x.pth", ScBERT), ("x.bin", None)])
def test_a_checkpoint_is_recognised_by_the_model_whose_layout_it_has_alone_or_in_a_folder(
    tmp_path, name, reader
):
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        assert [model for model in (CellPLM, ScBERT, MultiomeCLIP) if model.recognises(path)] == (
            [reader] if reader else []
        )
