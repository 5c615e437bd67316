from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from cellprior.model import convert
from cellprior.weights import InertCheckpoint, WeightsError, read_checkpoint
from cellprior.weights._inert import Inert, found, is_suspicious, row_names

BASE = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "float": BASE,
    "part": BASE[1:, ::2],
    "turned": BASE.T,
    "expanded": torch.ones(1, 3).expand(4, 3),
    "scalar": torch.tensor(1.0),
    "none": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    **{
        str(dtype): torch.tensor([0, 1, 2]).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
    },
}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def with_pickle(path: Path, pickled: bytes) -> Path:
    """A checkpoint whose pickle is this one."""
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickled)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_come_back_as_they_were_saved(tmp_path: Path, protocol: int):
    path = saved(tmp_path / "x.ckpt", {"state_dict": OrderedDict(TENSORS)}, pickle_protocol=protocol)
    checkpoint = InertCheckpoint(path)
    assert "torch._utils._rebuild_tensor_v2" in checkpoint.globals
    tensors = checkpoint.tensors(checkpoint.content()["state_dict"])
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def test_whatever_is_not_plain_is_a_placeholder_that_keeps_what_it_was_given(tmp_path: Path):
    frame = pd.DataFrame({"n": [1, 2], "kind": ["a", "b"]}, index=pd.Index(["x", "NA"], dtype=object))
    content = {
        "plain": [1, 2.5, "text", None, (True, b"bytes")],
        "set": {3},
        "path": Path("folder"),
        "namespace": SimpleNamespace(lr=0.1, nested={"n_heads": 8}),
        "frame": frame,
    }
    checkpoint = InertCheckpoint(saved(tmp_path / "x.ckpt", content))
    read = checkpoint.content()
    assert read["plain"] == content["plain"]
    for name in ("set", "path", "namespace", "frame"):
        assert isinstance(read[name], Inert), name
    assert read["namespace"].name == "types.SimpleNamespace"
    assert list(found(read, "n_heads")) == [8] and list(found(read, "lr")) == [0.1]
    assert row_names(read["frame"]) == ["x", "NA"]
    path = f"{type(Path()).__module__}.{type(Path()).__name__}"  # Python 3.13 says pathlib._local
    assert path in checkpoint.globals and not is_suspicious(path)


@pytest.mark.parametrize("value", [None, 3, {"_mgr": 1}, "text"])
def test_what_is_no_frame_is_an_error(value: Any):
    with pytest.raises(ValueError, match="no pandas frame"):
        row_names(value)


def test_no_module_that_a_pickle_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_foreign_module.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "class Thing:\n"
        f"    def __setstate__(self, state): open({str(tmp_path / 'called')!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import a_foreign_module

    thing = a_foreign_module.Thing()
    thing.size = 3
    path = saved(tmp_path / "x.ckpt", {"thing": thing})
    del sys.modules["a_foreign_module"]
    (tmp_path / "imported").unlink()
    read = InertCheckpoint(path).content()
    assert read["thing"].name == "a_foreign_module.Thing" and read["thing"].state == {"size": 3}
    assert "a_foreign_module" not in sys.modules
    assert not (tmp_path / "imported").exists() and not (tmp_path / "called").exists()
    torch.load(path, weights_only=False)  # the trap is live
    assert (tmp_path / "imported").exists() and (tmp_path / "called").exists()
    del sys.modules["a_foreign_module"]


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


