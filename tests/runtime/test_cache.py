"""The compilation cache: a second process compiles nothing, and nothing is written where it shouldn't be."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import platformdirs
import pytest

from qfleet.runtime.cache import enable_compilation_cache

CODE = """
import jax, jax.numpy as jnp
from qfleet.runtime.cache import enable_compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
directory = enable_compilation_cache()
body = lambda x, _: (jnp.tanh(x @ x), x.sum())
jax.block_until_ready(jax.jit(lambda x: jax.lax.scan(body, x, None, length=8))(jnp.ones((8, 8))))
print(directory, jax.config.jax_compilation_cache_dir, len(hits))
"""


def run(**variables: str) -> tuple[list[str], str]:
    """Returns the words that a fresh process prints, and its stderr."""
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "QFLEET_CACHE_DIR")}
    result = subprocess.run(
        [sys.executable, "-c", CODE], env=kept | variables, capture_output=True, text=True, check=True
    )
    return result.stdout.split(), result.stderr


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    (used, configured, hits), stderr = run(QFLEET_CACHE_DIR=str(directory))
    assert (used, configured, hits, stderr) == (str(directory), str(directory), "0", "")
    compiled = files(directory)
    assert compiled, "even a program that compiles quickly is kept"
    (_, _, hits), stderr = run(QFLEET_CACHE_DIR=str(directory))
    assert int(hits) == len(compiled)
    assert stderr == "", "loading compiled code must not alarm anyone"
    assert files(directory) == compiled


def test_by_default_it_is_in_the_users_cache_folder(tmp_path: Path) -> None:
    (used, _, _), _ = run(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert Path(used).is_relative_to(tmp_path) and Path(used).parts[-2:] == ("qfleet", "xla")


def test_a_cache_the_user_set_in_jax_is_left_as_it_is(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    (used, configured, _), _ = run(JAX_COMPILATION_CACHE_DIR=str(theirs), QFLEET_CACHE_DIR=str(ours))
    assert used == configured == str(theirs)
    assert not ours.exists()
    assert files(theirs) == set(), "JAX's own threshold keeps quick compilations out"


def test_a_new_folder_is_the_users_alone(tmp_path: Path) -> None:
    run(QFLEET_CACHE_DIR=str(tmp_path / "above" / "cache"))
    assert stat.S_IMODE((tmp_path / "above" / "cache").stat().st_mode) == 0o700


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Makes this process have no cache yet."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_that_others_can_write_to_is_not_used(
    no_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QFLEET_CACHE_DIR", str(tmp_path))
    for mode in (0o777, 0o770, 0o702):
        tmp_path.chmod(mode)
        assert enable_compilation_cache() is None
        assert "is writable by other users" in caplog.text and "QFLEET_CACHE_DIR to a folder of your own" in caplog.text
        caplog.clear()
    tmp_path.chmod(0o700)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert enable_compilation_cache() is None
    assert f"belongs to user {owner}" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_one_warning_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (used, configured, _), stderr = run(QFLEET_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert used == configured == "None"
    assert stderr.count("\n") == 1
    assert str(tmp_path / "file" / "cache") in stderr and "set QFLEET_CACHE_DIR" in stderr


def test_a_user_without_a_home_folder_gets_the_same_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find_no_home(*_: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("QFLEET_CACHE_DIR", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", find_no_home)
    configured = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert enable_compilation_cache() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", configured)
    assert "could not determine the home directory" in caplog.text and "set QFLEET_CACHE_DIR" in caplog.text
