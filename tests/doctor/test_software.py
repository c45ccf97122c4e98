"""Checks of what is installed."""

import importlib.metadata
import os
import socket
import subprocess
from pathlib import Path

import pytest

from qfleet.doctor import cluster, software

VERSION = importlib.metadata.version
"""The true function, for tests that replace it."""


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Makes packages seem to be installed in other versions, or, with None, not to be installed."""

    def version(package: str) -> str:
        name = package.lower().replace("-", "_")
        if versions.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions.get(name) or VERSION(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_packages_are_compared_with_what_qfleet_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.packages().verdict == "good"
    pretend(monkeypatch, flax="0.9.0", optax=None)
    check = software.packages()
    assert check.verdict == "bad" and "not as needed: flax 0.9.0, optax is missing" in check.found
    assert check.remedy.startswith("pip install 'flax<0.13,>=0.12' 'optax")
    pretend(monkeypatch, qfleet=None)
    assert software.packages().remedy == "pip install -e . in that tree"


def test_extras_are_installed_or_not_or_in_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ale_py=None, av="1.0", pillow="13.0")
    check = software.extras()
    assert "atari" in check.facts["not_installed"] and check.facts["outdated"] == ["video"]
    assert check.verdict == "warn" and check.remedy == "pip install 'qfleet[video]'"
    pretend(monkeypatch, ale_py=None)
    check = software.extras()
    assert check.verdict == "good" and check.remedy.startswith("to add one: pip install 'qfleet[")
    everything = {*check.facts["installed"], *check.facts["not_installed"]}
    assert {"atari", "cuda", "ray", "video", "wandb"} <= everything and not {"dev", "docs"} & everything


def test_an_extra_of_another_package_counts_by_what_it_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("Box2D")
    assert "box2d" in software.extras().facts["installed"]
    pretend(monkeypatch, box2d=None, box2d_py=None)
    assert "box2d" in software.extras().facts["not_installed"]


def test_devices_are_those_of_jax_and_a_gpu_that_it_does_not_use_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "nvidia0").touch()
    check = software.devices(tmp_path)
    assert check.verdict == "good" and check.found.endswith("as JAX_PLATFORMS=cpu says")
    monkeypatch.setattr(
        "qfleet.runtime.devices.describe_devices",
        lambda: [{"platform": "cpu", "kind": "cpu", "count": 1, "memory_bytes": None}],
    )
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check = software.devices(tmp_path)
    assert check.verdict == "warn" and check.remedy.startswith("pip install 'qfleet[cuda]'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert software.devices(tmp_path).verdict == "good"
    assert software.devices(tmp_path / "none").verdict == "good"


def test_the_compile_cache_is_measured_and_one_that_others_write_to_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("QFLEET_CACHE_DIR", str(folder))
    assert software.cache().found == f"0 B in 0 files of {folder}"
    (folder / "program").write_bytes(bytes(3_000))
    assert software.cache().facts == {"folder": str(folder), "bytes": 3_000, "files": 1}
    folder.chmod(0o777)
    check = software.cache()
    assert check.verdict == "warn" and "is writable by other users" in check.found and "mode 0700" in check.remedy


def test_a_video_is_written_or_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    check = software.video()
    assert check.verdict == "good" and check.found.startswith("mp4 and GIF can be written")
    pretend(monkeypatch, av=None)
    check = software.video()
    assert (check.verdict, check.remedy) == ("good", "pip install 'qfleet[video]'")


@pytest.fixture
def ray_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cluster is known here, and there is no token; returns where Ray notes its cluster."""
    pytest.importorskip("ray")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_a_cluster_is_reached_or_not(ray_alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = cluster.cluster()
    assert check.verdict == "good" and "no cluster is named" in check.found
    answer = subprocess.CompletedProcess((), 0, "", "")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        refused = cluster.cluster()  # the port is taken, so that nobody answers there meanwhile
        listening.listen()
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
        assert f"a cluster answers at {address} (RAY_ADDRESS)" in cluster.cluster().found
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        ray_alone.write_text(address)
        assert cluster.cluster().facts["answers"] is True
        answer = subprocess.CompletedProcess((), 1, "", "Traceback\nRpcError: InvalidAuthToken: wrong. See elsewhere.")
        check = cluster.cluster()
        assert check.verdict == "good" and "names (RpcError: InvalidAuthToken: wrong)" in check.found
    assert refused.verdict == "warn" and refused.remedy.startswith("start it with `ray start --head`")
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere")
    assert "must be HOST:PORT, got ray://somewhere" in cluster.cluster().found


def test_a_token_is_named_but_never_shown(ray_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert cluster.cluster().remedy == "`ray get-auth-token --generate > /dev/null`"
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert "which is no file" in cluster.cluster().found
    file.write_text("secret-of-file")
    file.chmod(0o600)
    assert f"RAY_AUTH_MODE=token, token from {file}" in cluster.cluster().found
    file.chmod(0o644)
    is_open = all(folder.stat().st_mode & 0o011 for folder in file.parents)
    assert cluster.cluster().remedy == (f"chmod 600 {file}" if is_open else "")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-of-variable")
    check = cluster.cluster()
    assert "token from RAY_AUTH_TOKEN" in check.found and "secret" not in repr(check)
    assert os.environ["RAY_AUTH_TOKEN"] == "secret-of-variable"


def test_ray_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = cluster.cluster()
    assert (check.verdict, check.remedy) == ("good", "pip install 'qfleet[ray]'") and "actor-learner" in check.found
