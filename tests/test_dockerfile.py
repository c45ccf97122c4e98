"""The Dockerfile, as far as it can be read without an engine that builds it."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def is_sent(path: str) -> bool:
    """Returns whether `.dockerignore` lets a path of this repository through; the last pattern that fits decides."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            name = pattern.removeprefix("!")
            fits = any(fnmatch.fnmatch(part, name) for part in (path, *map(str, Path(path).parents)))
            sent = pattern.startswith("!") if fits else sent
    return sent


def test_all_that_is_copied_exists_and_is_sent_to_the_engine_and_nothing_else() -> None:
    copied = [name for line in LINES if line.startswith("COPY") and "--from" not in line for name in line.split()[1:-1]]
    assert "src" in copied and all((ROOT / name).exists() and is_sent(name) for name in copied)
    assert is_sent("src/qfleet/api.py")
    assert not any(
        map(is_sent, (".git/config", "runs/mine/config.json", "tests", "docs/cluster.md", ".venv/bin/python"))
    )


def test_the_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (default,) = (line.partition("=")[2] for line in LINES if line.startswith("ARG EXTRAS="))
    others = re.findall(r"--build-arg EXTRAS=(\S+)", (ROOT / "Dockerfile").read_text())
    named = {name for names in (default, *others) for name in names.split(",")}
    assert "cuda" in named and named <= set(project["optional-dependencies"])
    minor = re.findall(r"ARG PYTHON=(\S+)", TEXT)[0]
    assert any(line.endswith(f":: {minor}") for line in project["classifiers"])


def test_the_image_runs_as_a_user_without_rights_and_keeps_only_what_was_installed() -> None:
    final = LINES[max(i for i, line in enumerate(LINES) if line.startswith("FROM")) :]
    users = [line.split()[1] for line in final if line.startswith("USER")]
    assert users == ["1000"], "Kubernetes can tell only from a number that it isn't root"
    assert [line for line in final if line.startswith("COPY --from")] == ["COPY --from=build /opt/qfleet /opt/qfleet"]
    assert not any("pip " in line or "gcc" in line for line in final)


def test_kuberay_is_told_the_ray_of_the_image() -> None:
    yaml = pytest.importorskip("yaml")
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    _, job = yaml.safe_load_all((ROOT / "examples" / "cluster" / "kuberay.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned
