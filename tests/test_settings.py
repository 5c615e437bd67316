from __future__ import annotations

import os
from pathlib import Path

import pytest

import cellprior as cp
from cellprior.settings import Settings


def test_settings_is_one_object_however_it_is_imported():
    from cellprior.settings import settings

    assert cp.settings is settings
    assert isinstance(settings, Settings)


def test_the_environment_is_read_at_every_access(monkeypatch, tmp_path):
    for folder in ("first", "second"):
        monkeypatch.setenv("CELLPRIOR_CACHE", str(tmp_path / folder))
        assert cp.settings.cache_dir == tmp_path / folder


def test_an_assigned_value_wins_over_the_environment_until_none_is_assigned(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLPRIOR_CACHE", str(tmp_path / "environment"))
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    monkeypatch.setenv("CELLPRIOR_MIRROR", "http://mirror.example/files")

    cp.settings.cache_dir = tmp_path / "mine"
    cp.settings.offline = False
    cp.settings.mirror = tmp_path
    assert cp.settings.cache_dir == tmp_path / "mine"
    assert cp.settings.offline is False
    assert cp.settings.mirror == str(tmp_path)

    cp.settings.cache_dir = None
    cp.settings.offline = None
    cp.settings.mirror = None
    assert cp.settings.cache_dir == tmp_path / "environment"
    assert cp.settings.offline is True
    assert cp.settings.mirror == "http://mirror.example/files"


def test_without_a_setting_the_cache_is_a_folder_of_its_own_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("CELLPRIOR_CACHE")
    folder = cp.settings.cache_dir
    assert folder.is_absolute()
    assert "cellprior" in folder.parts
    assert folder != Path.home()


def test_a_tilde_means_the_home_folder(monkeypatch):
    monkeypatch.setenv("CELLPRIOR_CACHE", os.path.join("~", "weights"))
    assert cp.settings.cache_dir == Path.home() / "weights"
    cp.settings.cache_dir = "~/others"
    assert cp.settings.cache_dir == Path.home() / "others"


@pytest.mark.parametrize(
    ("answer", "offline"),
    [("1", True), ("true", True), ("YES", True), (" on ", True), ("0", False), ("False", False), ("", False)],
)
def test_offline_understands_a_yes_and_a_no(monkeypatch, answer, offline):
    monkeypatch.setenv("CELLPRIOR_OFFLINE", answer)
    assert cp.settings.offline is offline


def test_an_offline_switch_that_is_neither_yes_nor_no_is_refused(monkeypatch):
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "maybe")
    with pytest.raises(ValueError, match="CELLPRIOR_OFFLINE is 'maybe'.*Set it to 1"):
        _ = cp.settings.offline


def test_by_default_there_is_a_network_and_no_mirror():
    assert cp.settings.offline is False
    assert cp.settings.mirror is None


def test_the_empty_string_switches_a_mirror_of_the_environment_off(monkeypatch):
    monkeypatch.setenv("CELLPRIOR_MIRROR", "http://mirror.example/files")
    cp.settings.mirror = ""
    assert cp.settings.mirror is None


def test_the_repr_shows_the_values_in_force(tmp_path):
    cp.settings.cache_dir = tmp_path
    cp.settings.offline = True
    rest = "offline=True, mirror=None, n_jobs=None, verbosity=1, progress=True"
    assert repr(cp.settings) == f"Settings(cache_dir={str(tmp_path)!r}, {rest})"


def test_bars_follow_the_verbosity_unless_they_are_set(monkeypatch):
    assert (cp.settings.verbosity, cp.settings.progress) == (1, True)
    monkeypatch.setenv("CELLPRIOR_VERBOSITY", "0")
    assert (cp.settings.verbosity, cp.settings.progress) == (0, False)
    monkeypatch.setenv("CELLPRIOR_PROGRESS", "yes")
    assert cp.settings.progress is True
    cp.settings.verbosity, cp.settings.progress = 2, False
    assert (cp.settings.verbosity, cp.settings.progress) == (2, False)


def test_a_verbosity_that_does_not_exist_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="settings.verbosity is 3: set it to 0"):
        cp.settings.verbosity = 3
    monkeypatch.setenv("CELLPRIOR_VERBOSITY", "loud")
    with pytest.raises(ValueError, match="CELLPRIOR_VERBOSITY is 'loud': set it to 0"):
        _ = cp.settings.verbosity
