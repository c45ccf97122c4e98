"""The folder for the files of a local Ray: only the user can enter it, and nothing of it stays."""

import os
import stat
from pathlib import Path

import pytest

from qfleet.config import ConfigError
from qfleet.topologies.fleet.private_folder import private_folder


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("qfleet.topologies.fleet.private_folder._MAX_SOCKET_BYTES", 10_000)
    return tmp_path


def test_only_the_user_can_enter_it_and_it_is_gone_at_the_end(parent: Path) -> None:
    with private_folder() as folder:
        (outer,) = parent.iterdir()
        assert outer == folder.parent and stat.S_IMODE(outer.stat().st_mode) == 0o700
        folder.mkdir(mode=0o777)
        (folder / "socket").touch()
    assert list(parent.iterdir()) == []


def test_it_is_gone_after_an_error(parent: Path) -> None:
    with pytest.raises(KeyError), private_folder():
        raise KeyError
    assert list(parent.iterdir()) == []


def test_folders_of_processes_that_are_gone_are_removed_and_those_of_others_stay(parent: Path) -> None:
    abandoned, unlocked, foreign = (parent / name for name in ("qfleet-ray-1", "qfleet-ray-2", "mine"))
    for folder in (abandoned, unlocked, foreign):
        folder.mkdir()
    (abandoned / "lock").touch()
    (foreign / "lock").touch()
    (parent / "qfleet-ray-3").symlink_to(foreign)
    with private_folder() as first, private_folder() as second:
        assert not abandoned.exists() and first.parent.exists() and second.parent.exists()
        assert unlocked.exists() and (foreign / "lock").exists()  # one may be in the making


def test_a_path_that_is_too_long_for_sockets_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / (100 * "x")))
    with private_folder() as folder:
        assert folder.parents[1] == Path("/tmp")
        sockets = folder / f"session_{'x' * 31}_{os.getpid()}" / "sockets" / "plasma_store"
        assert len(os.fsencode(sockets)) <= 107
    assert not folder.parent.exists()


def test_no_place_for_it_is_one_error(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(parent / "absent"))
    with (
        pytest.raises(ConfigError, match=r"a local Ray needs a folder .*absent \(No such file.*set TMPDIR"),
        private_folder(),
    ):
        pass
