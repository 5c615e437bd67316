"""Checkpoints of scCLIP, into bundles and without running them."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import cellprior as cp
from cellprior._compat import without_pulled_columns
from cellprior.cli import main
from cellprior.model import MultiomeCLIP, convert
from cellprior.weights import WeightsError
from tests.contract.shared import Bomb
from tests.parity.scclip_file import write_scclip
from tests.parity.scclip_golden import DATA, Golden

from .data import multiome

REAL = Path(__file__).parent / "stored" / "scclip_by_pandas_1.5_and_transformers_4.40.ckpt"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def gene_names(n: int) -> list[str]:
    return [f"GENE{i}" for i in range(n)]


def peak_names(n: int) -> list[str]:
    """Not in the order of the genome."""
    return [f"chr{1 + i % 3}-{1000 * (n - i)}-{1000 * (n - i) + 500}" for i in range(n)]


def sizes(case: Golden) -> tuple[int, int]:
    return tuple(case.inputs[name].shape[1] for name in ("rna", "atac"))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.load("a")


@pytest.fixture
def checkpoint(golden, tmp_path) -> Path:
    return write(golden, tmp_path)


def write(case: Golden, folder: Path, **changes: Any) -> Path:
    n_genes, n_peaks = sizes(case)
    options = {"genes": gene_names(n_genes), "peaks": peak_names(n_peaks)}
    options["n_heads"] = int(case["config/n_heads"])
    tensors = changes.pop("tensors", case.group("state_dict"))
    return write_scclip(folder / "scclip.ckpt", tensors, **{**options, **changes})


def cells_of(case: Golden, n_cells: int = 60, *, genes: list[str] | None = None) -> md.MuData:
    """Counts of the case's genes and peaks."""
    rng = np.random.default_rng(0)
    n_genes, n_peaks = sizes(case)
    names = {"rna": gene_names(n_genes) if genes is None else genes, "atac": peak_names(n_peaks)}
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    return multiome(
        {
            name: AnnData(
                rng.poisson(1.0, (n_cells, len(features))).astype(np.float32),
                obs=obs.copy(),
                var=pd.DataFrame(index=features),
            )
            for name, features in names.items()
        }
    )


# against the original


@pytest.mark.parametrize("name", ["a", "b", "overpad"])
def test_against_scclip_embeddings_of_a_converted_checkpoint(tmp_path, name):
    case = Golden.load(name)
    convert(write(case, tmp_path), tmp_path / "bundle", trust=True, reference=cells_of(case)["rna"])
    assert "transformers" not in sys.modules
    model = MultiomeCLIP.from_pretrained(tmp_path / "bundle")
    with torch.no_grad():
        for modality, x in case.inputs.items():
            latent = torch.nn.functional.normalize(model.module.encoder_of(modality)(x), dim=1)
            np.testing.assert_allclose(latent, case[f"io/{modality}_embeds"], **CLOSE)
        scores = model.module.scores(case["io/rna_embeds"], case["io/atac_embeds"])
    np.testing.assert_allclose(scores, case["io/logits_per_atac"], **CLOSE)
    assert model.peaks == peak_names(sizes(case)[1])
    assert model.genes["symbol"].tolist() == gene_names(sizes(case)[0])


def test_against_scclip_what_enters_a_converted_model_if_its_reference_is_the_data_set(golden, tmp_path):
    with np.load(DATA / "scclip_preprocess.npz") as file:
        arrays = dict(file)
    var = pd.DataFrame(index=arrays["genes"])  # the original's genes, and those it leaves out
    rna = AnnData(arrays["counts/rna"], var=var)
    path = write(golden, tmp_path, genes=arrays["kept"].tolist())
    convert(path, tmp_path / "bundle", trust=True, reference=rna)
    model = MultiomeCLIP.from_pretrained(tmp_path / "bundle")
    expected = model.module.rna(torch.from_numpy(arrays["scaled/rna"])).detach()
    found = model.get_latent_representation(rna)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(expected, dim=1), **CLOSE)
    # a query is not scaled by its own maxima
    np.testing.assert_allclose(model.get_latent_representation(rna[:7]), found[:7], **CLOSE)


