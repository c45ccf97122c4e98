"""The public API: which files a run leaves, and that stopping, resuming and loading change nothing."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes
import pytest

import qfleet
from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.config.encoding import SCHEMA_VERSION
from qfleet.runtime.evaluation import Episodes
from qfleet.topologies.fused.topology import Fused

SUMMARY_FIELDS = {
    "env", "backend", "preset", "topology", "seed", "stopped", "env_steps", "learner_steps", "wall_seconds",
    "compile_seconds", "env_steps_per_second", "learner_steps_per_second", "eval_return_mean", "eval_returns",
    "eval_num_different", "eval_num_cut", "eval_episode_limit", "eval_at_env_steps", "eval_exploration",
    "confirmed_by_new_episodes", "peak_rss_bytes", "version",
}  # fmt: skip

qfleet.register_env("Corner-v0", probes.observation_action_reward)
qfleet.register_env("NaN-v0", lambda: probes.nan_reward(at_step=100))


qfleet.register_env("Endless-v0", lambda: probes.nan_reward(at_step=10**6))


class FailingLanes:
    """Lanes whose environments have failed too often by the tenth row."""

    def __init__(self, num_lanes: int) -> None:
        self._num_lanes, self._rows = num_lanes, 0

    def reset(self, seed: int) -> np.ndarray:
        return np.zeros((self._num_lanes, 1), np.float32)

    def send(self, action: np.ndarray) -> None:
        self._rows += 1

    def recv(self) -> qfleet.HostStep:
        if self._rows > 40:
            raise RunFailed("environments may fail at most", learner_is_sound=True)
        nobody = np.zeros(self._num_lanes, bool)
        return qfleet.HostStep(self.reset(0), np.ones(self._num_lanes, np.float32), nobody, nobody, nobody)

    def close(self) -> None:
        pass


def failing() -> qfleet.HostEnv:
    spec = qfleet.EnvSpec(
        name="failing", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2, time_limit=20
    )
    return qfleet.HostEnv(spec, lambda n, options: FailingLanes(n), lambda n, options: FailingLanes(n))


qfleet.register_env("Failing-v0", failing)


def tiny(run_dir: Path, preset: str = "pqn", env: str = "Corner-v0", **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "num_envs": 4,
        "hidden_sizes": (8,),
        "env_steps": 256,
        "eval_period_env_steps": 128,
        "eval_episodes": 5,
        "run_dir": str(run_dir),
    }
    if preset != "pqn":
        defaults |= {"batch_size": 8, "replay_capacity": 256, "warmup_env_steps": 32}
    return qfleet.make_config(env, preset, **defaults | settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `tiny`. Tests leave it as it is."""
    path = tmp_path_factory.mktemp("trained") / "run"
    qfleet.train(tiny(path))
    return path


@pytest.fixture
def own_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the folder, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def assert_same(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal())


def follow(run: qfleet.Run) -> dict[str, Any]:
    for _ in run:
        pass
    return run.summary


def test_a_run_leaves_its_configuration_metrics_checkpoint_and_summary(tmp_path: Path) -> None:
    summary = qfleet.train(tiny(tmp_path / "run", seed=3))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert set(summary) >= SUMMARY_FIELDS
    assert summary["backend"] == "registered"
    assert (summary["env"], summary["preset"], summary["topology"], summary["seed"]) == ("Corner-v0", "pqn", "fused", 3)
    assert (summary["stopped"], summary["env_steps"], summary["learner_steps"]) == ("env steps", 256, 8)
    assert summary["wall_seconds"] > summary["compile_seconds"] > 0
    assert summary["env_steps_per_second"] > 0 and summary["learner_steps_per_second"] > 0
    assert np.shape(summary["eval_returns"]) == (1, 5)
    assert summary["eval_return_mean"] == pytest.approx(np.mean(summary["eval_returns"]))
    assert summary["peak_rss_bytes"] > 50e6
    assert checkpoints(tmp_path / "run") == [256]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["env_steps"] == 256


