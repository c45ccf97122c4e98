"""Checkpoints that the tests of reading and of damage share."""

import shutil
from pathlib import Path

import pytest
from small_checkpoints import save_some


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with checkpoints 10 and 20. Tests that damage them use a copy."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    save_some(directory, 10, 20)
    return directory


@pytest.fixture
def damaged(two_saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))
