"""A policy in hand: it takes what the environment returns, and returns what the environment takes."""

from pathlib import Path
from typing import Any

import contracts
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from gymnasium import spaces

import qfleet
from qfleet.config import ConfigError
from qfleet.core.types import Network
from qfleet.envs import gymnasium as backend
from qfleet.policy import Policy
from qfleet.runtime.evaluation import EvaluationOptions


def policy_of(env: Any, choose: Any) -> Policy:
    """Returns a policy whose greedy action for an encoded observation `x`, `[*shape]`, is `choose(x)`."""
    actions = jnp.arange(env.spec.num_actions)

    def apply(params: Any, obs: jax.Array) -> jax.Array:
        flat = obs.reshape(len(obs), -1).astype(jnp.float32)
        return -jnp.abs(jax.vmap(choose)(flat)[:, None] - actions)

    return Policy(env, Network(lambda key: {}, apply), {}, "mine")


def made_by(kind: Any) -> Any:
    return backend.from_maker("Mine", kind, {}, kind())


def test_states_are_encoded_as_in_training() -> None:
    policy = policy_of(backend.make("FrozenLake-v1"), lambda x: jnp.argmax(x) % 4)
    env = gymnasium.make("FrozenLake-v1")
    obs, _ = env.reset(seed=0)
    env.step(policy(obs))
    assert policy(obs) == 0 and isinstance(policy(7), int) and policy(7) == 3
    assert policy(np.arange(16)).tolist() == [i % 4 for i in range(16)]
    assert policy.q_values(5).shape == (4,) and policy.q_values(np.arange(3)).shape == (3, 4)


def test_actions_are_the_environments() -> None:
    offset = policy_of(backend.make("counters:Offset-v0"), lambda x: jnp.argmax(x))
    assert offset(5) == 5 and offset(np.array([7, 6])).tolist() == [7, 6]
    several = policy_of(made_by(contracts.Several), lambda x: x[0])
    assert several(np.array([4.0, 0])).tolist() == [1, 1]
    assert several(np.array([[4.0, 0], [5, 0]])).tolist() == [[1, 1], [1, 2]]


def test_parts_are_taken_as_the_environment_returns_them() -> None:
    policy = policy_of(backend.make("Blackjack-v1"), lambda x: x[14])
    assert policy((14, 10, 0)) == 1 and policy((13, 10, 0)) == 0
    assert policy((np.array([14, 13]), np.array([10, 10]), np.array([0, 1]))).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("env", "obs", "message"),
    [
        (probes.time_limit(), np.zeros((4, 3)), r"observation of time-limit .* must have shape \(4, 1\), got \(4, 3\)"),
        (probes.time_limit(), np.zeros(8), r"must have shape \(1,\), got \(8,\)"),
        (probes.time_limit(), [np.nan], "must be finite in float32, got nan"),
        (probes.time_limit(), 3.0, r"must have shape \(1,\), got \(\)"),
        (probes.time_limit(), None, "must be made of numbers, got NoneType None"),
        (backend.make("FrozenLake-v1"), 16, "observation of gym:FrozenLake-v1 .* a whole number from 0 to 15, got 16"),
        (backend.make("FrozenLake-v1"), np.eye(16), r"must have shape \(\), got \(16, 16\)"),
        (backend.make("Blackjack-v1"), (14, 10), "must be a tuple of 3, got 2 values"),
    ],
)
def test_what_is_no_observation_is_refused_in_the_environments_words(env: Any, obs: Any, message: str) -> None:
    policy = policy_of(env, lambda x: 0.0)
    for ask in (policy, policy.q_values):
        with pytest.raises(ConfigError, match=message):
            ask(obs)


def test_numbers_keep_their_values() -> None:
    policy = policy_of(probes.random_walk(frame_stack=1), lambda x: x[0] > 2.9e9)
    assert policy(np.array([3_000_000_000, 0])) == 1
    assert policy(np.array([[3_000_000_000, 0], [2_000_000_000, 0]], np.int64)).tolist() == [1, 0]


