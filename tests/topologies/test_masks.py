"""Action masks in whole runs: no invalid action in training, evaluation, or a policy in hand, and none in a target."""

from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
import small_servers
from small_fleets import config_of

import qfleet
from qfleet.config import AgentConfig, ConfigError
from qfleet.core.masks import masked as masked_network
from qfleet.core.masks import split
from qfleet.core.replay import NO_STEP
from qfleet.core.types import Transition
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.policy import Policy
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.acting import not_finite
from qfleet.topologies.actor_learner.learner import GlobalLearner, batches_per_round
from qfleet.topologies.fleet.actor import Actor
from qfleet.topologies.parameter_server.server_shard import ServerShard
from qfleet.topologies.parameter_server.worker import Worker

ROW = ("obs", "action", "outcome")

SETTINGS: dict[str, Any] = {
    "num_envs": 4,
    "hidden_sizes": (),
    "discount": 0.9,
    "replay_capacity": 2_000,
    "warmup_env_steps": 200,
    "learning_rate": 0.05,
    "exploration_end": 0.3,
    "exploration_env_steps": 1_000,
    "env_steps": 1_500,
    "eval_episodes": 8,
    "eval_exploration": 0.3,
    "eval_period_env_steps": 750,
    "report": False,
}


def rows_of(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the masks, `[steps, num_actions]`, and the actions, `[steps]`, of all steps in the saved replay."""
    with Checkpoints(run / "checkpoints", run_id=None) as checkpoints:
        rows = checkpoints.restore_item("replay", env_steps=checkpoints.latest())["ring"]["rows"]
    is_step = np.asarray(rows["outcome"]) != NO_STEP
    num_actions = 2 if rows["obs"].shape[-1] == 3 else 3
    return split(np.asarray(rows["obs"]), (1,), num_actions)[1][is_step], np.asarray(rows["action"])[is_step]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run in each kind of environment. An invalid action, in training or evaluation, would have ended it."""
    folder = tmp_path_factory.mktemp("masks")
    qfleet.train(qfleet.make_config("masked_cells:Cells", "double_dqn", run_dir=str(folder / "fused"), **SETTINGS))
    overlapped = {"run_dir": str(folder / "overlapped"), "lock_step": True, "max_failures": 0}
    qfleet.train(qfleet.make_config("masked:Corridor-v0", "rainbow_lite", **SETTINGS, **overlapped))
    return {"fused": folder / "fused", "overlapped": folder / "overlapped"}


@pytest.mark.parametrize("kind", ["fused", "overlapped"])
def test_only_valid_actions_are_taken_and_stored_with_their_masks(runs: dict[str, Path], kind: str) -> None:
    mask, action = rows_of(runs[kind])
    assert len(action) > 1_000 and mask[np.arange(len(action)), action].all()
    assert not mask.all() and len(np.unique(action)) == mask.shape[1]


@pytest.mark.parametrize("kind", ["fused", "overlapped"])
def test_a_loaded_policy_plays_valid_episodes(runs: dict[str, Path], kind: str) -> None:
    policy = qfleet.load(runs[kind])
    assert np.isfinite(policy.evaluate(num_episodes=4)).all()
    assert policy.spec.has_action_mask


def test_a_run_ends_where_nothing_is_valid_and_says_so() -> None:
    error = str(not_finite(make_env("masked_cells:Cells").spec, "in lane 3"))
    assert error.startswith("rewards and observations must be finite, but Cells returned one that isn't in lane 3; ")
    assert error.endswith("a state that goes on without a valid action counts as one too")
    assert str(not_finite(make_env("CartPole-v1").spec, "in lane 3")).endswith("one that isn't in lane 3")


@pytest.mark.parametrize("env", ["masked_cells:Cells", "masked:Corridor-v0"])
def test_an_actor_of_a_fleet_acts_and_values_by_masks(env: str) -> None:
    """All values are 0, so that TD errors are rewards. An invalid action's least value would show in them."""
    options = {} if env == "masked_cells:Cells" else {"max_failures": 0}
    config = config_of(env, hidden_sizes=(), n_step=1, actor_epsilon_base=0.9, **options)
    actor, spec = Actor(config, 0), make_env(env).spec
    network = make_network(spec, config.agent)
    params = jax.tree.map(np.zeros_like, network.init(jax.random.key(0)))
    actor.begin(0)
    actor.receive(0, jax.tree.leaves(params))
    chunks = [actor.collect(0.0)[1] for _ in range(6)]
    actor.close()
    obs, action, outcome = (np.concatenate([getattr(chunk.rows, name) for chunk in chunks]) for name in ROW)
    mask = split(obs, (1,), spec.num_actions)[1]
    is_step = outcome != NO_STEP
    assert np.take_along_axis(mask, action[..., None], axis=-1)[..., 0][is_step].all()
    errors = np.concatenate([chunk.td_error for chunk in chunks])
    assert np.isfinite(errors[~np.isnan(errors)]).all() and np.nanmax(np.abs(errors)) <= 1.0


def test_the_learner_of_a_fleet_takes_transitions_joined_with_masks() -> None:
    config = config_of("masked:Corridor-v0", hidden_sizes=(), batch_size=8)
    learner, num_samples = GlobalLearner(config), 8 * batches_per_round(config, make_env("masked:Corridor-v0").spec)
    obs = np.tile(np.float32([2, 1, 1, 1]), (num_samples, 1))
    ones = np.ones(num_samples, np.float32)
    batches = Transition(obs, np.zeros(num_samples, np.int32), ones, ones, obs, ones)
    result, _ = learner.learn([np.arange(num_samples)], batches)
    assert np.isfinite(result.loss) and result.learner_steps == num_samples // 8


def test_a_worker_of_a_parameter_server_acts_and_learns_by_masks() -> None:
    config = small_servers.config_of("masked_cells:Cells", hidden_sizes=(), num_workers=1)
    worker = Worker(config, 0)
    worker.begin(0)
    worker.pull(0, *small_servers.pulled([ServerShard(config, 0)]))
    for _ in range(8):
        worker.act(1.0)  # an invalid action would raise
    assert np.isfinite(np.concatenate(worker.compute_gradient(0.4).pieces)).all()
    rows = worker.snapshot().ring.rows
    is_step = rows.outcome != NO_STEP
    mask = split(np.asarray(rows.obs), (1,), 2)[1]
    taken = np.take_along_axis(mask, np.asarray(rows.action)[..., None], axis=-1)[..., 0]
    assert is_step.sum() > 60 and taken[is_step].all()


def test_a_policy_acts_by_masks(runs: dict[str, Path]) -> None:
    policy, env = qfleet.load(runs["overlapped"]), gymnasium.make("Corridor-v0")
    obs, info = env.reset(seed=0)
    for _ in range(3):
        obs, _, terminated, _, info = env.step(policy(obs, mask=info["action_mask"]))
        if terminated:
            break
    batch, masks = np.array([[0], [1], [6]], np.float32), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert policy(batch, mask=masks).tolist() == [1, 0, 2] and policy(batch[1], mask=masks[1]) == 0
    assert policy(batch[:0], mask=masks[:0]).tolist() == []
    q = policy.q_values(batch, mask=masks.astype(bool))
    np.testing.assert_array_equal(np.isneginf(q), masks == 0)
    joined = np.concatenate([batch, masks], axis=-1, dtype=np.float32)  # as lanes return them
    assert policy(joined).tolist() == [1, 0, 2] and policy(joined[2]) == 2


def test_a_step_with_memory_acts_by_masks_too(runs: dict[str, Path]) -> None:
    policy, memory = qfleet.load(runs["overlapped"]), qfleet.load(runs["overlapped"]).start(2)
    masks = np.array([[0, 1, 0], [1, 0, 0]])
    for mask in (masks, masks[::-1]):
        action, memory = policy.step(memory, np.zeros((2, 1), np.float32), mask=mask)
        assert action.tolist() == mask.argmax(axis=-1).tolist()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, r"info\['action_mask'\] must be given as `mask`, got none"),
        ([1, 1], r"must have shape \(3,\), a flag for each action, got \(2,\)"),
        ([[1, 1, 1]], r"must have shape \(3,\), a flag for each action, got \(1, 3\)"),
        ([0, 0, 0], "must have a valid action in each state that goes on, got none"),
        ([0, 2, 0], "must be made of 0 and 1, got 2"),
    ],
)
def test_a_policy_refuses_what_is_no_mask(runs: dict[str, Path], mask: Any, message: str) -> None:
    policy = qfleet.load(runs["overlapped"])
    with pytest.raises(ConfigError, match=rf"one observation of gym:masked:Corridor-v0 .* in front: .*{message}"):
        policy(np.zeros(1, np.float32), mask=mask)


def test_a_mask_in_the_observation_is_taken_from_there() -> None:
    env = make_env("masked:Corridor-v0", place="observation")
    network = masked_network(make_network(env.spec, AgentConfig(hidden_sizes=())), env.spec)
    policy = Policy(env, network, network.init(jax.random.key(0)), "untrained")
    state = {"cell": np.zeros(1, np.float32), "action_mask": np.array([0, 1, 0], np.int8)}
    assert policy(state) == 1 and policy({key: np.stack([value] * 2) for key, value in state.items()}).tolist() == [
        1,
        1,
    ]
    with pytest.raises(ConfigError, match=r"must be given in the observation, got none"):
        policy({"cell": np.zeros(1, np.float32)})


def test_a_policy_whose_environment_has_no_masks_refuses_one() -> None:
    env = make_env("CartPole-v1")
    network = make_network(env.spec, AgentConfig(hidden_sizes=()))
    policy = Policy(env, network, network.init(jax.random.key(0)), "untrained")
    with pytest.raises(ConfigError, match="`mask` must be left out, because the environment has no action masks"):
        policy(np.zeros(4, np.float32), mask=[1, 1])
