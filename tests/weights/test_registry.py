from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cellprior import weights
from cellprior.weights._registry import HERE, entries, parse_registry

WELL_FORMED = {
    "type": "model",
    "support": "ready",
    "size": 3,
    "licence": "CC0",
    "citation": "A. Author 2020",
    "genes": "three genes",
    "page": "https://example.org",
    "files": [{"name": "a.bin", "url": "https://example.org/a.bin", "sha256": "0" * 64}],
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "registry.yaml"
    path.write_text(yaml.safe_dump({"datasets": {"tiny": {**WELL_FORMED, **changes}}}))
    return path


def test_a_well_formed_entry_is_read_as_it_stands(tmp_path: Path):
    entry = parse_registry(write(tmp_path))["tiny"]
    assert (entry.name, entry.type, entry.size, entry.model) == ("tiny", "model", 3, None)
    assert entry.files[0].url == "https://example.org/a.bin"
    assert entry.files[0].sha256 == "0" * 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"license": "MIT"}, "license"),
        ({"files": [{"name": "a.bin", "url": "u", "sha": "0" * 64}]}, "'sha'"),
        ({"files": [{"url": "u"}]}, "name"),
        ({"files": [{"name": "a.bin", "url": "u", "sha256": "0" * 63}]}, "64 hex digits"),
        ({"files": [{"name": "a.bin", "url": "u", "sha256": 1}]}, "sha256"),
        ({"files": [{"name": "a.bin"}]}, "no `url`"),
        ({"files": [{"name": "../a.bin", "url": "u"}]}, "plain name"),
        ({"files": [{"name": "a.bin", "url": "u", "member": "ckpt/a.bin"}]}, "`archive` and `member`"),
        ({"type": "modle"}, "modle"),
        ({"support": "maybe"}, "maybe"),
        ({"licence": None}, "licence"),
    ],
)
def test_a_malformed_entry_is_an_error_that_names_the_key(tmp_path: Path, changes: dict, named: str):
    with pytest.raises(weights.WeightsError, match=named):
        parse_registry(write(tmp_path, **changes))


def test_the_registry_has_the_promised_entries_each_with_a_licence_and_a_citation():
    assert set(entries()) == {
        "cellplm-starter",
        "cellplm-20231027",
        "cellplm-20230926",
        "scbert-starter",
        "multiomeclip-starter",
        "scbert-panglao",
        "geneformer-v1-10m",
        "geneformer-v2-104m",
        "geneformer-v2-104m-clcancer",
        "geneformer-v2-316m",
        "geneformer-gf-12l-30m",
        "geneformer-gf-12l-95m",
        "geneformer-gf-12l-95m-clcancer",
        "geneformer-gf-20l-95m",
        "scgpt-human",
        "scgpt-cp",
        "nicheformer",
        "uce-4layer",
        "uce-33layer",
        "gencode-human-48",
        "gencode-human-38",
        "gencode-mouse-M37",
    }
    for entry in entries().values():
        assert entry.licence
        assert entry.citation
        assert (entry.model is None) == (entry.type == "gene table")


def test_only_files_that_nobody_published_a_hash_for_lack_one():
    unknown = {
        file.name if file.name in ("config.json", "args.json") else f"{entry.name}/{file.name}"
        for entry in entries().values()
        if not entry.packaged
        for file in entry.files
        if not file.sha256
    }
    expected = {"cellplm-20230926/20230926_85M.best.ckpt", "nicheformer/model.safetensors"}
    assert unknown == {*expected, "config.json", "args.json"}


def test_every_registered_file_in_the_mirror_has_the_registered_hash(mirror: Path):
    here = {
        file.name: file.sha256
        for entry in entries().values()
        if not entry.packaged
        for file in entry.files
        if (mirror / file.name).is_file()
    }
    assert len(here) >= 5
    found = {name: hashlib.sha256((mirror / name).read_bytes()).hexdigest() for name in here}
    assert found == here


def test_available_is_a_table_that_says_what_is_on_this_machine():
    table = weights.available()
    assert table.index.name == "name"
    assert list(table.index) == list(entries())
    assert table.loc["cellplm-starter", "status"] == "packaged"
    assert table.loc["scbert-panglao", ["kind", "model", "status", "support"]].tolist() == [
        "model",
        "ScBERT",
        "not downloaded",
        "untested",
    ]
    assert table.loc["scbert-panglao", "licence"].startswith("GPL-3")
    assert table.loc["gencode-human-48", ["kind", "size"]].tolist() == ["gene table", "0.9 MB"]


def test_the_size_of_a_download_is_that_of_the_whole_archive():
    sizes = weights.available()[["size", "download"]]
    assert sizes.loc["cellplm-20231027"].tolist() == ["330 MB", "2.4 GB"]
    assert sizes.loc["cellplm-starter", "download"] == "none"
    assert sizes.loc["gencode-human-48"].tolist() == ["0.9 MB", "0.9 MB"]


def test_the_status_is_cached_once_all_files_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CELLPRIOR_CACHE", str(tmp_path))
    folder = tmp_path / "scbert-panglao"
    folder.mkdir()
    (folder / "panglao_pretrain.pth").touch()
    assert weights.available().loc["scbert-panglao", "status"] == "not downloaded"
    (folder / "scbert_gene_order_16906.txt").touch()
    assert weights.available().loc["scbert-panglao", "status"] == "cached"


def test_a_misspelt_name_is_an_error_that_names_what_comes_close():
    with pytest.raises(weights.WeightsError, match="Did you mean 'scbert-panglao'"):
        weights.fetch("scbert_panglao")


def test_a_name_like_no_other_is_an_error_that_lists_all_names():
    with pytest.raises(weights.WeightsError, match=r"knows cellplm-starter, .*gencode-mouse-M37"):
        weights.card("zzz")


def test_importing_weights_imports_neither_torch_nor_pandas_nor_pooch():
    code = "import sys, json, cellprior.weights; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "scvi", "pandas", "pooch"}.isdisjoint(json.loads(done.stdout))


def test_the_registry_file_is_where_the_package_looks_for_it():
    assert (HERE / "registry.yaml").is_file()
