from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cellprior import weights
from cellprior.weights._registry import Entry, FileEntry


def test_a_card_without_a_readme_is_made_from_the_registry():
    card = weights.card("scbert-panglao")
    text = str(card)
    assert text.startswith("# scbert-panglao\n")
    for fact in (
        "GPL-3.0",
        "Nature Machine Intelligence",
        "PanglaoDB",
        "16,906 human symbols",
        "88 MB",
        "ScBERT",
    ):
        assert fact in text
    assert "aa27109136580b24a1b985f63d0ba31f22490d09e71b13d1793cbff38619dfe3" in text
    assert "https://huggingface.co/btraven/scbert-panglao-pretrain/resolve/" in text
    assert card._repr_markdown_() == text


def test_a_card_says_which_file_has_no_published_hash():
    text = str(weights.card("cellplm-20230926"))
    assert "| 20230926_85M.best.ckpt | recorded at the first download |" in text


def test_a_card_is_the_readme_of_the_weights_where_they_are_on_this_machine(register: Callable[..., Entry]):
    entry = register(FileEntry("README.md", url="https://example.org/README.md"))
    assert "three genes" in str(weights.card("tiny"))
    entry.folder.mkdir(parents=True)
    (entry.folder / "README.md").write_text("# My weights, § 1\n", encoding="utf-8")
    assert str(weights.card("tiny")) == "# My weights, § 1\n"


def test_the_starter_is_in_the_package_and_needs_no_network(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    folder = weights.fetch("cellplm-starter")
    assert {path.name for path in folder.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "genes.tsv",
        "README.md",
    }
    assert str(weights.card("cellplm-starter")) == (folder / "README.md").read_text(encoding="utf-8")
    assert weights.read_bundle(folder).config["model"] == "CellPLM"
