"""The files of checkpoints: damage is found, and only what is proven to be the run's own is deleted."""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from small_checkpoints import assert_same, make_state, save_some

from qfleet.runtime.checkpoint_files import CheckpointError
from qfleet.runtime.checkpoints import Checkpoints


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_to_any_file_is_found(damaged: Path, damage: Any) -> None:
    newest = damaged / "20"
    names = [*json.loads((newest / "checksums.json").read_text())["files"], "checksums.json"]
    assert "index.json" in names and any(name.startswith("replay/ocdbt") for name in names)
    like = {"learner": make_state(), "replay": {"obs": jnp.zeros((1000, 4), int)}}
    for name in names:
        file = newest / name
        original = file.read_bytes()
        damage(file)
        with pytest.raises(CheckpointError) as raised:
            Checkpoints(damaged).restore(None, like)
        assert name in str(raised.value) and str(newest) in str(raised.value)
        assert "continue from the newest intact one before it: --checkpoint 10" in str(raised.value)
        file.write_bytes(original)
    Checkpoints(damaged).restore(None, like)


def test_moving_a_damaged_checkpoint_away_continues_from_the_one_before(damaged: Path, tmp_path: Path) -> None:
    (damaged / "20").rename(tmp_path / "broken")
    assert_same(Checkpoints(damaged).restore_item("learner", make_state()), make_state(10))


def test_damage_to_the_replay_does_not_keep_the_policy_from_loading(damaged: Path) -> None:
    shutil.rmtree(damaged / "20" / "replay")
    assert_same(Checkpoints(damaged).restore_item("learner", make_state()), make_state(20))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder.mkdir(), (folder / "checksums.json").write_text("[]")),
        lambda folder: (folder.mkdir(), (folder / "checksums.json").write_text('{"files": {}}')),
        lambda folder: (folder.mkdir(), (folder / "checksums.json").write_text('{"files": {"index.json": 3}}')),
    ],
)
def test_a_folder_that_only_looks_like_a_checkpoint_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "30")
    with pytest.raises(CheckpointError, match=r"30: checksums\.json .*no older one is intact"):
        Checkpoints(tmp_path).read_metadata()


def foreign_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def link_to_a_checkpoint(folder: Path) -> None:
    save_some(folder.parent.parent / "elsewhere", 1, keep=9)
    folder.symlink_to(folder.parent.parent / "elsewhere" / "1")


@pytest.mark.parametrize("make", [foreign_folder, link_to_a_checkpoint, Path.mkdir, Path.touch])
@pytest.mark.parametrize("name", ["2019", "2023", "007", "٣"])
def test_what_is_not_the_runs_own_is_neither_counted_nor_deleted(tmp_path: Path, make: Any, name: str) -> None:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    make(directory / name)
    before = sorted(path.name for path in (directory / name).glob("*"))
    save_some(directory, 10, 20, 30, keep=1)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.all() == [30]
        checkpoints.set_aside_after(5)
        assert checkpoints.all() == []
    assert sorted(path.name for path in (directory / name).glob("*")) == before
    assert sorted(path.name for path in directory.iterdir()) == sorted([name, "30.set-aside"])


def test_checkpoints_of_another_run_are_refused_and_never_deleted(tmp_path: Path) -> None:
    mine, other = 16 * "a", 16 * "b"
    with Checkpoints(tmp_path, keep=1, run_id=other) as checkpoints:
        checkpoints.save(3, {"learner": jnp.zeros(2)}, {})
    with Checkpoints(tmp_path, keep=1, run_id=mine) as checkpoints:
        for steps in (1, 2, 4, 5):
            checkpoints.save(steps, {"learner": jnp.ones(2)}, {})
        checkpoints.wait()
        assert checkpoints.all() == [3, 5]
        with pytest.raises(CheckpointError, match=rf"of the run in whose folder .*{other}.*{mine}; move it back"):
            checkpoints.restore_item("learner", env_steps=3)
        with pytest.raises(CheckpointError, match="of the run in whose folder"):
            checkpoints.save(3, {"learner": jnp.ones(2)}, {})


def test_a_file_of_the_users_in_a_checkpoint_keeps_it_from_being_deleted(tmp_path: Path) -> None:
    save_some(tmp_path, 1, 2)
    (tmp_path / "1" / "notes.txt").write_text("the best one")
    save_some(tmp_path, 3, 4, keep=2)
    assert Checkpoints(tmp_path).all() == [1, 3, 4]
    assert (tmp_path / "1" / "notes.txt").exists()


def test_a_damaged_checkpoint_is_not_deleted_by_itself(damaged: Path) -> None:
    (damaged / "10" / "checksums.json").write_text("{}")
    save_some(damaged, 30, keep=1)
    assert Checkpoints(damaged).all() == [10, 30]


def test_an_item_that_is_a_link_out_of_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    save_some(tmp_path / "checkpoints", 5)
    learner = (tmp_path / "checkpoints" / "5" / "learner").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints" / "5" / "learner").symlink_to(learner)
    with pytest.raises(CheckpointError, match="learner must be a folder, got a symbolic link"):
        Checkpoints(tmp_path / "checkpoints").restore_item("learner")


def test_nothing_is_deleted_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to("elsewhere")
    save_some(tmp_path / "checkpoints", 1, 2, 3, keep=1)
    (tmp_path / "elsewhere" / "7.deleted-tmp").mkdir()
    save_some(tmp_path / "checkpoints", 4, keep=1)
    assert Checkpoints(tmp_path / "elsewhere").all() == [1, 2, 3, 4]
    assert (tmp_path / "elsewhere" / "7.deleted-tmp").exists()


def test_a_deletion_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    save_some(tmp_path, 1, 2)
    monkeypatch.setattr("qfleet.runtime.checkpoint_files.shutil.rmtree", fail)
    save_some(tmp_path, 3, keep=2)
    assert Checkpoints(tmp_path).all() == [2, 3]
    assert f"{tmp_path / '1.deleted-tmp'}, can't be deleted" in caplog.text


def test_a_foreign_folder_in_the_way_is_named(tmp_path: Path) -> None:
    foreign_folder(tmp_path / "5")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(OSError, match="5 is in the way and no checkpoint; move"):
        checkpoints.save(5, {"learner": jnp.zeros(2)}, {})
    assert (tmp_path / "5" / "notes.txt").read_text() == "mine"


def test_a_checkpoint_of_a_later_format_asks_for_its_qfleet(damaged: Path) -> None:
    index = (damaged / "20" / "index.json").read_text().replace('"format": 2', '"format": 3')
    (damaged / "20" / "index.json").write_text(index)
    sums = json.loads((damaged / "20" / "checksums.json").read_text())
    sums["files"]["index.json"] = [len(index), zlib.crc32(index.encode())]
    (damaged / "20" / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="format must be 2, got 3"):
        Checkpoints(damaged).read_metadata()