@pytest.mark.parametrize("preset", ["pqn", "rainbow_lite"])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, preset: str) -> None:
    # The preset's importance weights change until the end of a run, and these two runs end at different steps.
    schedule = {"importance_exponent_env_steps": 512} if preset == "rainbow_lite" else {}
    whole = qfleet.train(tiny(tmp_path / "whole", preset, env_steps=512, **schedule))
    half = qfleet.train(tiny(tmp_path / "half", preset, env_steps=256, **schedule))
    assert half["env_steps"] == 256
    resumed = follow(qfleet.resume(tmp_path / "half", env_steps=512))
    assert resumed["learner_steps"] == whole["learner_steps"] > half["learner_steps"] > 0
    assert resumed["eval_returns"] == whole["eval_returns"]
    assert_same(qfleet.load(tmp_path / "half").params, qfleet.load(tmp_path / "whole").params)
    before, after = (qfleet.load(tmp_path / "half", checkpoint=steps).params for steps in (256, 512))
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_leaving_the_loop_stops_the_run_cleanly_and_it_can_go_on(tmp_path: Path, trained: Path) -> None:
    run = qfleet.iterate(tiny(tmp_path / "run"))
    for progress in run:
        assert progress.env_steps == 64  # one iteration, because it isn't known yet how long an iteration takes
        break
    assert (run.summary["stopped"], run.summary["env_steps"]) == ("interrupted", 64)
    assert checkpoints(tmp_path / "run") == [64]
    assert follow(qfleet.resume(tmp_path / "run"))["stopped"] == "env steps"
    assert_same(qfleet.load(tmp_path / "run").params, qfleet.load(trained).params)


def test_leaving_the_loop_at_its_last_record_is_no_interruption(tmp_path: Path) -> None:
    run = qfleet.iterate(tiny(tmp_path / "run"))
    for progress in run:
        if progress.env_steps == 256:
            break
    assert run.summary["stopped"] == "env steps"


def test_a_run_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    run = qfleet.iterate(tiny(tmp_path / "run"))
    del run  # never iterated over, as if killed while it compiled
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert follow(qfleet.resume(tmp_path / "run"))["env_steps"] == 256


def test_an_older_checkpoint_can_be_resumed_and_newer_ones_are_set_aside(tmp_path: Path) -> None:
    # There is a record for each iteration. Otherwise their number would depend on how long an iteration takes.
    config = tiny(tmp_path / "run", checkpoint_period_seconds=1e-9, eval_period_env_steps=64)
    qfleet.train(config)
    assert checkpoints(tmp_path / "run") == [128, 192, 256]
    finished = qfleet.load(tmp_path / "run").params
    run = qfleet.resume(tmp_path / "run", checkpoint=128)
    assert checkpoints(tmp_path / "run") == [128]
    follow(run)
    assert_same(qfleet.load(tmp_path / "run").params, finished)


def test_a_run_at_its_end_is_not_resumed(trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="env_steps=256.*larger --env-steps"):
        qfleet.resume(trained)
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_mistake_in_resuming_is_found_before_anything_is_compiled(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fused, "start", lambda _: pytest.fail("compiled"))
    with pytest.raises(ConfigError, match="larger --env-steps"):
        qfleet.resume(trained)
    own = qfleet.Network(lambda key: {}, lambda params, obs: obs @ jnp.ones((1, 2)))
    with pytest.raises(ConfigError, match="`network`"):
        qfleet.resume(trained, env_steps=512, network=own)


def test_two_processes_can_not_train_one_run(tmp_path: Path) -> None:
    run = qfleet.iterate(tiny(tmp_path / "run"))
    with pytest.raises(ConfigError, match="one process at a time"):
        qfleet.resume(tmp_path / "run")
    follow(run)
    follow(qfleet.resume(tmp_path / "run", env_steps=512))