def test_a_policy_that_remembers_is_given_its_memory() -> None:
    """Its value is the sum of the observations of the episode, and it takes the action that is nearest to it."""
    network = probes.summing_network()
    step, actions = network.recurrence.step, jnp.arange(9)

    def near(params: Any, *inputs: Any) -> Any:
        carry, _ = step(params, *inputs)
        return carry, -jnp.abs(carry - actions)

    recurrence = network.recurrence._replace(step=near)
    policy = Policy(probes.time_limit(), network._replace(recurrence=recurrence), {}, "mine")
    for ask in (policy, policy.q_values):
        with pytest.raises(ConfigError, match=r"must be given its memory.*use memory = policy.start\(num_lanes\)"):
            ask(np.ones(1))
    memory = policy.start(2)
    action, first = policy.step(memory, np.array([[1.0], [2.0]]))
    assert action.tolist() == [1, 2]
    for _ in range(2):  # a memory can be used again
        action, second = policy.step(first, np.array([[3.0], [3.0]]))
        assert action.tolist() == [4, 5]
    assert policy.step(second, np.array([[1.0], [1.0]]), is_first=[False, True])[0].tolist() == [5, 1]
    action, memory = policy.step(policy.start(), np.array([3.0]))
    assert (action, policy.step(memory, np.array([1.0]))[0]) == (3, 4)
    assert policy.step(memory, np.array([1.0]), is_first=True)[0] == 1


@pytest.mark.parametrize(
    ("num_lanes", "obs", "more", "message"),
    [
        (2, np.ones(1), {}, "must be given 2 observations, .* got one without a batch axis; begin with policy.start"),
        (2, np.ones((3, 1)), {}, r"must be given 2 observations, .* got a batch of 3; begin with policy.start\(3\)"),
        (None, np.ones((3, 1)), {}, "must be given one observation without a batch axis"),
        (2, np.ones((2, 1)), {"is_first": [0, 1]}, r"is_first must be bool, \[2\], got \[0, 1\]"),
        (2, np.ones((2, 1)), {"is_first": True}, r"is_first must be bool, \[2\], got True"),
        (0, np.ones((0, 1)), {}, "num_lanes must be"),
    ],
)
def test_a_step_that_does_not_fit_its_memory_is_refused(num_lanes: Any, obs: Any, more: Any, message: str) -> None:
    policy = policy_of(probes.time_limit(), lambda x: 0.0)
    with pytest.raises(ConfigError, match=message):
        policy.step(policy.start(num_lanes), obs, **more)
    with pytest.raises(ConfigError, match="must be given the memory that start or the step before returned, got None"):
        policy.step(None, obs)


def test_the_memory_of_another_policy_is_refused() -> None:
    plain = policy_of(probes.time_limit(), lambda x: 0.0)
    recurrent = Policy(probes.time_limit(), probes.summing_network(), {}, "mine")
    for one, other in ((plain, recurrent), (recurrent, plain)):
        _, memory = other.step(other.start(2), np.ones((2, 1)))
        for strange in (memory, memory._replace(num_lanes=3)):
            with pytest.raises(
                ConfigError, match="must be given a memory of this policy, got one of another policy or"
            ):
                one.step(strange, np.ones((strange.num_lanes, 1)))


def test_steps_stack_single_frames_as_training_does() -> None:
    env = probes.random_walk(frame_stack=3)
    network = probes.linear_network(env.spec)
    policy = Policy(env, network, network.init(jax.random.key(1)), "mine")
    frames = np.random.default_rng(0).normal(size=(5, 4, *env.spec.observation_shape)).astype(np.float32)
    memory = policy.start(4)
    for i, frame in enumerate(frames):
        action, memory = policy.step(memory, frame)
        seen = [frames[j] if j >= 0 else np.zeros_like(frame) for j in range(i - 2, i + 1)]
        assert action.tolist() == policy(np.stack(seen, axis=-1)).tolist()


class Corner(contracts.Plain):
    """Observes a dict, pays 1 for action 6, and ends at once."""

    observation_space = spaces.Dict({"side": spaces.Discrete(2, start=5), "noise": spaces.Box(-1, 1, (2,))})
    action_space = spaces.Discrete(2, start=5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return {"side": 5, "noise": np.zeros(2, np.float32)}, {}

    def step(self, action: Any) -> Any:
        return {"side": 6, "noise": np.ones(2, np.float32)}, float(action == 6), True, False, {}


def settings(run_dir: Path) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir), "num_envs": 4, "hidden_sizes": (8,), "env_steps": 64, "eval_period_env_steps": 64,
        "eval_episodes": 2, "num_minibatches": 1, "rollout_length": 8,
    }  # fmt: skip


def test_a_function_that_makes_the_environment_is_trained_in_resumed_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = qfleet.make_config(Corner, "pqn", **settings(tmp_path / "run"))
    assert (config.env, config.topology.name) == ("factory:Corner", "overlapped")
    assert qfleet.train(config)["stopped"] == "env steps"
    policy = qfleet.load(tmp_path / "run")
    assert policy({"side": 5, "noise": np.zeros(2)}) in (5, 6)
    monkeypatch.setattr("qfleet.envs.factory._factories", {})  # as in another process
    policy = qfleet.load(tmp_path / "run")
    assert policy({"side": 5, "noise": np.zeros(2)}) in (5, 6), "acting needs no environment"
    with pytest.raises(ConfigError, match=r"factory:Corner is a function .* qfleet.load\(run, env="):
        policy.evaluate(1)
    assert qfleet.load(tmp_path / "run", env=Corner).evaluate(2).shape == (2,)
    run = qfleet.resume(tmp_path / "run", env=Corner, env_steps=128)
    assert [progress.env_steps for progress in run][-1] == 128


