"""Official checkpoints, here tiny ones that the original was run on; numbers are compared in tests/parity."""

from __future__ import annotations

import hashlib
import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from cellprior.model import ScGPT, convert, model_class
from cellprior.model.scgpt import _checkpoint
from cellprior.model.scgpt._checkpoint import find_official, identify, read_official, recognises, rename
from cellprior.weights import WeightsError, read_bundle
from tests.parity.scgpt_golden import ARGS, CaseA, Variant, case_a


@pytest.fixture
def case() -> CaseA:
    return case_a()


def cells(case: CaseA, n: int = 3) -> ad.AnnData:
    """Cells with the genes of the vocabulary."""
    names = [name for name in case.vocabulary if not name.startswith("<")]
    counts = np.random.default_rng(0).poisson(0.4, (n, len(names))).astype(np.float32)
    return ad.AnnData(counts, var=pd.DataFrame(index=pd.Index(names)))


def test_every_tensor_is_read_bit_for_bit_and_rows_are_put_in_the_order_of_the_vocabulary(tmp_path, case):
    bundle = read_official(case.write(tmp_path))
    assert len(bundle.state_dict) == len(case.tensors)
    rows = case.row_of_token
    theirs, ours = (
        case.tensors["encoder.embedding.weight"],
        bundle.state_dict["gene_encoder.embedding.weight"],
    )
    assert len(ours) == len(theirs) - 1  # <eoc> is in no computation
    assert all(torch.equal(theirs[token], ours[row]) for token, row in enumerate(rows) if row >= 0)
    assert bundle.genes["symbol"].tolist() == [name for name in case.vocabulary if not name.startswith("<")]
    others = {"gene_encoder.embedding.weight"}
    unused = [x for name, x in bundle.state_dict.items() if name not in others]
    assert all(any(torch.equal(x, y) for y in case.tensors.values()) for x in unused)


def test_special_tokens_may_stand_anywhere_in_the_vocabulary(tmp_path, case):
    first = read_official(case.write(tmp_path / "last"))
    order = np.random.default_rng(0).permutation(803)
    shuffled = {name: int(np.flatnonzero(order == i)[0]) for name, i in case.vocabulary.items()}
    embedding = case.tensors["encoder.embedding.weight"][order]
    case.write(
        tmp_path / "anywhere",
        vocabulary=shuffled,
        tensors=case.tensors | {"encoder.embedding.weight": embedding},
    )
    adata = cells(case)
    found = []
    for name in ("last", "anywhere"):
        model = ScGPT.from_pretrained(tmp_path / name, adata.copy())
        found.append(model.get_latent_representation(ties="middle"))
        model.release()
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)
    assert len(first.genes) == 800


@pytest.mark.parametrize("name", ["best_model.pt", "mine.pt"])
def test_a_folder_or_a_file_is_recognised_and_found(tmp_path, case, name):
    file = case.write(tmp_path).rename(tmp_path / name)
    assert find_official(tmp_path) == find_official(file) == file
    assert recognises(tmp_path)
    assert recognises(file)
    assert model_class(str(tmp_path)) is model_class(str(file)) is ScGPT
    bundle = read_official(file)
    assert len(bundle.genes) == 800
    assert {path.name for path in bundle.files} == {name, "args.json", "vocab.json"}


def test_a_saved_model_of_scvi_tools_is_not_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "model.pt").touch()
    assert not recognises(tmp_path)
    assert not recognises(tmp_path / "model.pt")


def changed(case: CaseA, change: str):
    """Tensors with one thing wrong."""
    tensors = dict(case.tensors)
    first = "transformer_encoder.layers.0.linear1.weight"
    if change == "missing":
        del tensors["transformer_encoder.layers.1.norm2.bias"]
    elif change == "renamed":
        tensors["transformer_encoder.layers.0.lin1.weight"] = tensors.pop(first)
    elif change == "other width":
        tensors["transformer_encoder.layers.1.linear1.weight"] = torch.zeros(64, 47)
    elif change == "no encoder":
        tensors = {name: x for name, x in tensors.items() if not name.startswith("transformer")}
    elif change == "twice":
        tensors["transformer_encoder.layers.0.self_attn.Wqkv.weight"] = torch.zeros(144, 48)
    elif change == "no tensors":
        tensors = {"state": {"a": 1}, "epoch": 3}
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"encoder\.1\.norm2\.bias is missing.*Nothing was loaded"),
        ("renamed", r"lacks 'encoder\.0\.ff1\.weight'|1 tensors that scGPT does not have: .*lin1"),
        ("other width", r"encoder\.1\.ff1\.weight is \(64, 47\), needed \(64, 48\)"),
        ("no encoder", r"best_model\.pt lacks 'encoder\.0\.ff1\.weight'"),
        ("twice", r"under two spellings, such as Wqkv and in_proj"),
        ("no tensors", r"it holds state, epoch; needed are bare tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, case, change, message):
    case.write(tmp_path, tensors=changed(case, change))
    with pytest.raises(WeightsError, match=message):
        ScGPT.from_pretrained(tmp_path, cells(case))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"embsize": 512}, r"args.json says embsize=512, and the tensors of best_model.pt 48"),
        ({"nlayers": 12}, "nlayers=12"),
        ({"nheads": None}, "args.json does not say 'nheads'"),
    ],
)
def test_arguments_of_another_model_are_refused(tmp_path, case, args, message):
    mixed = {key: value for key, value in (ARGS | args).items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        read_official(case.write(tmp_path, args=mixed))


def without(case: CaseA, *names: str) -> dict[str, int]:
    return {name: i for name, i in case.vocabulary.items() if name not in names}


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, case):
    with pytest.raises(WeightsError, match=r"vocab.json lacks <cls>, which scGPT puts into cells"):
        read_official(case.write(tmp_path, vocabulary=without(case, "<cls>")))
    with pytest.raises(WeightsError, match=r"vocab.json has 802 names and best_model.pt 803 rows"):
        read_official(case.write(tmp_path, vocabulary=without(case, "<eoc>")))
    gap = {name: i + (i > 5) for name, i in without(case, "<eoc>", "PLAUR").items()}
    with pytest.raises(WeightsError, match="without gaps"):
        read_official(case.write(tmp_path, vocabulary=gap | {"<eoc>": 1_000, "PLAUR": 2_000}))
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(WeightsError, match="vocab.json is damaged: it is not JSON"):
        read_official(tmp_path / "best_model.pt")
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(WeightsError, match="needs vocab.json beside it.*github.com/bowang-lab/scGPT"):
        read_official(tmp_path / "best_model.pt")