def test_a_run_is_iterated_over_once(tmp_path: Path) -> None:
    run = qfleet.iterate(tiny(tmp_path / "run"))
    follow(run)
    with pytest.raises(ConfigError, match=r"once.*qfleet\.resume"):
        iter(run)
    assert checkpoints(tmp_path / "run") == [256]


def test_a_folder_that_is_taken_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(Fused, "start", lambda self: pytest.fail("compiled"))
    with pytest.raises(ConfigError, match="absent or empty"):
        qfleet.iterate(tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("first", "confirming", "stopped"),
    [(475.0, 475.0, "return reached"), (475.0, 474.0, "env steps"), (474.0, 500.0, "env steps")],
)
def test_a_run_stops_only_when_fresh_episodes_confirm_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, confirming: float, stopped: str
) -> None:
    asked = []

    def evaluate(self: Fused, num_episodes: int, batch: int = 0, **more: Any) -> Episodes:
        asked.append((num_episodes, batch))
        returns = np.full((1, num_episodes), confirming if batch else first)
        return Episodes(returns, np.ones((1, num_episodes), int), returns.astype(int), returns < 0)

    monkeypatch.setattr(Fused, "evaluate", evaluate)
    summary = qfleet.train(tiny(tmp_path / "run", stop_return=475, eval_episodes=20))
    assert summary["stopped"] == stopped
    assert asked[0] == (20, 0)
    assert ((100, 1) in asked) == (first >= 475)
    assert summary["env_steps"] == (128 if stopped == "return reached" else 256)
    assert summary["solved_at_env_steps"] == [128 if stopped == "return reached" else None]


def test_a_deterministic_game_is_one_episode_unless_evaluations_explore(tmp_path: Path) -> None:
    """Two episodes begin `Corner-v0`, and each has two ends: the greedy one, and the one after the other action."""
    strict = qfleet.train(tiny(tmp_path / "strict", eval_episodes=40))
    loose = qfleet.train(tiny(tmp_path / "loose", eval_episodes=40, eval_exploration=0.5))
    assert (strict["eval_num_different"], strict["eval_num_cut"], strict["eval_exploration"]) == (2, 0, 0.0)
    assert (loose["eval_num_different"], loose["eval_exploration"]) == (4, 0.5)
    lines = [json.loads(line) for line in (tmp_path / "loose" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_num_different"] for line in lines if line["eval_return_mean"] is not None] == [4, 4]
    policy = qfleet.load(tmp_path / "loose")  # it is evaluated as the run was
    assert policy.play_episodes(40).num_different() == 4
    assert_same(policy.play_episodes(40).returns, policy.evaluate(40))
    assert_same(qfleet.load(tmp_path / "strict").params, policy.params)  # exploring in evaluations changes nothing else


def test_a_stopped_run_keeps_the_evaluation_that_it_had(own_copy: Path) -> None:
    first = json.loads((own_copy / "summary.json").read_text())
    run = qfleet.resume(own_copy, env_steps=10**6)
    for _ in run:
        break
    assert run.summary["stopped"] == "interrupted" and run.summary["env_steps"] > 256
    for name in (name for name in SUMMARY_FIELDS if name.startswith("eval_")):
        assert run.summary[name] == first[name], name
    assert run.summary["eval_at_env_steps"] == 256


def test_a_policy_that_goes_round_in_circles_is_cut_and_that_is_said(tmp_path: Path) -> None:
    """With a learning rate of practically 0, a greedy policy takes one action for ever, and never ends an episode."""
    settings: dict[str, Any] = {"env_steps": 128, "eval_episodes": 2, "num_envs": 2, "learning_rate": 1e-30}
    summary = qfleet.train(tiny(tmp_path / "run", env="Endless-v0", **settings))
    assert (summary["eval_num_cut"], summary["eval_num_different"], summary["eval_episode_limit"]) == (2, 1, 1000)
    assert summary["eval_returns"] == [[1000.0, 1000.0]]
    episodes = qfleet.load(tmp_path / "run").play_episodes(3)
    assert episodes.lengths.tolist() == [1000] * 3 and episodes.was_cut.all()


def test_many_seeds_report_and_load_each(tmp_path: Path) -> None:
    summary = qfleet.train(tiny(tmp_path / "both", seed=5, num_seeds=2))
    assert np.shape(summary["eval_returns"]) == (2, 5)
    last = json.loads((tmp_path / "both" / "metrics.jsonl").read_text().splitlines()[-1])
    assert [last[f"eval_return_mean_seed_{i}"] for i in (0, 1)] == [np.mean(each) for each in summary["eval_returns"]]
    first, second = (last[f"episode_return_mean_seed_{i}"] for i in (0, 1))
    assert min(first, second) <= last["episode_return_mean"] <= max(first, second)
    alone = qfleet.train(tiny(tmp_path / "alone", seed=6))
    assert alone["eval_returns"][0] == pytest.approx(summary["eval_returns"][1])
    expected = qfleet.load(tmp_path / "alone").params
    second, first = (qfleet.load(tmp_path / "both", seed=seed).params for seed in (6, 5))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), second, expected)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert_same(qfleet.load(tmp_path / "both").params, first)
    with pytest.raises(ConfigError, match="5 to 6, got 7"):
        qfleet.load(tmp_path / "both", seed=7)


