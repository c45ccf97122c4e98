"""Episodes to watch: they are the policy's own greedy episodes, complete, with each moment once."""

import itertools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.config import ConfigError, RunFailed
from qfleet.core.keys import Stream
from qfleet.core.player import make_player
from qfleet.core.types import EnvSpec, Network
from qfleet.envs import gymnasium as backend
from qfleet.envs.failures import lane_seed
from qfleet.envs.host import HostEnv, LaneOptions, seed_of
from qfleet.envs.registry import make_env
from qfleet.envs.spec import InGraphEnv
from qfleet.policy import Policy
from qfleet.runtime.episodes import Moment, play


def drawn(env: InGraphEnv) -> InGraphEnv:
    return env._replace(render=lambda state, observation: np.zeros((4, 6, 3), np.uint8))


def played(env: InGraphEnv | HostEnv, num_episodes: int, seed: int) -> list[list[Moment]]:
    params = probes.linear_network(env.spec).init(jax.random.key(1))
    return [list(moments) for moments in play(env, probes.linear_player(env.spec), params, num_episodes, seed)]


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_episodes_are_those_of_evaluation(frame_stack: int) -> None:
    env = drawn(probes.random_walk(frame_stack))
    network = probes.linear_network(env.spec)
    params = network.init(jax.random.key(1))
    expected = Policy(env, network, params, "").evaluate(8, seed=5)
    episodes = played(env, 8, 5)
    np.testing.assert_allclose([moments[-1].episode_return for moments in episodes], expected, rtol=1e-5)
    assert len({len(moments) for moments in episodes}) > 1


def test_an_episode_of_n_steps_has_n_plus_1_moments_and_acts_in_all_but_the_last() -> None:
    (moments,) = played(drawn(probes.time_limit(steps=5)), 1, 0)
    assert [moment.episode_steps for moment in moments] == [0, 1, 2, 3, 4, 5]
    assert [moment.episode_return for moment in moments] == [0, 1, 2, 3, 4, 5]
    assert [moment.action for moment in moments] == [0, 0, 0, 0, 0, None]
    assert all(moment.q.shape == (1,) for moment in moments)


def test_an_episode_without_a_limit_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfleet.runtime.episodes.MAX_EPISODE_STEPS", 30)
    (moments,) = played(drawn(probes.nan_reward(at_step=100)), 1, 0)
    assert moments[-1].episode_steps == 30 and moments[-1].action is None


def test_a_gymnasium_episode_is_that_of_a_plain_greedy_loop() -> None:
    pytest.importorskip("pygame")
    env = backend.make("CartPole-v1")
    network = probes.linear_network(env.spec)
    params = network.init(jax.random.key(1))
    episodes = played(env, 2, 7)
    for i, moments in enumerate(episodes):
        plain = gymnasium.make("CartPole-v1")
        obs, _ = plain.reset(seed=lane_seed(seed_of(7 + i, Stream.POLICY), 0))
        total, ended, actions = 0.0, False, []
        while not ended:
            actions.append(int(np.argmax(network.apply(params, jnp.asarray(obs)[None])[0])))
            obs, reward, terminated, truncated, _ = plain.step(actions[-1])
            total, ended = total + float(reward), terminated or truncated
        plain.close()
        assert [moment.action for moment in moments] == [*actions, None]
        assert moments[-1].episode_return == total


def test_host_observations_that_are_pictures_are_drawn() -> None:
    pytest.importorskip("ale_py")
    env = make_env("ale:Pong")._replace(make_rendered_lanes=None)
    network = Network(lambda key: (), lambda params, obs: jnp.zeros((1, 6)))
    episodes = play(env, make_player(network, env.spec.frame_stack), (), 1, 0)
    pictures = [moment.picture for moment in itertools.islice(next(episodes), 20)]
    episodes.close()
    assert all(picture.shape == (84, 84, 3) for picture in pictures)
    assert np.any(pictures[0] != pictures[-1]) and np.all(pictures[0][..., 0] == pictures[0][..., 1])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            probes.constant_reward(),
            r"observations float32 \[1\], which are not pictures; give the InGraphEnv a `render`",
        ),
        (backend.make("counters:LimitedCounter-v0"), "must have the render mode .rgb_array. to be watched"),
        (
            probes.constant_reward()._replace(render=lambda state, observation: np.zeros((4, 6))),
            r"must be a uint8 array \[height, width, 3\], got float64 \[4, 6\]; fix its renderer",
        ),
    ],
    ids=["in graph", "host", "no picture"],
)
def test_what_can_not_be_drawn_is_one_clear_error(env: InGraphEnv | HostEnv, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        played(env, 1, 0)


class _Failing(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple:
        raise ValueError("no")

    def render(self) -> np.ndarray:
        return np.zeros((4, 6, 3), np.uint8)


def test_an_environment_that_fails_ends_the_film() -> None:
    gymnasium.register("Failing-v0", _Failing)
    try:
        with pytest.raises(RunFailed, match="no"):
            played(backend.make("Failing-v0"), 1, 0)
    finally:
        del gymnasium.registry["Failing-v0"]


def test_lanes_are_closed_after_the_last_episode() -> None:
    closed = []

    class Lanes:
        def reset(self, seed: int) -> np.ndarray:
            return np.zeros((1, 1), np.float32)

        def render(self) -> np.ndarray:
            return np.zeros((4, 6, 3), np.uint8)

        def close(self) -> None:
            closed.append(True)

    spec = EnvSpec(name="x", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2)
    env = HostEnv(spec, make_lanes, make_lanes, lambda options: Lanes())
    films = play(env, probes.linear_player(spec), probes.linear_network(spec).init(jax.random.key(0)), 2, 0)
    next(next(films))
    assert not closed
    films.close()
    assert closed


def make_lanes(num_lanes: int, options: LaneOptions) -> None:
    raise AssertionError("only rendered lanes are needed")