CALL = text("touch exploded") + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
BOMBS = {
    "a global": b"cposix\nsystem\n" + CALL,
    "a global of Python 2": b"c__builtin__\neval\n" + CALL,
    "an instance": b"(" + text("touch exploded") + b"iposix\nsystem\n" + pickle.STOP,
    "names on the stack": text("posix") + text("system") + pickle.STACK_GLOBAL + CALL,
    "names on the stack that the list of instructions does not show": (
        text("posix") + text("system") + text("decoy") + pickle.POP + pickle.STACK_GLOBAL + CALL
    ),
    "a function inside a harmless module": b"cpickle\nloads\n" + CALL,
    "a module inside another": text("subprocess") + text("Popen") + pickle.STACK_GLOBAL + CALL,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_no_checkpoint_needs_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.chdir(tmp_path)
    path = with_pickle(tmp_path / "bomb.ckpt", pickle.PROTO + b"\x04" + BOMBS[kind])
    with pytest.raises(WeightsError, match="posix.system|builtins.eval|pickle.loads|subprocess.Popen"):
        InertCheckpoint(path).content()
    assert not Path("exploded").exists()


def test_a_name_that_would_command_a_terminal_is_spelled_out(tmp_path: Path):
    pickled = (
        pickle.PROTO
        + b"\x04"
        + b"cfriendly\x1b[2Jmodule\nThing\n"
        + pickle.EMPTY_TUPLE
        + pickle.REDUCE
        + b"."
    )
    checkpoint = InertCheckpoint(with_pickle(tmp_path / "x.ckpt", pickled))
    assert checkpoint.globals == [r"friendly\x1b[2Jmodule.Thing"]
    assert checkpoint.content().name == checkpoint.globals[0]


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02}",
        b"garbage",
        pickle.PROTO + b"\x04" + pickle.BINGET + b"\x07" + pickle.STOP,
        pickle.PROTO
        + b"\x04"
        + b"ccollections\nOrderedDict\n"
        + text("x")
        + pickle.TUPLE1
        + pickle.REDUCE
        + pickle.STOP,
        pickle.PROTO
        + b"\x04"
        + b"ccollections\nOrderedDict\n"
        + pickle.EMPTY_DICT
        + text("update")
        + text("x")
        + pickle.SETITEM
        + pickle.BUILD
        + pickle.STOP,
    ],
)
def test_a_pickle_that_is_damaged_or_made_up_is_refused(tmp_path: Path, pickled: bytes):
    with pytest.raises(WeightsError, match="is damaged"):
        InertCheckpoint(with_pickle(tmp_path / "x.ckpt", pickled)).content()


def test_a_tensor_that_reaches_beyond_its_storage_or_is_none_is_refused(tmp_path: Path):
    checkpoint = InertCheckpoint(saved(tmp_path / "x.ckpt", {"a": torch.ones(3), "b": "text"}))
    content = checkpoint.content()
    storage, _, _, *rest = content["a"].args
    for args in ((storage, 0, (4,), *rest), (storage, 2, (3,), *rest), ((*storage[:4], 7), 0, (3,), *rest)):
        content["a"].args = args
        with pytest.raises(WeightsError, match="damaged or of a kind that is not known"):
            checkpoint.tensors({"a": content["a"]})
    with pytest.raises(WeightsError, match="damaged or of a kind that is not known"):
        checkpoint.tensors({"b": content["b"]})


def test_a_file_that_torch_save_did_not_write_is_refused(tmp_path: Path):
    old = saved(tmp_path / "old.ckpt", {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as zipped:
        zipped.writestr("readme.txt", "hello")
    for path in (old, tmp_path / "other.ckpt"):
        with pytest.raises(WeightsError, match="was not written by torch.save of PyTorch 1.6 or later"):
            InertCheckpoint(path)


def test_what_is_appended_to_a_placeholder_is_kept_beside_what_it_was_made_with(tmp_path: Path):
    pickled = pickle.PROTO + b"\x02cfoo\nBar\n)R" + b"K\x01a" * 3 + b"(K\x02K\x03e."
    read = InertCheckpoint(with_pickle(tmp_path / "x.ckpt", pickled)).content()
    assert read.args == () and read.items == [1, 1, 1, 2, 3]


def test_a_compressed_checkpoint_is_refused_unread_by_every_reader(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 1000 + b"N.")
    for read in (InertCheckpoint, read_checkpoint, convert):
        with pytest.raises(
            WeightsError, match=r"archive/data\.pkl.*compressed, which torch\.save does not do"
        ):
            read(tmp_path / "x.ckpt", *([tmp_path / "out"] if read is convert else []))


@pytest.mark.parametrize(
    ("limit", "pickled"),
    [
        ("MAX_PICKLE", b"N0" * 100 + b"N."),
        ("MAX_STEPS", b"N0" * 100 + b"N."),
        ("MAX_TEXTS", (text("a") + pickle.MEMOIZE + b"0") * 20 + b"N."),
        ("MAX_GLOBALS", b"".join(b"cfoo\nBar%d\n0" % i for i in range(20)) + b"N."),
    ],
)
def test_a_pickle_that_would_take_long_or_much_memory_is_refused_before_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, pickled: bytes
):
    path = with_pickle(tmp_path / "x.ckpt", pickle.PROTO + b"\x04" + pickled)
    InertCheckpoint(path)
    monkeypatch.setattr(f"cellprior.weights._inert.{limit}", 10)
    with pytest.raises(WeightsError, match="is damaged, or was not written by torch.save"):
        InertCheckpoint(path)


def test_a_tensor_of_far_more_numbers_than_the_file_holds_is_refused(tmp_path: Path):
    huge = torch.ones(1).expand(10**6, 10**6)
    checkpoint = InertCheckpoint(saved(tmp_path / "x.ckpt", {"a": huge}))
    with pytest.raises(WeightsError, match="holds 1 numbers, for 1000000000000"):
        checkpoint.tensors(checkpoint.content())