def list_network(hidden: int) -> qfleet.Network:
    def init(key: jax.Array) -> list:
        return [0.1 * jax.random.normal(key, (1, hidden)), jnp.zeros(hidden), jnp.ones((hidden, 2))]

    return qfleet.Network(init, lambda params, obs: jnp.tanh(obs @ params[0] + params[1]) @ params[2])


def test_a_network_of_lists_and_an_optimiser_of_ones_own_train_load_and_resume(tmp_path: Path) -> None:
    own: dict[str, Any] = {"network": list_network(8), "optimiser": optax.sgd(1e-2)}
    qfleet.train(tiny(tmp_path / "run"), **own)
    policy = qfleet.load(tmp_path / "run", network=list_network(8))
    assert isinstance(policy.params, list)
    assert policy(np.zeros((3, 1), np.float32)).shape == (3,)
    assert follow(qfleet.resume(tmp_path / "run", env_steps=512, **own))["env_steps"] == 512
    with pytest.raises(ConfigError, match=r"`network` must be the one .* params/0 .* \[1, 9\], .* \[1, 8\]"):
        qfleet.load(tmp_path / "run", network=list_network(9))
    for without in (qfleet.load, lambda path: qfleet.resume(path, env_steps=1024)):
        with pytest.raises(ConfigError, match="this run has its own network; give `network`"):
            without(tmp_path / "run")


def test_an_environment_that_has_changed_since_is_blamed_and_no_network_that_nobody_gave(tmp_path: Path) -> None:
    qfleet.register_env("Changing-v0", probes.constant_reward)
    qfleet.train(tiny(tmp_path / "run", env="Changing-v0"))
    env = probes.constant_reward()
    changed = dataclasses.replace(env.spec, num_actions=3)
    qfleet.register_env("Changing-v0", lambda: env._replace(spec=changed))
    policy = qfleet.load(tmp_path / "run")
    assert policy.q_values(np.zeros((1, 1), np.float32)).shape == (1, 1), "acting needs no environment"
    rule = r"^the environment Changing-v0 must be as it was in training; it has num_actions 3 now, and had 1; undo"
    for use in (
        policy.evaluate,
        lambda: list(policy.film(tmp_path)),
        lambda: qfleet.resume(tmp_path / "run", env_steps=512),
    ):
        with pytest.raises(ConfigError, match=rule):
            use()
    changed = dataclasses.replace(env.spec, time_limit=3)
    assert qfleet.load(tmp_path / "run").episode_limit() == 3, "another time limit is no hindrance"