def test_a_checkpoint_that_pandas_and_transformers_themselves_wrote_is_converted(tmp_path):
    rna = AnnData(np.ones((3, 24), np.float32), var=pd.DataFrame(index=gene_names(24)))
    convert(REAL, tmp_path / "bundle", trust=True, reference=rna)
    model = MultiomeCLIP.from_pretrained(tmp_path / "bundle")
    assert model.genes["symbol"].tolist() == gene_names(24)
    assert model.peaks == [f"chr1-{1000 * i}-{1000 * i + 500}" for i in range(40)]
    network = model._network()
    assert (network["n_heads"], network["n_layers"], network["n_mlp"], network["n_latent"]) == (2, 1, 12, 6)
    assert not network["mask_padding"] and not network["genomic_order"]
    atac = AnnData(np.eye(40, dtype=np.float32), var=pd.DataFrame(index=model.peaks))
    assert len(np.unique(model.get_latent_representation(atac).round(4), axis=0)) == 40


# the reference


def test_without_a_reference_the_error_says_what_it_is_for(checkpoint, golden, tmp_path):
    with pytest.raises(ValueError, match="needs reference=.*by its largest in the data set"):
        convert(checkpoint, tmp_path / "bundle", trust=True)
    with pytest.raises(ValueError, match=r"needs RNA.*it has \['atac'\]"):
        convert(checkpoint, tmp_path / "bundle", trust=True, reference=cells_of(golden)["atac"])
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("said", [{"binary": False}, {"backed": True}])
def test_a_model_whose_rna_was_not_scaled_needs_no_reference(golden, tmp_path, said):
    convert(write(golden, tmp_path, said=said), tmp_path / "bundle", trust=True)
    maximum = MultiomeCLIP.from_pretrained(tmp_path / "bundle").module.rna.maximum
    assert (maximum == 1).all()


def test_cells_with_both_modalities_turn_them_together_and_the_card_says_so(checkpoint, golden, tmp_path):
    mdata = cells_of(golden)
    for adata in mdata.mod.values():
        adata.layers["counts"], adata.X = adata.X, np.log1p(adata.X)
    convert(checkpoint, tmp_path / "both", trust=True, reference=mdata, layer="counts")
    convert(checkpoint, tmp_path / "rna", trust=True, reference=mdata["rna"], layer={"rna": "counts"})
    both, rna = (MultiomeCLIP.from_pretrained(tmp_path / name) for name in ("both", "rna"))
    assert torch.equal(both.module.rna.maximum, rna.module.rna.maximum)
    assert torch.equal(rna.module.alignment["rna"].axes, torch.eye(rna.module.n_latent))
    assert not torch.equal(both.module.alignment["rna"].axes, torch.eye(rna.module.n_latent))
    card = (tmp_path / "both" / "README.md").read_text()
    assert cp.weights.sha256(checkpoint) in card and "scclip.ckpt" in card
    assert "largest expression of each gene is that of 60 cells" in card
    assert "turned together by 60 cells" in card
    assert "turned together" not in (tmp_path / "rna" / "README.md").read_text()


def test_embeddings_that_were_not_of_unit_length_are_a_note_on_the_card(golden, tmp_path):
    path = write(golden, tmp_path, said={"normalize": False, "binary": False})
    convert(path, tmp_path / "bundle", trust=True)
    assert "not of unit length" in (tmp_path / "bundle" / "README.md").read_text()


# the flag


def test_a_pickle_is_refused_without_the_flag_with_what_can_be_said_of_it(checkpoint, tmp_path):
    with pytest.raises(WeightsError) as error:
        convert(checkpoint, tmp_path / "bundle")
    message = str(error.value)
    assert "a pickle is a program" in message and "--i-trust-this-file (trust=True)" in message
    with zipfile.ZipFile(checkpoint) as zipped:
        n_tensors = sum("/data/" in name for name in zipped.namelist())
    assert f"{n_tensors} tensors" in message
    for name in (
        "argparse.Namespace",
        "torch._utils._rebuild_tensor_v2",
        "transformers.models.vit.configuration_vit.ViTConfig",
    ):
        assert f"  {name}\n" in message
    assert "DataFrame\n" in message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_a_pickle_that_names_what_no_checkpoint_needs_is_refused_flag_or_no_flag(golden, tmp_path, trust):
    path = write(golden, tmp_path, hyper={"bomb": Bomb(tmp_path / "exploded")})
    with pytest.raises(WeightsError, match=r"(posix|nt)\.mkdir") as error:
        convert(path, tmp_path / "bundle", trust=trust, reference=cells_of(golden))
    assert "trust=True" not in str(error.value)
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "bundle").exists()


