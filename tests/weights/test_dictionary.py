"""Pickled dictionaries of names and numbers, read without running them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellprior.weights import WeightsError
from cellprior.weights._dictionary import read_dictionary
from tests.contract.shared import Bomb

NUMBERS = {
    "a": 1,
    "b": -3,
    "c": 2.5,
    "d": "text",
    "e": np.int16(7),
    "f": np.float64(0.1),
    "g": 10**9,
    "h": np.int64(-5),
}


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numbers_and_text_are_read_as_pickle_would(tmp_path, protocol):
    found = read_dictionary(write(tmp_path / "x.pkl", NUMBERS, protocol))
    assert found == NUMBERS
    assert [type(value) for value in found.values()] == [int, int, float, str, int, float, int, int]
    big_endian = write(tmp_path / "y.pkl", {"a": np.array(258, dtype=">i2")[()]})
    assert read_dictionary(big_endian) == {"a": 258}


def test_names_of_old_and_new_numpy_are_known(tmp_path):
    path = write(tmp_path / "x.pkl", {"a": np.float64(0.5)}, protocol=3)
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    content = path.read_bytes()
    assert new in content or old in content
    for name in (new, old):
        path.write_bytes(content.replace(new, old).replace(old, name))
        assert read_dictionary(path) == {"a": 0.5}


def test_a_dictionary_that_is_a_program_is_refused_and_not_run(tmp_path):
    path = write(tmp_path / "x.pkl", {"a": Bomb(tmp_path / "exploded")})
    with pytest.raises(WeightsError, match=r"nothing in it was executed: it names posix\.mkdir|nt\.mkdir"):
        read_dictionary(path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "exploded").exists()  # the bomb is live


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04cnumpy\ndtype\n}(X\x01\x00\x00\x00aK\x01ub.",  # a state for a class
        b"\x80\x04cnumpy.core.multiarray\nscalar\n}(X\x01\x00\x00\x00aK\x01ub.",  # and for a function
        b"\x80\x04cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.",
        b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # an extension
        b"Pid\n.",  # a persistent id
    ],
)
def test_instructions_that_a_dictionary_does_not_need_are_refused(tmp_path, program):
    (tmp_path / "x.pkl").write_bytes(program)
    with pytest.raises(WeightsError, match=r"x\.pkl"):
        read_dictionary(tmp_path / "x.pkl")


def test_any_cut_and_any_changed_byte_gives_a_dictionary_or_an_error_of_ours(tmp_path):
    content = pickle.dumps(NUMBERS, protocol=4)
    path, rng = tmp_path / "x.pkl", np.random.default_rng(0)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(WeightsError):
            read_dictionary(path)
    for _ in range(500):
        changed = bytearray(content)
        changed[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(changed)
        try:
            assert isinstance(read_dictionary(path), dict)
        except WeightsError:
            pass


@pytest.mark.parametrize("content", [["a"], {"a": [1]}, {1: "a"}, {"a": None}, {"a": True}])
def test_what_is_no_dictionary_of_names_and_numbers_is_refused(tmp_path, content):
    with pytest.raises(WeightsError, match=r"Needed: a pickled dictionary"):
        read_dictionary(write(tmp_path / "x.pkl", content))


def test_a_missing_and_a_far_too_large_file_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="There is no file"):
        read_dictionary(tmp_path / "x.pkl")
    with (tmp_path / "x.pkl").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(WeightsError, match="a dictionary of genes has a few"):
        read_dictionary(tmp_path / "x.pkl")


def test_the_real_dictionaries_are_read_as_pickle_would(mirror):
    for name in ("token_dictionary", "gene_median_dictionary"):
        path = mirror / f"{name}_gc30M.pkl"
        assert read_dictionary(path) == pickle.load(io.BytesIO(path.read_bytes()))