def test_layouts_are_told_by_their_tensors():
    found = {}
    for name in (
        "zero_prob",
        "batch_labels",
        "dsbn",
        "bn",
        "mvc_concat",
        "mvc_sum",
        "category",
        "scaling",
        "generative",
    ):
        renamed = rename(Variant(name).tensors, name)
        network = _checkpoint.network({"nheads": 2}, renamed, name)
        found[name] = network
        assert network["n_layers"] == 2
    assert found["zero_prob"]["zero_probability"]
    assert (found["batch_labels"]["batch_decoder"], found["batch_labels"]["n_batches"]) == (True, 3)
    assert (found["dsbn"]["batch_norm"], found["dsbn"]["n_batches"]) == ("domain", 3)
    assert found["bn"]["batch_norm"] == "single"
    assert [found[f"mvc_{style}"]["mvc"] for style in ("concat", "sum")] == ["concat query", "sum query"]
    assert [found[style]["value_style"] for style in ("category", "scaling", "bn")] == [
        "category",
        "scaling",
        "continuous",
    ]
    assert found["generative"]["generative"]
    assert not found["bn"]["generative"]


@pytest.mark.parametrize(
    ("name", "what"), [("generator", "perturbation model"), ("multiomic", "multi-omic model")]
)
def test_networks_for_something_else_are_refused_by_what_they_are(name, what):
    with pytest.raises(WeightsError, match=what):
        rename(Variant(name).tensors, name)


def test_scformer_is_read_by_option(tmp_path, case):
    plain = read_official(case.write(tmp_path / "a")).config["network"]
    scformer = read_official(
        case.write(tmp_path / "b", args=ARGS | {"layout": "scFormer", "pad_value": 0})
    ).config["network"]
    assert (plain["ties"], plain["batch_norm_eps"], plain["cls_value"]) == ("fixed", 6.1e-5, -2)
    assert (scformer["ties"], scformer["batch_norm_eps"], scformer["cls_value"]) == ("upper", 1e-5, 0)


def test_the_first_scformer_decodes_in_one_step(tmp_path, case):
    old = {
        name: x
        for name, x in case.tensors.items()
        if not name.startswith(("decoder.", "mvc_decoder.", "grad_"))
    }
    old |= {"decoder.weight": torch.ones(1, 48), "decoder.bias": torch.zeros(1)}
    case.write(tmp_path, tensors=old, args=ARGS | {"layout": "scformer"})
    model = ScGPT.from_pretrained(tmp_path, cells(case))
    bins, above = model.module.predict_bins(torch.ones(1, 2, 48))
    assert bins.tolist() == [[48.0, 48.0]]
    assert above is None
    with pytest.raises(RuntimeError, match="no decoder of expression from the cell"):
        model.module.predict_bins_of_cell(torch.ones(1, 48), torch.zeros(1, 2, dtype=torch.int64))
    assert np.isfinite(model.get_latent_representation()).all()
    model.release()


def test_whole_human_and_cp_are_told_apart_and_a_wrong_name_is_said(tmp_path, monkeypatch):
    names = [f"G{i}" for i in range(60_694)]
    assert "and other genes" in identify(60_697, 0, names)
    monkeypatch.setattr(_checkpoint, "CENSUS_NAMES", hashlib.sha256("\n".join(names).encode()).hexdigest())
    human, cp, tuned = (identify(60_697, n, names) for n in (0, 177, 5))
    assert human.startswith("scGPT whole-human")
    assert cp.startswith("scGPT_CP")
    assert "fine-tuned for 5 classes" in tuned
    assert "old vocabulary" in identify(36_574, 0, names)
    for folder, known_as, other in (
        ("scGPT_human", human, False), ("whole-human", cp, True), ("scGPT_CP", cp, False), ("scgpt-cp", human, True),
        ("models", cp, False), ("continual_pretrained_human", cp, False),
    ):  # fmt: skip
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _checkpoint.warn_of_another_name(tmp_path / folder / "best_model.pt", known_as)
        assert bool(said) == other, folder
        if other:
            assert known_as in str(said[0].message)


def test_a_checkpoint_becomes_a_bundle_whose_card_says_what_it_is(tmp_path, case):
    case.write(tmp_path / "official")
    convert(tmp_path / "official", tmp_path / "bundle")
    assert "803 tokens and 5 classes" in read_bundle(tmp_path / "bundle").card
    adata = cells(case)
    first, second = (ScGPT.from_pretrained(tmp_path / name, adata.copy()) for name in ("official", "bundle"))
    np.testing.assert_array_equal(first.get_latent_representation(), second.get_latent_representation())
    first.release(), second.release()
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["network"]["n_heads"] == 4
