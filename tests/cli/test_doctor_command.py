"""`qfleet doctor`: all checks, each in a process of its own that can neither hang nor crash the others."""

import functools
import json
import sys

import pytest

from qfleet.cli.main import main
from qfleet.doctor import children
from qfleet.doctor.all_checks import CHECKS
from qfleet.doctor.check import VERDICTS, Check
from qfleet.doctor.children import examine


def test_doctor_says_a_verdict_on_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patient = functools.partial(examine, limit_seconds=300)  # however busy the machine is
    monkeypatch.setattr("qfleet.cli.doctor_command.examine", patient)
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in found["checks"]}
    assert list(checks) == list(CHECKS)
    assert code == (found["verdict"] == "bad")
    assert all(check["verdict"] in VERDICTS and check["found"] for check in checks.values())
    assert all(check["remedy"] for check in checks.values() if check["verdict"] != "good")
    assert checks["devices"]["facts"]["devices"][0]["platform"] == "cpu"
    assert "ended" not in str(checks) and "no answer" not in str(checks)


def test_a_check_that_hangs_or_crashes_is_bad_and_the_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {
        "hangs": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
        "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "raises": "raise RuntimeError('what nobody thought of')",
        "babbles": "print('[]')",
        "answers": """print('{"name": "answers", "verdict": "good", "found": "it"}')""",
    }
    monkeypatch.setattr(children, "_command", lambda name: [sys.executable, "-c", codes[name]])
    checks = {check.name: check for check in examine(list(codes), limit_seconds=5)}
    assert list(checks) == list(codes)
    assert checks["answers"] == Check("answers", "good", "it")
    assert checks["hangs"].found == "gave no answer within 5 s"
    assert checks["crashes"].found.startswith("was ended by SIGSEGV")
    assert checks["raises"].found == "ended with exit code 1: RuntimeError: what nobody thought of"
    assert checks["babbles"].verdict == "bad"


def test_a_table_shows_all_checks_and_the_exit_code_tells_of_bad_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("disk", "good", "roomy"), Check("memory", "warn", "little " * 30, "end other programs")]
    monkeypatch.setattr("qfleet.cli.doctor_command.examine", lambda: checks)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "-> end other programs" in shown and "1 to look at, but runs work" in shown
    assert max(map(len, shown.splitlines())) <= 80
    checks.append(Check("devices", "bad", "none"))
    assert main(["doctor"]) == 1
    assert "1 bad: a run that needs it would fail" in capsys.readouterr().out
    del checks[1:]
    assert main(["doctor"]) == 0
    assert "this machine is ready for runs" in capsys.readouterr().out
