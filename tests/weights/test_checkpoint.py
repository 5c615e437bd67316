from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from cellprior import weights

STATE = {
    "model_state_dict": {"a": torch.arange(1000.0), "b": {"c": torch.ones(2, dtype=torch.float64)}},
    "epoch": 3,
}


class Bomb:
    """Makes a folder when it is unpickled the careless way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "format before torch 1.6"])
def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path, zipped: bool):
    path = tmp_path / "my.best.ckpt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    content = weights.read_checkpoint(path)
    assert content["epoch"] == 3
    assert torch.equal(content["model_state_dict"]["a"], torch.arange(1000.0))
    assert content["model_state_dict"]["b"]["c"].dtype == torch.float64


@pytest.mark.parametrize("write", ["torch.save", "pickle"])
def test_a_pickle_bomb_is_refused_and_not_executed(tmp_path: Path, write: str):
    path, folder = tmp_path / "bomb.ckpt", tmp_path / "exploded"
    content = {"model_state_dict": STATE, "extra": Bomb(folder)}
    if write == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["extra"]))
    with pytest.raises(weights.WeightsError, match="nothing in it was executed"):
        weights.read_checkpoint(path)
    assert not folder.exists()
    # The bomb is live.
    with path.open("rb") as file:
        torch.load(file, weights_only=False) if write == "torch.save" else pickle.load(file)
    assert folder.exists()


def test_the_refusal_names_what_the_file_asked_for(tmp_path: Path):
    torch.save({"extra": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.ckpt")
    with pytest.raises(weights.WeightsError, match=r"asks for \w+\.mkdir"):
        weights.read_checkpoint(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "format before torch 1.6"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, share: float, zipped: bool):
    path = tmp_path / "my.ckpt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(weights.WeightsError, match=r"my\.ckpt is (truncated|refused)"):
        weights.read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"hello world", "not a torch checkpoint"),
        (b"<!doctype html><html>Sign in</html>", "web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "not a torch checkpoint|not written by torch.save"),
    ],
    ids=["text", "web page", "HDF5"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, named: str):
    (tmp_path / "my.ckpt").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=named):
        weights.read_checkpoint(tmp_path / "my.ckpt")


def test_a_bare_tensor_is_not_a_checkpoint(tmp_path: Path):
    torch.save(torch.zeros(3), tmp_path / "my.ckpt")
    with pytest.raises(weights.WeightsError, match="holds a Tensor; needed: a dictionary"):
        weights.read_checkpoint(tmp_path / "my.ckpt")


@pytest.mark.parametrize("name", ["missing.ckpt", "."])
def test_a_path_that_is_not_a_file_is_an_error(tmp_path: Path, name: str):
    with pytest.raises(weights.WeightsError, match="There is no checkpoint file"):
        weights.read_checkpoint(tmp_path / name)
