"""`qfleet sweep`: mistakes are told before anything starts."""

import pytest

from qfleet.cli.main import main

GOOD = ["CartPole-v1", "--param", "learning_rate=1e-4..1e-2:log"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["CartPole-v1"], "must vary at least one setting"),
        (["CartPole-v1", "--param", "learning_rate"], "--param must be NAME=LOW..HIGH"),
        (["CartPole-v1", "--param=learning_rat=1,2"], "Did you mean learning_rate"),
        ([*GOOD, "--param", "learning-rate=1,2"], "got learning_rate twice"),
        ([*GOOD, "--learning-rate", "1e-3"], "both --param learning_rate=... and --learning-rate; leave one"),
        (["CartPole-v1", "--param", "double=yes,no", "--no-double"], "both --param double=... and --double"),
        ([*GOOD, "--seeds", "2", "--num-seeds", "3"], "give one of the two"),
        ([*GOOD, "--stop-return", "475"], "stop_return must be left out"),
        ([*GOOD, "--print-config"], "--print-config is a flag of `qfleet train`"),
        (["--resume", "runs/none"], "a sweep is a folder with a sweep.json"),
        (["--resume", "runs/none", "--env-steps", "5"], "takes only --trials, --trials-at-once, --trials-on-ray, "),
        ([*GOOD, "--trials-on-ray", "there"], "trials_on_ray must be auto, local or HOST:PORT, got there"),
        ([*GOOD, "--trial-resources", "CPU", "2", "GPU", "0.5", "--quiet"], "must come with trials_on_ray, got {'CPU'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qfleet: error: ") and words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_help_says_how_settings_vary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "NAME=LOW..HIGH" in capsys.readouterr().out
