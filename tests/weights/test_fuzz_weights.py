"""Bundles and checkpoints of which something is changed at random: they load as they are, or are a WeightsError.

Seeded. ``CELLPRIOR_FUZZ=<n>`` makes ``n`` changes of each kind of weights, in place of a few.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cellprior.genes import GeneMatchError, PeakMatchError
from cellprior.model import MODELS, CellPLM, MultiomeCLIP, ScBERT
from cellprior.weights import InertCheckpoint, WeightsError
from cellprior.weights._bundle import read_checkpoint
from tests.parity.cellplm_golden import Golden as CellPLMGolden
from tests.parity.scbert_golden import Golden as ScBERTGolden

N = int(os.environ.get("CELLPRIOR_FUZZ", "0")) or 25
STORED = Path(__file__).parents[1] / "compatibility"
BUNDLES = {
    "CellPLM": STORED / "bundle-format-1" / "CellPLM",
    "ScBERT": STORED / "bundle-format-1" / "ScBERT",
    "MultiomeCLIP": STORED / "bundle-format-2" / "MultiomeCLIP",
    "MultiomeCLIP of format 1": STORED / "bundle-format-1" / "MultiomeCLIP",
}
FILES = ("config.json", "genes.tsv", "peaks.tsv", "model.safetensors", "README.md")
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**20, 2**31, 2**63, 10**400, 0.5, 1.5, -0.1, 1e308),
    *(float("nan"), float("inf"), "", "8", "vae", "\x1b[2J", [], [1], [8, 8], [[1]], {}, {"a": 1}),
]
DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bytes are others, are gone, or are new; or the end is missing."""
    changed, kind = bytearray(data), rng.random()
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        i = rng.randrange(len(changed) or 1)
        if kind < 0.5:
            changed[i : i + 1] = bytes([rng.randrange(256)])
        elif kind < 0.7:
            del changed[i : i + rng.randrange(1, 20)]
        elif kind < 0.85:
            changed[i:i] = rng.randbytes(rng.randrange(1, 9))
        else:
            del changed[i:]
    return bytes(changed)


def change_bytes(folder: Path, rng: random.Random) -> str:
    name = rng.choice([name for name in FILES if (folder / name).exists()])
    (folder / name).write_bytes(flip((folder / name).read_bytes(), rng))
    return f"bytes of {name}"


def change_config(folder: Path, rng: random.Random) -> str:
    """One value, at any depth, is of another type or out of its range; or is gone, or has another name."""
    config = json.loads((folder / "config.json").read_text())
    at, path = config, []
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        path.append(key)
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.2:
            break
        at = at[key]
    what = rng.random()
    if what < 0.1:
        del at[key]
    elif what < 0.2 and isinstance(at, dict):
        at[rng.choice(["adata", "registry", "genes", "min_coverage", "n_genes", "self"])] = at.pop(key)
    else:
        at[key] = rng.choice(ODD)
    (folder / "config.json").write_text(json.dumps(config))
    return f"config {path}"


def change_tensors(folder: Path, rng: random.Random) -> str:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name, what = change_one(tensors, rng)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return f"{what} of {name}"


def change_one(tensors: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(tensors))
    tensor, what = tensors[name], rng.choice(["gone", "name", "value", "dtype", "shape", "new"])
    if what in ("gone", "name"):
        del tensors[name]
    if what in ("new", "name"):
        tensors[f"{name}.other"] = tensor.clone()
    elif what == "value" and tensor.is_floating_point():
        tensors[name] = tensor.clone()
        if tensor.numel():
            tensors[name].view(-1)[rng.randrange(tensor.numel())] = rng.choice([np.nan, np.inf, -np.inf])
    elif what == "dtype":
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif what == "shape":
        tensors[name] = rng.choice([tensor[None], tensor.reshape(-1)[:-1], torch.empty(0)]).clone()
    return name, what


def change_table(folder: Path, rng: random.Random) -> str:
    path = folder / rng.choice([name for name in ("genes.tsv", "peaks.tsv") if (folder / name).exists()])
    lines = path.read_text().split("\n")
    i, j = rng.randrange(len(lines) - 1), rng.randrange(len(lines) - 1)
    what = rng.choice(["twice", "swap", "gone", "empty", "fields", "quote", "nul"])
    edits: dict[str, Callable[[], Any]] = {
        "twice": lambda: lines.__setitem__(i, lines[j]),
        "swap": lambda: lines.__setitem__(slice(None), [*lines[:i], lines[j], *lines[i + 1 :]]),
        "gone": lambda: lines.pop(i),
        "empty": lambda: lines.__setitem__(i, "\t\t"),
        "fields": lambda: lines.__setitem__(i, lines[i] + "\tmore\tfields"),
        "quote": lambda: lines.__setitem__(i, '"' + lines[i]),
        "nul": lambda: lines.__setitem__(i, lines[i] + "\0\x1b"),
    }
    edits[what]()
    path.write_text("\n".join(lines))
    return f"{what} in {path.name}"


