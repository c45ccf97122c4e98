"""`qfleet devices`: what JAX sees, and what a run would keep there."""

import json
from pathlib import Path

import jax
import pytest

from qfleet.cli.main import main


def test_devices_lists_what_jax_sees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    shown = capsys.readouterr().out
    assert main(["devices", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)
    assert sum(device["count"] for device in machine["devices"]) == jax.device_count()
    assert machine["cpu_cores"] >= 1 and "parts" not in machine
    for device in machine["devices"]:
        assert f"{device['platform']} " in shown and f" {device['count']} " in shown
    assert "more: " in shown


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_devices_shows_what_a_run_would_keep_on_each_device(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["devices", "CartPole-v1", "--preset", "rainbow_lite", "--mesh.data", "2", "--mesh.model=2"]
    assert main([*arguments, "--hidden-sizes", "160", "160", "--optimiser", "rmsprop", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = {part.pop("name"): part for part in found["parts"]}
    axes = {name: part["axis"] for name, part in parts.items()}
    learner, rest = (
        ("parameters", "target network", "optimiser state"),
        ("lanes", "replay", "priorities", "batch", "evaluation"),
    )
    assert axes == dict.fromkeys(learner, "model") | dict.fromkeys(rest, "data")
    assert found["mesh"] == {"data": 2, "model": 2} and found["topology"] == "fused" and found["refusal"] is None
    assert found["bytes_per_device"] == sum(part["bytes_per_device"] for part in parts.values())

    assert main(arguments) == 0  # the tuned network is small, so all of it but its kernels is whole on each device
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("CartPole-v1 with rainbow_lite, fused: mesh of data 2 x model 2, ")
    table = {name.strip(): row for name, row in ((line[:16], line[16:].split()) for line in lines)}
    assert table["replay"][4:] == ["data"] and table["parameters"][4:] == ["model"]
    assert table["optimiser state"][4:] == ["whole", "on", "each"]
    total, unit, share, same_unit = table["replay"][:4]
    assert unit == same_unit and float(total) == pytest.approx(2 * float(share), rel=0.02)


def test_a_run_that_does_not_fit_is_reported_by_devices_and_refused_by_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("qfleet.topologies.footprint", "qfleet.runtime.devices"):
        monkeypatch.setattr(f"{module}.available_bytes", lambda devices: 500_000)
    run = ["CartPole-v1", "--preset", "double_dqn"]
    assert main(["devices", *run]) == 1
    captured = capsys.readouterr()
    assert "replay" in captured.out and "500 kB" in captured.out
    assert main(["train", *run]) == 2
    refused = capsys.readouterr()
    assert refused.err == captured.err and refused.out == ""
    capacity = captured.err.strip().rpartition("; try replay_capacity ")[2]
    assert main(["devices", *run, "--replay-capacity", capacity]) == 0
    assert list(tmp_path.iterdir()) == []


def test_devices_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--help"]) == 0
    assert "qfleet devices [ENV]" in capsys.readouterr().out
