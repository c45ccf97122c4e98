"""Pictures of environments: they are uint8 RGB, have one size, and differ if the states differ."""

import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from qfleet.config import ConfigError
from qfleet.envs import rendering
from qfleet.envs.host import LaneOptions, RenderedLanes
from qfleet.envs.registry import make_env
from qfleet.envs.spec import EnvSpec

Image = pytest.importorskip("PIL.Image")


def spec_of(shape: tuple[int, ...], dtype: type) -> EnvSpec:
    return EnvSpec(name="x", observation_shape=shape, observation_dtype=np.dtype(dtype), num_actions=2)


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"])
def test_a_renderer_draws_every_state_anew(name: str) -> None:
    env = make_env(name)
    assert env.render is not None
    pictures = []
    state, observation = env.reset(jax.random.key(0))
    for _ in range(3):
        pictures.append(env.render(jax.device_get(state), np.asarray(observation)))
        for _ in range(4):
            state, observation = env.step(state, np.int32(0), jax.random.key(0))[:2]
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape == (*pictures[0].shape[:2], 3) for p in pictures)
    assert np.any(pictures[0] != pictures[1]) and np.any(pictures[1] != pictures[2])


def orange(picture: np.ndarray) -> np.ndarray:
    """Returns the rows and columns of orange pixels, `[pixels, 2]`."""
    return np.argwhere(np.all(picture == (0xEE, 0x85, 0x4A), axis=-1))


def test_the_pole_leans_to_the_side_of_its_angle() -> None:
    env = make_env("CartPole-v1")
    for angle in (-0.2, 0.2):
        picture = env.render(np.array([0.0, 0.0, angle, 0.0], np.float32), np.zeros(4))
        row, column = min(orange(picture).tolist())
        assert row < 80 and np.sign(column - picture.shape[1] / 2) == np.sign(angle)


def test_the_acrobot_crosses_its_line_where_it_terminates() -> None:
    env = make_env("Acrobot-v1")
    for angle, is_above in ((0.0, False), (np.pi, True)):  # both links down, both up
        picture = env.render(np.array([angle, 0.0, 0.0, 0.0], np.float32), np.zeros(6))
        line = (2.25 - 1) * 80  # pixels from the top
        assert (orange(picture)[:, 0].min() < line) == is_above


def test_the_car_moves_with_its_position() -> None:
    env = make_env("MountainCar-v0")
    columns = []
    for position in (-1.0, -0.5, 0.4):
        picture = env.render(np.array([position, 0.0], np.float32), np.zeros(2))
        columns.append(np.argwhere(np.all(picture == (0x48, 0x78, 0xD0), axis=-1))[:, 1].mean())
    np.testing.assert_allclose(columns, [(x + 1.2) * 480 / 1.8 for x in (-1.0, -0.5, 0.4)], atol=20)


def test_planes_have_colours_of_their_own_and_later_ones_cover_earlier_ones() -> None:
    observation = np.zeros((2, 5, 4), bool)
    observation[0, range(4), range(4)] = True
    observation[1, 0, [1, 3]] = True
    picture = rendering.draw_observation(observation)
    assert picture.dtype == np.uint8 and picture.shape == (2, 5, 3)
    assert len({tuple(colour) for colour in picture[0].tolist()}) == 5
    np.testing.assert_array_equal(picture[1, 0], picture[0, 3])


def test_minatar_is_drawn_from_its_observations() -> None:
    pytest.importorskip("gymnax")
    env = make_env("gymnax:Breakout-MinAtar")
    assert rendering.is_picture(env.spec)
    state, observation = env.reset(jax.random.key(0))
    before = rendering.draw_observation(np.asarray(observation))
    for _ in range(2):
        state, observation = env.step(state, np.int32(1), jax.random.key(1))[:2]
    after = rendering.draw_observation(np.asarray(observation))
    assert before.shape == after.shape == (10, 10, 3) and np.any(before != after)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((84, 84), np.uint8, True),
        ((84, 84, 1), np.uint8, True),
        ((64, 48, 3), np.uint8, True),
        ((10, 10, 7), bool, True),
        ((3, 64, 64), np.uint8, False),
        ((128,), np.uint8, False),
        ((10, 10), np.float32, False),
        ((16,), bool, False),
    ],
)
def test_an_observation_is_a_picture_where_it_can_be_drawn(shape: tuple[int, ...], dtype: type, expected: bool) -> None:
    assert rendering.is_picture(spec_of(shape, dtype)) == expected
    if expected:
        picture = rendering.draw_observation(np.ones(shape, dtype))
        assert picture.dtype == np.uint8 and picture.shape == (*shape[:2], 3)


def rendered(name: str) -> RenderedLanes:
    make: Callable[[LaneOptions], RenderedLanes] | None = make_env(name).make_rendered_lanes
    assert make is not None
    return make(LaneOptions(max_failures=0))


def test_gymnasium_renders_the_state_it_is_in() -> None:
    pytest.importorskip("pygame")
    lanes = rendered("gym:CartPole-v1")
    lanes.reset(0)
    pictures = [lanes.render()]
    for _ in range(5):
        lanes.send(np.zeros(1, np.int32))
        lanes.recv()
    pictures.append(lanes.render())
    lanes.close()
    assert all(picture.dtype == np.uint8 and picture.shape == (400, 600, 3) for picture in pictures)
    assert np.any(pictures[0] != pictures[1])


def test_what_gymnasium_can_not_draw_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="LimitedCounter-v0 must have the render mode 'rgb_array' to be watched"):
        rendered("gym:counters:LimitedCounter-v0")
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(ConfigError, match="gym:CartPole-v1 must render to be watched, got DependencyNotInstalled"):
        rendered("gym:CartPole-v1")


def test_the_coloured_game_is_the_one_that_the_agent_sees() -> None:
    pytest.importorskip("ale_py")
    env = make_env("ale:Breakout")
    watched, plain = rendered("ale:Breakout"), env.make_eval_lanes(1, LaneOptions())
    np.testing.assert_array_equal(watched.reset(3), plain.reset(3))
    actions = np.random.default_rng(0).integers(env.spec.num_actions, size=(150, 1), dtype=np.int32)
    for action in actions:
        watched.send(action)
        plain.send(action)
        step, expected = watched.recv(), plain.recv()
        for ours, theirs in zip(step, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    picture = watched.render()
    watched.close()
    plain.close()
    assert picture.shape == (210, 160, 3) and np.any(picture[..., 0] != picture[..., 2])
    grey = np.asarray(Image.fromarray(picture).convert("L").resize((84, 84), Image.Resampling.BOX), np.int32)
    assert np.abs(grey - step.observation[0]).mean() < 5


def test_envpool_draws_no_vectors() -> None:
    pytest.importorskip("envpool")
    assert make_env("envpool:Breakout-v5").make_rendered_lanes is None
    with pytest.raises(ConfigError, match=r"shows float32 \[4\]; train in its equivalent gym:CartPole-v1"):
        rendered("envpool:CartPole-v1")
