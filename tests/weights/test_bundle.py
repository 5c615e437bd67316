from __future__ import annotations

import errno
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cellprior import weights

STATE = {
    "embedding.weight": torch.linspace(-2, 2, 12).reshape(3, 4),
    "steps": torch.tensor([7, 8]),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
}
CONFIG = {"model": "CellPLM", "network": {"n_genes": 3, "n_hidden": 4}, "note": "kept"}
GENES = pd.DataFrame(
    {
        "ensembl_id": ["ENSG00000000003", "ENSG00000000005", ""],
        # Three names that a table reader likes to take for something else.
        "symbol": ["NA", "MARCH1", "1E5"],
        "previous_symbols": ["T245|TM4SF6", "", "NAN"],
    }
)
FILES = {"model.safetensors", "config.json", "genes.tsv", "README.md"}


def write(folder: Path, **changes: object) -> Path:
    given = {"state_dict": STATE, "config": CONFIG, "genes": GENES, "card": "# Tiny\n\nLicence: CC0, §\n"}
    return weights.write_bundle(folder, **{**given, **changes})


def test_what_is_written_is_what_is_read(tmp_path: Path):
    folder = write(tmp_path / "deep" / "tiny")
    assert {path.name for path in folder.iterdir()} == FILES
    bundle = weights.read_bundle(folder)
    assert bundle.state_dict.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert bundle.state_dict[name].dtype == tensor.dtype
        assert torch.equal(bundle.state_dict[name], tensor)
    assert bundle.config == {**CONFIG, "format_version": 1, "cellprior_version": version("cellprior")}
    pd.testing.assert_frame_equal(bundle.genes, GENES, check_dtype=False)
    assert bundle.card == "# Tiny\n\nLicence: CC0, §\n"


def test_all_files_of_a_bundle_can_be_read_by_the_same_people(tmp_path: Path):
    modes = {path.stat().st_mode for path in write(tmp_path / "tiny").iterdir()}
    assert len(modes) == 1


def test_what_was_read_can_be_written_again(tmp_path: Path):
    first = weights.read_bundle(write(tmp_path / "a"))
    write(
        tmp_path / "b", state_dict=first.state_dict, config=first.config, genes=first.genes, card=first.card
    )
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_precision_and_less_on_disk_is_float32_in_memory(tmp_path: Path, dtype: torch.dtype):
    folder = write(tmp_path / "tiny", dtype=dtype)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("embedding.weight").dtype == dtype
        assert file.get_tensor("steps").dtype == torch.int64
    state_dict = weights.read_bundle(folder).state_dict
    assert state_dict["embedding.weight"].dtype == torch.float32
    tolerance = {"rtol": 2**-4, "atol": 2**-10} if dtype.itemsize == 1 else {"rtol": 2**-8}
    np.testing.assert_allclose(state_dict["embedding.weight"], STATE["embedding.weight"], **tolerance)
    assert torch.equal(state_dict["steps"], STATE["steps"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_value_too_large_for_the_type_on_disk_is_refused_by_name(tmp_path: Path, dtype: torch.dtype):
    with pytest.raises(ValueError, match=rf"'big'.* 1e\+06.*{dtype}"):
        write(tmp_path / "tiny", state_dict={"big": torch.tensor([1e6])}, dtype=dtype)
    assert not (tmp_path / "tiny").exists()


def test_tensors_that_share_memory_or_are_views_are_written(tmp_path: Path):
    tensor = torch.arange(6.0).reshape(2, 3)
    folder = write(tmp_path / "tiny", state_dict={"a": tensor, "tied": tensor, "transposed": tensor.T})
    state_dict = weights.read_bundle(folder).state_dict
    assert torch.equal(state_dict["tied"], tensor)
    assert torch.equal(state_dict["transposed"], tensor.T)


def test_only_tensors_go_into_a_bundle(tmp_path: Path):
    with pytest.raises(ValueError, match=r"state_dict\['epoch'\] is a int"):
        write(tmp_path / "tiny", state_dict={"epoch": 3})


def test_missing_gene_columns_are_filled_with_empty_text(tmp_path: Path):
    folder = write(tmp_path / "tiny", genes=pd.DataFrame({"symbol": ["A", "B", "C"], "other": [1, 2, 3]}))
    genes = weights.read_bundle(folder).genes
    assert genes.to_dict("list") == {
        "ensembl_id": [""] * 3,
        "symbol": ["A", "B", "C"],
        "previous_symbols": [""] * 3,
    }


@pytest.mark.parametrize(
    "genes",
    [pd.DataFrame({"symbol": ["A", None, "C"]}), pd.DataFrame({"gene": ["A", "B", "C"]})],
    ids=["one nameless gene", "no known column"],
)
def test_genes_without_a_name_are_refused(tmp_path: Path, genes: pd.DataFrame):
    with pytest.raises(ValueError, match=r"Gene [01] has neither `ensembl_id` nor `symbol`"):
        write(tmp_path / "tiny", genes=genes)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"network": {}}, "`model`"),
        ({"model": "CellPLM"}, "`network`"),
        ({"model": "CellPLM", "network": {"n_genes": 4}}, "4 genes, the gene list has 3"),
        ({"model": "CellPLM", "network": {}, "n_genes": 4}, "4 genes, the gene list has 3"),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_refused(tmp_path: Path, config: dict, named: str):
    with pytest.raises(ValueError, match=named):
        write(tmp_path / "tiny", config=config)


