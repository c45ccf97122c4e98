"""Checks of the machine, on machines that are made up: each finds what is there, and its remedy fits."""

import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from qfleet.doctor import machine
from qfleet.runtime.process import cpu_quota, memory_limit_bytes

Usage = namedtuple("Usage", "total used free")
GB = 10**9


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__b__cpu.max": "max 100000\n"}, None),
        (
            {
                "proc__self__cgroup": "0::/a/b\n",
                "sys__fs__cgroup__a__b__cpu.max": "400000 100000\n",
                "sys__fs__cgroup__a__cpu.max": "150000 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc__self__cgroup": "5:cpu,cpuacct:/docker/x\n",
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "200000\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc__self__cgroup": "5:cpu:/\n",
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_the_quota_of_cores_is_the_least_of_all_control_groups(
    files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    assert cpu_quota(write(tmp_path, **files)) == expected


def test_the_memory_limit_is_the_least_of_all_control_groups(tmp_path: Path) -> None:
    root = write(tmp_path, proc__self__cgroup="0::/a/b\n", **{"sys__fs__cgroup__a__memory.max": "5000\n"})
    assert memory_limit_bytes(root) == 5000
    write(tmp_path, **{"sys__fs__cgroup__a__memory.max": "max\n"})
    assert memory_limit_bytes(root) is None


@pytest.mark.parametrize(
    ("variables", "quota", "found", "remedy"),
    [
        ({}, "", "8 CPU cores", ""),
        ({"OMP_NUM_THREADS": "4"}, "", "8 CPU cores, OMP_NUM_THREADS=4", ""),
        ({"OMP_NUM_THREADS": "99"}, "", "asks for more threads than there are cores", "set OMP_NUM_THREADS=8,"),
        ({"PJRT_NPROC": "many"}, "", "PJRT_NPROC is no number of threads", "unset PJRT_NPROC"),
        ({}, "250000 100000", "the control group allows 2.5 cores'; XLA starts a thread for each", "set PJRT_NPROC=2,"),
        ({"PJRT_NPROC": "2"}, "250000 100000", "allows 2.5 cores', PJRT_NPROC=2", ""),
    ],
)  # fmt: skip
def test_threads_are_compared_with_what_the_process_may_use(
    variables: dict[str, str], quota: str, found: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in ("OMP_NUM_THREADS", "PJRT_NPROC", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = machine.threads(write(tmp_path, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__cpu.max": quota}))
    assert found in check.found and check.remedy.startswith(remedy)
    assert check.verdict == ("warn" if remedy else "good") and bool(check.remedy) == bool(remedy)


@pytest.mark.parametrize(("available_kb", "verdict"), [(500_000, "bad"), (1_000_000, "warn"), (9_000_000, "good")])
def test_memory_that_a_small_run_would_not_fit_into_is_bad(available_kb: int, verdict: str, tmp_path: Path) -> None:
    check = machine.memory(write(tmp_path, proc__meminfo=f"MemAvailable: {available_kb} kB\n"))
    assert check.verdict == verdict and check.facts["available_bytes"] == 1024 * available_kb
    assert bool(check.remedy) == (verdict != "good") == ("a small run takes 700 MB" in check.found)


@pytest.mark.parametrize(
    ("soft", "hard", "verdict", "remedy"),
    [
        (64, 64, "bad", "let the administrator raise the hard limit"),
        (64, 2048, "bad", "`ulimit -n 2048`"),
        (256, resource.RLIM_INFINITY, "warn", "`ulimit -n 4096`"),
        (1024, 1024, "good", ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "good", ""),
    ],
)
def test_the_limit_on_open_files_is_judged_and_the_remedy_is_possible(
    soft: int, hard: int, verdict: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    check = machine.open_files()
    assert check.verdict == verdict and check.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("free", "speed", "verdict"), [(10**7, GB, "bad"), (GB, GB, "warn"), (9 * GB, 10**6, "warn"), (9 * GB, GB, "good")]
)
def test_a_disk_that_is_full_or_slow_is_said(
    free: int, speed: float, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * GB, 10 * GB - free, free))
    monkeypatch.setattr(machine, "_bytes_per_second", lambda _: speed)
    check = machine.disk()
    assert check.verdict == verdict and check.facts["folder"] == str(tmp_path)
    (tmp_path / "runs").mkdir()
    assert machine.disk().facts["folder"] == str(tmp_path / "runs")


def test_a_disk_is_written_to_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert machine.disk().facts["bytes_per_second"] > 0
    assert not list(tmp_path.iterdir())

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    check = machine.disk()
    assert check.verdict == "bad" and "(Read-only file system)" in check.found and "--run-dir" in check.remedy


def test_shared_memory_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 * 10**6, 0, 0))
    assert machine.shared_memory(tmp_path).remedy == "start the container with --shm-size=2g"
    assert "is missing" in machine.shared_memory(tmp_path / "absent").found
    monkeypatch.setattr("qfleet.topologies.fleet.shared_memory.can_share", lambda: False)
    check = machine.shared_memory(tmp_path)
    assert check.verdict == "warn" and "memfd is missing or forbidden" in check.found and not check.facts["memfd"]
