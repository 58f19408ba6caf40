"""The folder of the private Valkey: in the home directory, or for temporary files if that cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from proxy.config.data_folder import DataFolder, can_be_made, data_folder, nearest_existing
from proxy.config.load import load


@pytest.fixture(autouse=True)
def _on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")


def unwritable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Let these folders be as on a read-only file system; root, who runs tests, may write everywhere else."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path not in folders and access(path, mode))


def test_it_lies_in_the_users_own_folder_one_per_port(tmp_path: Path) -> None:
    """XDG_DATA_HOME, else the folder in the home directory; neither has a warning."""
    assert data_folder({"XDG_DATA_HOME": "/d"}, 8080) == DataFolder(Path("/d/cairn/valkey-8080"))
    assert data_folder({"HOME": str(tmp_path)}, 1) == DataFolder(tmp_path / ".local/share/cairn/valkey-1")
    given = {"HOME": "/nonexistent", "XDG_DATA_HOME": "/d"}
    assert data_folder(given, 8080) == DataFolder(Path("/d/cairn/valkey-8080"))


def test_on_macos_it_lies_where_its_programs_keep_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Library/Application Support."""
    monkeypatch.setattr("sys.platform", "darwin")
    assert data_folder({"HOME": str(tmp_path)}, 1).path == tmp_path / "Library/Application Support/Cairn/valkey-1"


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}], ids=["unset", "empty"])
def test_without_a_home_it_is_a_temporary_one_of_the_user(environ: dict[str, str]) -> None:
    """The warning names it and says what to set."""
    folder = data_folder(environ, 8080)
    assert folder.path == Path(tempfile.gettempdir()) / f"cairn-{os.getuid()}-valkey-8080"
    assert folder.warning.startswith(f"HOME is not set: the files of the private Valkey are in {folder.path}")
    assert "set redis.folder or XDG_DATA_HOME" in folder.warning


def test_with_a_home_that_cannot_be_written_it_is_a_temporary_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing home, as containers have, and one on a read-only root."""
    missing = tmp_path / "nonexistent"
    unwritable(monkeypatch, tmp_path)
    for home in (missing, tmp_path):
        folder = data_folder({"HOME": str(home)}, 1)
        assert folder.path.parent == Path(tempfile.gettempdir())
        assert folder.warning.startswith(f"the home directory {home} is not writable: ")


def test_a_folder_that_may_not_be_looked_into_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As another user's home is; looking is no error."""
    hidden = tmp_path / "home"
    unwritable(monkeypatch, tmp_path)
    monkeypatch.setattr(os.path, "exists", lambda path: path == tmp_path)
    assert nearest_existing(hidden / "share") == tmp_path
    assert not can_be_made(hidden / "share")


def test_only_a_private_valkey_has_a_folder(tmp_path: Path) -> None:
    """A configuration that names a Redis or a folder gets neither another folder nor a warning."""
    loaded = load(None, {"CAIRN_REDIS": "redis://h"})
    assert (loaded.config.redis.folder, loaded.warnings) == (None, ())
    loaded = load(None, {"CAIRN_REDIS__FOLDER": "/f"})
    assert (loaded.config.redis.folder, loaded.warnings) == ("/f", ())
    loaded = load(None, {"CAIRN_PORT": "7"})
    assert loaded.config.redis.folder == str(data_folder({}, 7).path)
    assert loaded.warnings == (data_folder({}, 7).warning,)