def test_an_existing_bundle_is_replaced_only_on_request_and_other_files_stay(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(tmp_path, card="new")
    assert weights.read_bundle(tmp_path).card.startswith("# Tiny")
    write(tmp_path, card="new", overwrite=True)
    assert weights.read_bundle(tmp_path).card == "new"
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}


def test_a_bundle_that_was_half_replaced_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "genes.tsv":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, state_dict={"other": torch.zeros(1)}, overwrite=True)
    with pytest.raises(weights.WeightsError, match=r"lacks config\.json"):
        weights.read_bundle(tmp_path)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    (write(tmp_path) / name).unlink()
    with pytest.raises(weights.WeightsError, match=f"lacks {name}"):
        weights.read_bundle(tmp_path)


@pytest.mark.parametrize("left", [0, 5, 100, -1], ids=["empty", "5 bytes", "100 bytes", "all but one byte"])
def test_a_truncated_tensor_file_is_named(tmp_path: Path, left: int):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors is damaged or truncated"):
        weights.read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is not JSON"),
        ("[]", "no `format_version`"),
        ('{"model": "CellPLM", "network": {}}', "no `format_version`"),
        ('{"format_version": 4, "cellprior_version": "9.0"}', r"format 4, of cellprior 9\.0.*Upgrade"),
        ('{"format_version": 1, "model": "CellPLM"}', "`network`"),
        (
            '{"format_version": 1, "model": "CellPLM", "network": {"n_genes": 5}}',
            "5 genes, the gene list has 3",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_an_error_that_says_why(tmp_path: Path, content: str, named: str):
    (write(tmp_path) / "config.json").write_text(content)
    with pytest.raises(weights.WeightsError, match=named):
        weights.read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cannot be read as a table"),
        (b"ensembl_id\tsymbol\tprevious_symbols\n\xff\t\t\n", "cannot be read as a table"),
        (
            b"ensembl_id\tsymbol\tprevious_symbols\na\tb\tc\td\te\nf\n",
            "cannot be read as a table|gene list has",
        ),
        (b"symbol\nA\nB\nC\n", "has the columns"),
        (b"ensembl_id\tsymbol\tprevious_symbols\n\tA\t\n\tB\t\n\tC\t", "is truncated"),
    ],
    ids=["empty", "not text", "ragged", "other columns", "last line without end"],
)
def test_a_gene_list_that_cannot_be_used_is_an_error_that_names_it(
    tmp_path: Path, content: bytes, named: str
):
    (write(tmp_path) / "genes.tsv").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=named):
        weights.read_bundle(tmp_path)


