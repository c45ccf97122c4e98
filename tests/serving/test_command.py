"""`qfleet serve`: a process that answers, loads its policy anew at SIGHUP, and ends in order."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from other_processes import wait_until

import qfleet
from qfleet.cli.main import main
from qfleet.cli.serve_command import TOKEN_VARIABLE, given_token
from qfleet.config import ConfigError

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


def test_a_run_is_served_until_sigterm_and_anew_after_sighup(tmp_path: Path) -> None:
    run = tmp_path / "run"
    qfleet.train(
        qfleet.make_config(
            "CartPole-v1", "pqn", env_steps=1_024, hidden_sizes=(8,), eval_episodes=2, report=False, run_dir=str(run)
        )
    )
    command = [sys.executable, "-m", "qfleet", "serve", str(run), "--port", "0", "--max-batch", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            wait_until(lambda: hears_sighup(process.pid))
            process.send_signal(signal.SIGHUP)  # while it still loads the policy
            line = process.stdout.readline()
            url = re.findall(r"http://127.0.0.1:\d+/", line)[0]

            def ask(path: str, body: bytes | None = None) -> str:
                request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=60) as response:
                    return str(response.read().decode())

            obs = [0.0, 0.1, 0.2, 0.3]
            assert json.loads(ask("act", json.dumps({"observations": [obs]}).encode()))["actions"] == [
                qfleet.load(str(run))(obs)
            ]
            wait_until(lambda: 'qfleet_reloads_total{result="done"} 1.0' in ask("metrics"))
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: 'qfleet_reloads_total{result="done"} 2.0' in ask("metrics"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def hears_sighup(pid: int) -> bool:
    """Whether a process has a function for SIGHUP, which would end it otherwise."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGHUP - 1) & 1)


def test_the_dashboard_ends_in_order_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qfleet", "dashboard", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.findall(r"http://127.0.0.1:\d+/", process.stdout.readline())[0]
            assert urllib.request.urlopen(url, timeout=60).status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_bad_flags_are_refused_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert main(["serve", str(tmp_path / "run"), "--max-batch", "100", "--max-waiting", "10"]) == 2
    assert "max_waiting must be" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "run"), "--max-delay-ms", "-1"]) == 2
    assert "max_delay_ms must be a number from 0 to" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "run"), "--port", "70000"]) == 2
    assert "port must be" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "token"), [(None, None), ("", None), (" \n", None), ("secret\n", "secret")])
def test_the_users_token_is_taken_without_white_space(
    given: str | None, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, given)
    assert given_token() == token


@pytest.mark.parametrize("given", ["two words", "müll", "a\x7fb"])
def test_a_token_that_no_header_can_bear_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, given)
    with pytest.raises(ConfigError, match="QFLEET_SERVE_TOKEN must be printable ASCII without spaces") as raised:
        given_token()
    assert given not in str(raised.value)
