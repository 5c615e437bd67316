"""Small gene tables in the place of GENCODE."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cellprior.weights import WeightsError

CURRENT = """\
ENSG00000000001,TP53
ENSG00000000002,CCN2
ENSG00000000003,ELOA
ENSG00000000004,NEWA
ENSG00000000005,SWAP
ENSG00000000006,CD99
ENSG00000000007,CD99
ENSG00000000008,TWIN
ENSG00000000009,TWIN
ENSG00000000010,ENSG00000000010
"""
OLDER = """\
ENSG00000000001,TP53
ENSG00000000002,CTGF
ENSG00000000003,TCEB3
ENSG00000000004,SWAP
ENSG00000000005,OLDB
ENSG00000000006,CD99
ENSG00000000006,CD99
ENSG00000000008,TWIN
ENSG00000000009,TWIN
ENSG00000000010,GONE
"""
MOUSE = """\
ENSMUSG00000000001,Xkr4
ENSMUSG00000000002,Sox17
ENSMUSG00000000003,Mrpl15
"""
FILES = {
    "gencode-human-48": ("genes_homo_sapiens.gencode48.csv.gz", CURRENT),
    "gencode-human-38": ("genes_homo_sapiens.gencode38.csv.gz", OLDER),
    "gencode-mouse-M37": ("genes_mus_musculus.gencodeM37.csv.gz", MOUSE),
}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gene tables that can be had; the list grows by the name of each one that is asked for."""
    asked: list[str] = []

    def fetch(name: str, *, progressbar: bool = True) -> Path:
        asked.append(name)
        file, text = FILES[name]
        (tmp_path / file).write_bytes(gzip.compress(text.encode()))
        return tmp_path

    monkeypatch.setattr("cellprior.weights.fetch", fetch)
    return asked


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gene tables that cannot be had; the list grows by the name of each one that is asked for."""
    asked: list[str] = []

    def fetch(name: str, *, progressbar: bool = True) -> Path:
        asked.append(name)
        msg = f"{name} is not cached and cellprior is offline.\nMore advice."
        raise WeightsError(msg)

    monkeypatch.setattr("cellprior.weights.fetch", fetch)
    return asked


@pytest.fixture
def mirror_tables(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real gene tables."""

    def fetch(name: str, *, progressbar: bool = True) -> Path:
        return mirror

    monkeypatch.setattr("cellprior.weights.fetch", fetch)
    return mirror


@pytest.fixture(scope="session")
def scbert_symbols(mirror: Path) -> list[str]:
    """Vocabulary of scBERT: symbols, some of them retired."""
    return (mirror / "scbert_gene_order_16906.txt").read_text().split()


@pytest.fixture(scope="session")
def cellplm_ids(mirror: Path) -> list[str]:
    """Vocabulary of CellPLM: Ensembl ids."""
    return json.loads((mirror / "20230926_85M.config.json").read_text())["gene_list"]