def test_the_config_on_disk_is_plain_json(tmp_path: Path):
    config = json.loads((write(tmp_path) / "config.json").read_text())
    assert config["network"] == {"n_genes": 3, "n_hidden": 4}


# values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensors_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, value: float):
    bad = STATE["embedding.weight"].clone()
    bad[1, 2] = value
    with pytest.raises(ValueError, match=r"'embedding\.weight'.*not finite.*lower learning rate"):
        write(tmp_path / "tiny", state_dict={**STATE, "embedding.weight": bad})
    assert not (tmp_path / "tiny").exists()
    path = write(tmp_path / "tiny") / "model.safetensors"
    save_file({**STATE, "embedding.weight": bad}, path)
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors: the tensor 'embedding\.weight'"):
        weights.read_bundle(tmp_path / "tiny")


def test_large_finite_values_whose_sum_overflows_are_read(tmp_path: Path):
    large = torch.full((4,), 3e38)
    assert torch.equal(
        weights.read_bundle(write(tmp_path / "b", state_dict={"a": large})).state_dict["a"], large
    )


def test_no_tensor_is_read_before_the_check_of_their_shapes_has_passed(tmp_path: Path, monkeypatch):
    folder, seen = write(tmp_path / "tiny"), {}

    def check(bundle: weights.Bundle) -> None:
        seen.update(bundle.state_dict)
        raise weights.WeightsError("no")

    monkeypatch.setattr("cellprior.weights._reading._in_memory", None)  # whoever reads one, calls this
    with pytest.raises(weights.WeightsError, match="^no$"):
        weights.read_bundle(folder, check=check)
    assert {name: (x.shape, x.dtype) for name, x in seen.items()} == {
        name: (x.shape, x.dtype) for name, x in STATE.items()
    }
    assert all(tensor.is_meta for tensor in seen.values())


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["\tA\t", "\tB\t", "\tA\t"], r"genes\.tsv: Gene 2 is 'A', and so is gene 0"),
        (["ENSG1\tA\t", "ENSG1\tB\t", "\tC\t"], r"genes\.tsv: Gene 1 is 'ENSG1', and so is gene 0"),
        (["\tA\t", "\t \tB", "\tC\t"], r"genes\.tsv: Gene 1 has neither"),
    ],
)
def test_each_gene_has_a_name_of_its_own(tmp_path: Path, lines: list[str], named: str):
    head = "ensembl_id\tsymbol\tprevious_symbols"
    (write(tmp_path) / "genes.tsv").write_text("\n".join([head, *lines, ""]))
    with pytest.raises(weights.WeightsError, match=named):
        weights.read_bundle(tmp_path)


