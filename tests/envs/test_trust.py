"""Which code a run may import: what the user names, from the current folder last; what only a folder names, never."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.config import ConfigError
from qfleet.config.python_path import (
    forget_safe_start,
    leave_module_folder,
    module_folder_searched,
    module_folder_variables,
    starts_safely,
)
from qfleet.envs.names import check_trusted, import_module_of, module_in
from qfleet.runtime.run_directory import RunDirectory

REGISTER = """
import qfleet.envs.registry as registry, qfleet.envs.cartpole as cartpole
registry.register_env("Trusted", cartpole.make)
"""


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("CartPole-v1", ""),
        ("gym:CartPole-v1", ""),
        ("ale:Pong", ""),
        ("gymnax:evil:Name", ""),
        ("evil:Name", "evil"),
        ("gym:evil:Name", "evil"),
        ("gym:gym:Name", "gym"),
        ("a.b:Name", "a.b"),
        (":Name", ""),
    ],
)
def test_the_module_in_a_name(name: str, module: str) -> None:
    assert module_in(name) == module


def test_the_current_folder_is_searched_last_and_only_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "trusted_helper.py").write_text("")
    (tmp_path / "trusted_mazes.py").write_text("import trusted_helper, wave, sys\npath = list(sys.path)\n")
    (tmp_path / "wave.py").write_text("raise AssertionError('in place of the standard library')")
    sys.modules.pop("wave", None)
    before = list(sys.path)
    import_module_of("trusted_mazes:Maze")
    assert sys.modules.pop("trusted_mazes").path == [*before, str(tmp_path)]
    assert sys.path == before


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "1 / 0", "import no_such_module"])
def test_a_module_that_ends_the_process_or_fails_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ending_mazes.py").write_text(ending)
    with pytest.raises(ConfigError, match="got 'ending_mazes'"):
        import_module_of("ending_mazes:Maze")
    assert str(tmp_path) not in sys.path


def test_processes_elsewhere_know_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in module_folder_variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    with module_folder_searched():
        assert sys.path[-1] == str(tmp_path)
        leave_module_folder()  # what a worker does, which has taken over the path
    assert str(tmp_path) not in sys.path


def test_python_processes_start_without_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with starts_safely():
        assert os.environ["PYTHONSAFEPATH"]
        forget_safe_start()
        assert "PYTHONSAFEPATH" not in os.environ
        os.environ["PYTHONSAFEPATH"] = "qfleet"
    assert "PYTHONSAFEPATH" not in os.environ
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # the user's own choice stays
    with starts_safely():
        forget_safe_start()
    assert os.environ["PYTHONSAFEPATH"] == "1"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose environment is in a module, which this process forgets afterwards."""
    (tmp_path / "trusted_envs.py").write_text(REGISTER)
    monkeypatch.chdir(tmp_path)
    config = qfleet.make_config("trusted_envs:Trusted", preset="pqn", env_steps=64)
    path = RunDirectory.create(tmp_path / "run", config).path
    monkeypatch.delitem(sys.modules, "trusted_envs")
    return path


def test_a_module_that_only_a_folder_names_must_be_trusted(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "trusted_envs.py").write_text("raise AssertionError('it was imported')")
    for command in (["eval", str(run)], ["resume", str(run)], ["watch", str(run)]):
        if command[0] == "watch":
            pytest.importorskip("av")
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "trusted_envs" in error and "give --trust" in error and error.count("\n") == 1
    (run.parent / "trusted_envs.py").write_text(REGISTER)
    with pytest.raises(ConfigError, match="which holds none; train first"):  # so it gets as far as the checkpoint
        qfleet.load(run, trust=True)
    import_module_of("trusted_envs:Trusted")
    with pytest.raises(ConfigError, match="which holds none; train first"):
        qfleet.load(run)  # imported already
    monkeypatch.delitem(sys.modules, "trusted_envs")


def test_nothing_in_a_runs_folder_is_imported_even_if_trusted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "videos").mkdir()
    for folder in (run, run / "videos"):
        (folder / "trusted_envs.py").write_text("raise AssertionError('it was imported')")
        monkeypatch.chdir(folder)
        with pytest.raises(ConfigError, match=r"nothing in a run's folder is ever imported.*change to the folder"):
            qfleet.load(run, trust=True)
    monkeypatch.chdir(run.parent)
    check_trusted("trusted_envs:Trusted", run, trust=True)
    check_trusted("CartPole-v1", run, trust=False)


def test_a_policy_acts_without_the_module_that_only_its_folder_names(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"num_envs": 4, "rollout_length": 8, "num_minibatches": 1, "hidden_sizes": (8,), "eval_episodes": 1}
    config = qfleet.make_config(
        "trusted_envs:Trusted",
        "pqn",
        env_steps=64,
        eval_period_env_steps=64,
        run_dir=str(tmp_path / "trained"),
        **small,
    )
    qfleet.train(config)
    monkeypatch.delitem(sys.modules, "trusted_envs")
    (tmp_path / "trusted_envs.py").write_text("raise AssertionError('it was imported')")
    policy = qfleet.load(tmp_path / "trained")
    assert policy(np.zeros(4, np.float32)) in (0, 1) and policy.q_values(np.zeros((3, 4))).shape == (3, 2)
    with pytest.raises(ConfigError, match="of module trusted_envs; .* give --trust"):
        policy.evaluate(1)
    (tmp_path / "trusted_envs.py").write_text(REGISTER)
    assert qfleet.load(tmp_path / "trained", trust=True).evaluate(2).shape == (2,)
    monkeypatch.delitem(sys.modules, "trusted_envs")


@pytest.mark.parametrize("start", [["-m", "qfleet"], [str(Path(sys.executable).with_name("qfleet"))]])
def test_files_in_the_current_folder_take_no_modules_place(tmp_path: Path, start: list[str]) -> None:
    """Tries names that the standard library has, those of packages, and those that libraries import if they can."""
    for name in ("random", "queue", "typing", "zstandard", "jax", "etils", "socket", "multiprocessing", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file in the current folder was run')")
    command = [sys.executable, *start, "train", "FrozenLake-v1", "--num-env-workers", "1", "--num-envs", "2"]
    command += ["--env-steps", "64", "--eval-episodes", "1", "--num-minibatches", "1", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