def test_train_takes_a_function_in_place_of_a_name(tmp_path: Path) -> None:
    config = qfleet.make_config("FrozenLake-v1", "pqn", **settings(tmp_path / "run"))
    run = qfleet.iterate(config, env=lambda: Corner())
    assert run.config.env.startswith("factory:lambda") and run.config.topology == config.topology
    next(iter(run))


def test_what_breaks_the_contract_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    config = qfleet.make_config(contracts.FourValues, "pqn", **settings(tmp_path / "run"))
    with pytest.raises(ConfigError, match="step must return .*, got 4 values"):
        qfleet.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("topology", ["actor-learner", "all-reduce", "gossip"])
def test_what_other_processes_cannot_find_is_refused_at_once(topology: str) -> None:
    preset = "double_dqn" if topology == "actor-learner" else "pqn"
    for env in (Corner, "Mine-v0"):
        qfleet.register_env("Mine-v0", Corner)
        config = qfleet.make_config(env, preset, topology)
        with pytest.raises(ConfigError, match="must find its environment by name in each of them"):
            qfleet.iterate(config)


def test_an_environment_that_changed_is_blamed_for_it_and_not_a_network(tmp_path: Path) -> None:
    class Wider(Corner):
        observation_space = spaces.Box(-1, 1, (5,))

    qfleet.train(qfleet.make_config(Corner, "pqn", **settings(tmp_path / "run")))
    with pytest.raises(
        ConfigError, match=r"^the environment factory:.* must be as it was .* observations \[5\]"
    ) as error:
        qfleet.load(tmp_path / "run", env=Wider)
    assert "`network`" not in str(error.value)


def test_a_batch_of_no_observations_gets_no_actions() -> None:
    corner = made_by(Corner)
    for env, obs in [
        (probes.time_limit(), np.zeros((0, 1))),
        (backend.make("FrozenLake-v1"), np.zeros(0, int)),
        (corner, {"side": np.zeros(0, int), "noise": np.zeros((0, 2))}),
    ]:
        policy = policy_of(env, lambda x: x[0])
        assert policy(obs).shape == (0,) and policy.q_values(obs).shape == (0, env.spec.num_actions)


def test_a_list_of_tuples_is_not_taken_for_a_tuple_of_batches() -> None:
    class Pair(contracts.Plain):
        observation_space = spaces.Tuple([spaces.Discrete(3), spaces.Discrete(3)])

    policy = policy_of(made_by(Pair), lambda x: x[1])
    assert policy([1, 2]) == policy((1, 2)) == 1
    assert policy(([1, 0], [0, 2])).tolist() == [1, 0]
    with pytest.raises(ConfigError, match="a batch must be a tuple of 2 batches, got a list"):
        policy([(1, 0), (0, 2)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_of_one_number_is_a_batch_where_observations_are_numbers(dtype: Any) -> None:
    class Scalar(contracts.Plain):
        observation_space = spaces.Box(-9, 9, ())

    policy = policy_of(made_by(Scalar), lambda x: x[0])
    assert policy(dtype(1)) == 1 and policy(np.ones(1, dtype)).tolist() == [1]


def test_what_a_policy_returns_may_be_written_to() -> None:
    policy = policy_of(probes.time_limit(), lambda x: x[0])
    for array in (policy(np.zeros((2, 1))), policy.q_values(np.zeros((2, 1))), policy.q_values([0.0])):
        array[0] = 1


def test_numbers_of_episodes_are_brought_to_plain_ones_or_refused() -> None:
    policy = policy_of(probes.time_limit(), lambda x: x[0])
    options = EvaluationOptions(max_episode_steps=2.0, exploration=np.float32(0.5), num_env_workers=np.int64(0))
    assert policy.play_episodes(np.int64(2), 3.0, options).lengths.tolist() == [2, 2]
    assert policy.evaluate(2.0).shape == (2,)
    with pytest.raises(ConfigError, match="num_episodes must be a whole number, got '2'; give 2 without quotation"):
        policy.evaluate("2")
    with pytest.raises(ConfigError, match="exploration must be a number, got '0.1'"):
        EvaluationOptions(exploration="0.1")
