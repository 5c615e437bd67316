from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("ci", "folder", "outcome"),
    [
        ("", None, "1 skipped"),
        ("", "none", "1 skipped"),
        ("", "data", "1 passed"),
        ("", "elsewhere", "1 error"),
        ("true", None, "1 error"),
        ("true", "none", "1 skipped"),
        ("true", "data", "1 passed"),
    ],
)
def test_a_test_with_real_data_is_skipped_only_where_that_is_no_oversight(tmp_path, ci, folder, outcome):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text("def test_it(shared_data):\n    assert shared_data.is_dir()\n")
    (tmp_path / "data").mkdir()

    environment = {**os.environ, "CI": ci}
    environment.pop("CELLPRIOR_TEST_DATA", None)
    if folder is not None:
        environment["CELLPRIOR_TEST_DATA"] = folder if folder == "none" else str(tmp_path / folder)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        "test_it.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert outcome in done.stdout.splitlines()[-1]