def test_from_pretrained_and_embed_never_open_a_pickle_and_name_the_way(golden, tmp_path):
    path = write(golden, tmp_path, hyper={"bomb": Bomb(tmp_path / "exploded")})
    with pytest.raises(WeightsError, match=r"cellprior\.model\.convert"):
        MultiomeCLIP.from_pretrained(path)
    with pytest.raises(WeightsError, match="see `cellprior convert`"):
        cp.tl.embed(cells_of(golden), path)
    assert not (tmp_path / "exploded").exists()


# damaged, or something else


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path, share):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"scclip\.ckpt is (truncated|damaged)"):
        convert(checkpoint, tmp_path / "bundle", trust=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genes": gene_names(60)}, "60 features of RNA in .* patches"),
        ({"peaks": peak_names(1000)}, "1,000 features of ATAC"),
        ({"config": {"num_attention_heads": [4]}}, "no number of attention heads"),
        ({"hyper": {"third_config": {"num_attention_heads": 2}}}, r"\[2, 4\] number of attention heads"),
        ({"n_heads": 3}, "n_heads=3 heads"),
        ({"config": {"hidden_act": "relu"}}, "hidden_act={'relu'}; supported is 'gelu'"),
        ({"config": {"layer_norm_eps": 1e-5}}, "layer_norm_eps"),
        ({"hyper": {"peaks": None}}, "a pandas frame 'peaks'.*that is no pandas frame"),
        (
            {"hyper": {"genes": pd.DataFrame(index=[1.5, 2.5])}},
            "the index of the pandas frame is not of text",
        ),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(golden, tmp_path, changes, message):
    path = write(golden, tmp_path, said={"binary": False}, **changes)
    with pytest.raises((WeightsError, ValueError), match=message):
        convert(path, tmp_path / "bundle", trust=True)
    assert not (tmp_path / "bundle").exists()


def test_every_tensor_has_its_place_or_the_error_lists_it(golden, tmp_path):
    tensors = golden.group("state_dict")
    lost = "atac_model.pooler.dense.bias"
    path = write(golden, tmp_path, tensors={**tensors, "rna_model.third.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="1 tensors that scCLIP does not have: rna_model.third.weight"):
        convert(path, tmp_path / "bundle", trust=True)
    left = {name: tensor for name, tensor in tensors.items() if name != lost}
    path = write(golden, tmp_path, tensors=left, said={"binary": False})
    with pytest.raises(WeightsError, match="atac.pooler.bias is missing. Nothing was loaded"):
        convert(path, tmp_path / "bundle", trust=True)
    path = write(golden, tmp_path, tensors={"encoder.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="weights of no model that this version knows"):
        convert(path, tmp_path / "bundle", trust=True)


# on the command line


def test_convert_and_embed_on_the_command_line(checkpoint, golden, tmp_path, capsys):
    mdata = cells_of(golden)
    with without_pulled_columns():
        mdata.write(tmp_path / "cells.h5mu")
    folder = tmp_path / "bundle"
    assert main(["convert", str(checkpoint), str(folder)]) == 1
    assert "a pickle is a program" in capsys.readouterr().err
    command = ["convert", str(checkpoint), str(folder), "--i-trust-this-file"]
    assert main([*command, "--reference", str(tmp_path / "cells.h5mu")]) == 0
    assert "turned together by 60 cells" in capsys.readouterr().out
    assert main([*command, "--reference", str(tmp_path / "cells.h5mu")]) == 1
    assert "overwrite" in capsys.readouterr().err
    output = tmp_path / "out.h5mu"
    assert main(["embed", str(tmp_path / "cells.h5mu"), str(output), "--weights", str(folder)]) == 0
    model = MultiomeCLIP.from_pretrained(folder)
    with without_pulled_columns():
        found = md.read_h5mu(output).obsm["X_multiomeclip"]
    np.testing.assert_allclose(found, model.get_latent_representation(mdata), **CLOSE)
