"""Names of a user's own parts in a config, and which of them a run's folder may have run."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.config import AgentConfig, ConfigError, own_parts
from qfleet.config.encoding import decode, encode
from qfleet.config.own_parts import is_own_name, parts_of_policy
from qfleet.core.heads import make_head, point_values, scalar_head
from qfleet.core.losses import squared_loss
from qfleet.presets import make_config
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.run_directory import RunDirectory
from qfleet.training.assembly import check_is_built_in

SMALL = {
    "num_envs": 4, "warmup_env_steps": 100, "env_steps": 400, "eval_period_env_steps": 400, "eval_episodes": 1,
    "hidden_sizes": (8,), "batch_size": 8, "report": False, "replay_capacity": 400, "exploration_env_steps": 200,
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "is_name"),
    [("a:b", True), ("a.b:c", True), ("a", False), (":b", False), ("a:", False), ("a b:c", False), ("1a:b", False),
     ("a:b.c", False), (None, False), (3, False), ("../a:b", False), ("a:b:c", False)],
)  # fmt: skip
def test_what_has_the_form_of_a_name(value, is_name) -> None:
    assert is_own_name(value) == is_name


def test_names_are_settings_like_others() -> None:
    settings = {"head": "a:b", "target": "a.c:d", "exploration": "e:f", "network": "g:h", "own_options": {"x": [1, 2]}}
    config = make_config("CartPole-v1", "dqn", **settings)
    assert {name: getattr(config.agent, name) for name in settings} == settings
    assert decode(json.loads(json.dumps(encode(config)))) == config
    assert own_parts.own_parts(config.agent) == {k: v for k, v in settings.items() if k != "own_options"}
    assert parts_of_policy(config.agent) == {"network": "g:h"}
    assert parts_of_policy(AgentConfig(head="a:b", target="c:d")) == {"head": "a:b"}
    assert own_parts.own_parts(AgentConfig()) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "scalr"}, "head must be one of scalar, .* or MODULE:NAME, got 'scalr'. Did you mean scalar"),
        ({"exploration": "../x:y"}, "exploration must be one of .* or MODULE:NAME"),
        ({"head": 3}, "head must be one of .* got 3"),
        ({"network": "mlp"}, "network must be MODULE:NAME of a function, or None, got mlp"),
        ({"target": "double"}, "target must be MODULE:NAME of a function, or None, got double"),
        ({"target": "a:b", "double": True}, "double must be left out with target a:b, which takes its place"),
        ({"target": "a:b", "munchausen": True}, "munchausen must be left out with target a:b"),
        ({"own_options": {"x": 1}}, "own_options must be left out without a part of your own"),
    ],
)
def test_a_name_that_can_not_be_one_and_settings_without_effect_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("CartPole-v1", "dqn", **settings)


def test_a_target_needs_a_replay() -> None:
    with pytest.raises(ConfigError, match="target must be left out with replay none"):
        make_config("CartPole-v1", "pqn", target="a:b")


@pytest.mark.parametrize("setting", [{"target": "a:b"}, {"normalise_observations": True}, {"normalise_rewards": True}])
def test_what_a_memory_does_not_take_yet_is_refused(setting) -> None:
    for other in ({"memory": "lstm"}, {"value_rescaling": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be left out with {next(iter(other))}"):
            make_config("CartPole-v1", "dqn", **setting, **other)


def test_several_processes_refuse_what_is_in_the_script() -> None:
    config = make_config("CartPole-v1", "dqn", "gossip", head="__main__:mine")
    with pytest.raises(ConfigError, match="must import its head in each of them, got __main__:mine"):
        check_is_built_in(config, None, None)
    check_is_built_in(make_config("CartPole-v1", "dqn", head="__main__:mine"), None, None)


def test_one_network_is_enough() -> None:
    config = make_config("CartPole-v1", "dqn", network="a:b")
    with pytest.raises(ConfigError, match="must have one network, got one as an argument beside network a:b"):
        check_is_built_in(config, qfleet.Network(lambda key: (), lambda params, obs: obs), None)


def test_a_part_that_can_not_be_used_is_told_before_a_folder_is_made(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half_parts.py").write_text("import no_such_module\n")
    (tmp_path / "parts_that_exit.py").write_text(
        "import sys\n\ndef at_once(*arguments): sys.exit(0)\n\n"
        "def later(*arguments): return lambda *more: sys.exit(0)\n"
    )
    for head, message in (
        ("no_parts:head", "No module named 'no_parts'.*start in the folder of no_parts.py"),
        ("half_parts:head", "No module named 'no_such_module'"),
        ("small_parts:head_that_is_not_finite", "must return finite numbers"),
        ("parts_that_exit:at_once", "which raised SystemExit"),
    ):
        with pytest.raises(ConfigError, match=message):
            qfleet.train(make_config("CartPole-v1", "dqn", head=head, run_dir=tmp_path / "run", **SMALL))
        assert (
            main(["train", "CartPole-v1", "--preset", "dqn", "--head", head, "--run-dir", str(tmp_path / "run")]) == 2
        )
        assert capsys.readouterr().err.count("\n") == 1
    for setting, name in (("network", "at_once"), ("exploration", "at_once"), ("exploration", "later")):
        with pytest.raises(ConfigError, match="SystemExit"):
            part = {setting: f"parts_that_exit:{name}"}
            qfleet.train(make_config("CartPole-v1", "dqn", run_dir=tmp_path / "run", **part, **SMALL))
    assert not (tmp_path / "run").exists()


PARTS = """
import small_parts
network, head, target, explorer = (
    small_parts.network, small_parts.scalar, small_parts.double_target, small_parts.explorer)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose agent is the user's own in each part, beside their module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "trusted_parts.py").write_text(PARTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = {"network": "network", "head": "head", "target": "target", "exploration": "explorer"}
        settings = {setting: f"trusted_parts:{name}" for setting, name in names.items()}
        summary = qfleet.train(make_config("CartPole-v1", "dqn", run_dir=folder / "run", **settings, **SMALL))
        assert summary["own_parts"] == settings
    return folder / "run"