def pictures() -> qfleet.InGraphEnv:
    """The first probe, which shows two pictures of 5 x 5 pixels, with the axis of the two in front."""
    env = probes.constant_reward()
    spec = dataclasses.replace(env.spec, observation_shape=(2, 5, 5))

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        return env.reset(key)[0], jnp.zeros((2, 5, 5))

    def step(*arguments: Any) -> Any:
        return env.step(*arguments)._replace(observation=jnp.zeros((2, 5, 5)))

    return env._replace(spec=spec, reset=reset, step=step)


def test_a_run_whose_network_read_observations_otherwise_is_refused(
    tmp_path: Path, own_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qfleet.register_env("Pictures-v0", pictures)
    qfleet.train(tiny(tmp_path / "pictures", env="Pictures-v0", torso="auto"))
    monkeypatch.setattr("qfleet.training.resuming._FIRST_THAT_READS_AS_NOW", SCHEMA_VERSION + 1)  # both are older now
    rule = r"^a network must read .* float32\[2, 5, 5\] .* first axis for the height, .* train anew, or use the version"
    for use in (qfleet.load, lambda run: qfleet.resume(run, env_steps=512)):
        with pytest.raises(ConfigError, match=rule):
            use(tmp_path / "pictures")
    assert qfleet.load(own_copy).q_values(np.zeros((1, 1), np.float32)).shape == (1, 2)
    assert follow(qfleet.resume(own_copy, env_steps=512))["stopped"] == "env steps"


def test_a_network_given_to_a_run_with_a_built_in_one_is_refused(trained: Path) -> None:
    with pytest.raises(ConfigError, match="this run has a built-in network; leave it out"):
        qfleet.load(trained, network=list_network(8))


def test_a_reward_that_is_not_finite_fails_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", env="NaN-v0", env_steps=1024, checkpoint_period_seconds=1e-9)
    run = qfleet.iterate(dataclasses.replace(config, eval_period_env_steps=64))  # a record for each iteration
    with pytest.raises(qfleet.RunFailed, match="environment step 396 in lane 0"):
        follow(run)
    assert run.summary["stopped"] == "failed"
    assert "lane 0" in json.loads((tmp_path / "run" / "summary.json").read_text())["error"]
    assert checkpoints(tmp_path / "run") == [256, 320, 384]
    assert qfleet.load(tmp_path / "run").q_values(np.zeros((1, 1), np.float32)).shape == (1, 2)


def test_a_policy_acts_on_batches(trained: Path) -> None:
    policy = qfleet.load(trained)
    obs = np.linspace(-1, 1, 7, dtype=np.float32)[:, None]
    q, actions = policy.q_values(obs), policy(obs)
    assert (q.shape, q.dtype, actions.shape, actions.dtype) == ((7, 2), np.float32, (7,), np.int32)
    np.testing.assert_array_equal(actions, np.argmax(q, axis=1))
    returns = policy.evaluate(6, seed=1)
    assert returns.shape == (6,)
    np.testing.assert_array_equal(returns, policy.evaluate(6, seed=1))
    assert policy.spec.num_actions == 2


def test_without_the_replay_a_resumed_run_warms_up_anew(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", "dqn", checkpoint_replay=False, env_steps_per_learner_step=1.0)
    first = qfleet.train(config)
    assert not (tmp_path / "run" / "checkpoints" / "256" / "replay").exists()
    resumed = follow(qfleet.resume(tmp_path / "run", env_steps=512))
    assert first["learner_steps"] == 256 - 32
    assert resumed["learner_steps"] == 2 * (256 - 32)


def test_a_run_that_fails_because_of_its_environments_keeps_what_it_has_learned(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", "dqn", env="Failing-v0", env_steps=1024, eval_period_env_steps=1024)
    with pytest.raises(RunFailed, match="environments may fail at most"):
        qfleet.train(config)
    (kept,) = checkpoints(tmp_path / "run")
    assert kept == 2 * 16 * 4  # two iterations of sixteen rows of four lanes
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "failed"
    assert qfleet.load(tmp_path / "run").q_values(np.zeros((1, 1), np.float32)).shape == (1, 2)