def load(cls: type[Any], path: Path, n_genes: int) -> None:
    """As from_pretrained does, without data: what they add is no matter of the file."""
    bundle, _ = cls._read_weights(path)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        module = cls._blank(**{**bundle.config["network"], **bundle.vocabulary})
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert len(bundle.genes) == n_genes or "n_genes" not in bundle.config


@pytest.mark.parametrize("kind", BUNDLES)
def test_a_bundle_that_was_changed_loads_whole_or_is_refused(tmp_path: Path, kind: str):
    rng = random.Random(f"bundle {kind}")
    cls = next(cls for cls in MODELS if kind.startswith(cls.__name__))
    n_genes = len((BUNDLES[kind] / "genes.tsv").read_text().splitlines()) - 1
    refused = 0
    changes = [change_bytes, change_config, change_config, change_tensors, change_table]
    for i in range(N):
        folder = tmp_path / f"{i}"
        shutil.copytree(BUNDLES[kind], folder)
        what = rng.choice(changes)(folder, rng)
        try:
            load(cls, folder, n_genes)
        except WeightsError as error:
            refused += 1
            assert str(folder) in str(error), what
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        shutil.rmtree(folder)
    assert refused > N / 4


CHECKPOINTS: dict[str, tuple[type[Any], Callable[[Path], Path]]] = {
    "CellPLM": (CellPLM, lambda folder: CellPLMGolden.load("vae").write(folder)),
    "ScBERT": (ScBERT, lambda folder: ScBERTGolden.load("a").write(folder)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_an_official_checkpoint_that_was_changed_loads_whole_or_is_refused(tmp_path: Path, kind: str):
    rng = random.Random(f"checkpoint {kind}")
    cls, write = CHECKPOINTS[kind]
    original = write(tmp_path / "official")
    content = torch.load(original)
    refused = 0
    for i in range(N):
        folder = tmp_path / f"{i}"
        shutil.copytree(original.parent, folder)
        path = folder / original.name
        what = rng.choice(["checkpoint", "beside", "tensors"])
        if what == "tensors":
            tensors = dict(content["model_state_dict"])
            what = str(change_one(tensors, rng))
            torch.save({**content, "model_state_dict": tensors}, path)
        else:
            others = [other for other in folder.iterdir() if other != path]
            changed = path if what == "checkpoint" else rng.choice(others)
            changed.write_bytes(flip(changed.read_bytes(), rng))
        try:
            load(cls, path, 0)
        except WeightsError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        shutil.rmtree(folder)
    assert refused > N / 5


@pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "format before torch 1.6"])
def test_a_file_of_torch_save_that_was_changed_is_read_or_refused(tmp_path: Path, zipped: bool):
    rng = random.Random(f"torch.save {zipped}")
    path = tmp_path / "x.ckpt"
    plain = {"state_dict": {f"a{i}": torch.randn(3, 4) for i in range(5)}, "l": [1, 2.5, "x", (1,), {"k": 1}]}
    torch.save(plain, path, _use_new_zipfile_serialization=zipped)
    original = path.read_bytes()
    for _ in range(N):
        path.write_bytes(flip(original, rng))
        for read in (read_checkpoint, read_inert):
            try:
                read(path)
            except WeightsError as error:
                assert str(path) in str(error)


def read_inert(path: Path) -> None:
    checkpoint = InertCheckpoint(path)
    content = checkpoint.content()
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        checkpoint.tensors(content["state_dict"])


def test_weights_that_are_refused_leave_data_and_random_numbers_as_they_were(tmp_path: Path):
    from tests.compatibility.cells import multiome, rna

    shutil.copytree(BUNDLES["CellPLM"], tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["latent.mu.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    data, before = rna(), torch.get_rng_state()
    with pytest.raises(WeightsError, match=r"model\.safetensors: the tensor 'latent\.mu\.weight'.*NaN"):
        CellPLM.from_pretrained(tmp_path / "b", data)
    assert "_scvi_uuid" not in data.uns and torch.equal(torch.get_rng_state(), before)
    with pytest.raises((WeightsError, GeneMatchError, PeakMatchError)):
        MultiomeCLIP.from_pretrained(tmp_path / "b", multiome())