def test_two_genes_with_ids_of_their_own_may_share_a_symbol(tmp_path: Path):
    genes = pd.DataFrame({"ensembl_id": ["ENSG1", "ENSG2", ""], "symbol": ["A", "A", "A"]})
    assert weights.read_bundle(write(tmp_path, genes=genes)).genes["symbol"].tolist() == ["A", "A", "A"]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("network", {"target_sum": float("nan")}, "is not JSON .NaN is no number"),
        ("network", {"n_hidden": {"a": 1}}, "`network.n_hidden` is {'a': 1}"),
        ("n_genes", "3", "`n_genes` is '3'; needed: a whole number"),
        ("training_state", [], "`training_state` is .*needed: a mapping"),
        ("annotation", 3, "`annotation` is 3"),
        ("annotation", {"labels": "AB"}, r"`annotation\.labels` is 'AB'"),
        ("annotation", {"labels": ["A", "A"]}, r"`annotation\.labels` has a name twice"),
        ("annotation", {"labels": ["A"], "calibration": []}, r"`annotation\.calibration` is \[\]"),
        (
            "annotation",
            {"labels": ["A"], "calibration": {"novelty": [1.0], "confidence": [1.0, 2.0], "correct": [True]}},
            r"have \[1, 2\] values",
        ),
        (
            "annotation",
            {"labels": ["A"], "calibration": {"novelty": ["a"]}},
            r"calibration\.novelty` is \['a'\]",
        ),
        ("annotation", {"labels": ["A", "B"], "ontology": ["CL:1"]}, r"an id for each label"),
        (
            "annotation",
            {"labels": ["A", "B"], "none": "C"},
            r"`annotation\.none` is 'C'; needed: one of several",
        ),
        ("annotation", {"labels": ["A", "B"], "reject": 2}, r"`annotation\.reject` is 2"),
        (
            "annotation",
            {"labels": ["A", "B"], "coarse": {"labels": ["a"]}},
            r"`labels`, a name for each label",
        ),
        (
            "annotation",
            {"labels": ["A"], "coarse": {"labels": ["a"]}},
            r"`annotation\.coarse` has no calibration",
        ),
        (
            "annotation",
            {"labels": ["A"], "coarse": {"labels": ["a"], "calibration": {"novelty": [1.0]}}},
            r"in `annotation\.coarse`, `annotation\.calibration\.confidence` is None",
        ),
        ("format_version", True, "no `format_version`"),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_file(
    tmp_path: Path, field: str, value: object, named: str
):
    path = write(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(weights.WeightsError, match=named) as error:
        weights.read_bundle(tmp_path)
    assert str(path) in str(error.value)


def test_a_full_disk_is_an_error_of_the_system_that_names_the_folder(tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "tiny")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "tiny")


# peaks

PEAKS = ["chr1:100-600", "NA", 'chr2_random:5-9 "odd"', "", "chrX:700-1200"]


def test_peaks_are_in_a_file_of_their_own_and_come_back_as_they_are(tmp_path: Path):
    folder = write(tmp_path / "tiny", peaks=PEAKS)
    assert {path.name for path in folder.iterdir()} == FILES | {"peaks.tsv"}
    assert (folder / "peaks.tsv").read_text().startswith("peak\nchr1:100-600\nNA\n")
    config = json.loads((folder / "config.json").read_text())
    assert config["n_peaks"] == 5 and config["format_version"] == 2
    bundle = weights.read_bundle(folder)
    assert bundle.peaks == PEAKS
    assert bundle.vocabulary == {"genes": bundle.genes, "peaks": PEAKS}
    assert weights.read_bundle(write(tmp_path / "without")).peaks is None


def test_a_bundle_that_replaces_one_with_peaks_has_none(tmp_path: Path):
    write(tmp_path / "tiny", peaks=PEAKS)
    with pytest.raises(FileExistsError, match=r"peaks\.tsv"):
        write(tmp_path / "tiny")
    write(tmp_path / "tiny", overwrite=True)
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == FILES


@pytest.mark.parametrize("given", [None, ["chr1:1-2"]], ids=["no peaks", "one peak"])
def test_peaks_that_the_config_contradicts_are_not_written(tmp_path: Path, given: list[str] | None):
    with pytest.raises(ValueError, match="says 7 peaks"):
        write(tmp_path / "tiny", peaks=given, config={**CONFIG, "n_peaks": 7})


@pytest.mark.parametrize(
    ("keep", "named"),
    [
        (None, r"lacks peaks\.tsv"),
        (0, r"peaks\.tsv cannot be read as a table"),
        (4, "says 5 peaks, peaks.tsv has 0|is truncated"),
        (len("peak\nchr1:100-600\nNA\n"), "says 5 peaks, peaks.tsv has 2"),
        (-2, r"peaks\.tsv is truncated"),
    ],
    ids=["no file", "empty", "the head only", "two lines", "all but two bytes"],
)
def test_peaks_that_are_missing_or_cut_short_are_refused(tmp_path: Path, keep: int | None, named: str):
    path = write(tmp_path / "tiny", peaks=PEAKS) / "peaks.tsv"
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[:keep])
    with pytest.raises(weights.WeightsError, match=named):
        weights.read_bundle(tmp_path / "tiny")