@pytest.fixture
def elsewhere(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without the user's module, in a process that has forgotten it. Returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "trusted_parts", raising=False)
    monkeypatch.setattr(own_parts, "_used", set())
    return run


def test_a_run_of_own_parts_is_the_run_of_the_parts_that_they_copy(run: Path, tmp_path: Path) -> None:
    qfleet.train(make_config("CartPole-v1", "dqn", double=True, run_dir=tmp_path / "usual", **SMALL))
    usual, same = qfleet.load(tmp_path / "usual"), qfleet.load(run)
    jax.tree.map(np.testing.assert_array_equal, usual.params, same.params)
    directory = RunDirectory.open(run)
    with Checkpoints(directory.checkpoints_path, run_id=directory.run_id) as checkpoints:
        assert checkpoints.read_metadata()["own_parts"]["network"] == "trusted_parts:network"


def test_code_that_only_a_folder_names_must_be_trusted(elsewhere: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "trusted_parts.py").write_text("raise AssertionError('it was imported')")
    for command in (["eval", str(elsewhere)], ["resume", str(elsewhere), "--env-steps", "500"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "trusted_parts" in error and "give --trust" in error and error.count("\n") == 1
    sys.modules["trusted_parts"] = sys  # imported already, which would do for an environment
    with pytest.raises(ConfigError, match="names network trusted_parts:network, of module trusted_parts"):
        qfleet.load(elsewhere)
    del sys.modules["trusted_parts"]
    (tmp_path / "trusted_parts.py").write_text(PARTS)
    assert qfleet.load(elsewhere, trust=True)(np.zeros(4, np.float32)) in (0, 1)
    assert qfleet.load(elsewhere).q_values(np.zeros((3, 4))).shape == (3, 2)  # told already


def test_nothing_in_a_runs_folder_is_run_even_if_trusted(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "trusted_parts.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ConfigError, match="nothing in a run's folder is ever imported"):
        qfleet.load(elsewhere, trust=True)
    (elsewhere / "trusted_parts.py").unlink()


def test_a_checkpoint_of_other_parts_is_refused(run: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    changed = json.loads(json.dumps(content).replace("trusted_parts:target", "trusted_parts:other"))
    (run / "config.json").write_text(json.dumps(changed))
    try:
        with pytest.raises(ConfigError, match="must be what this run saves, got own_parts"):
            qfleet.load(run)
    finally:
        (run / "config.json").write_text(json.dumps(content))


def mine(config):
    return scalar_head(squared_loss)


def test_a_function_of_this_program_can_be_named_too() -> None:
    """As in a script or notebook, whose functions are in `__main__`."""
    error = np.array([-3.0, 2.0], np.float32)
    head = make_head(AgentConfig(head=f"{__name__}:mine"))
    found = head.loss(np.zeros((2, 2), np.float32), np.array([0, 1]), point_values(jnp.asarray(error)))
    np.testing.assert_array_equal(found.loss, 0.5 * error**2)
