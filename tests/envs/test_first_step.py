"""The first step in an environment: what can never be learned in is told at once, in words about the environment."""

import contextlib
import inspect
import logging
import multiprocessing
import sys
from typing import Any

import contracts
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from qfleet.config import ConfigError
from qfleet.envs import conformance
from qfleet.envs import gymnasium as backend
from qfleet.envs.first_step import check_works
from qfleet.envs.host import HostEnv, LaneOptions
from qfleet.envs.registry import make_env


def line_of(kind: type, method: str) -> str:
    return f"{method} of {kind.__name__}, {contracts.__file__}:{inspect.getsourcelines(getattr(kind, method))[1]}"


BREACHES = [
    ("OldReset", "reset", r"reset must be reset\(self, \*, seed=None, options=None\), got reset\(\)"),
    (
        "OnlyObservation",
        "reset",
        r"reset must return .*, got float32 of shape \(2,\), as Gym before version 0.26",
    ),
    ("FourValues", "step", r"step must return .*, got 4 values .*, as Gym before version 0.26 had it"),
    ("FailsToClose", "step", r"step must return .*, got 4 values"),
    ("NoReward", "step", "the reward must be made of numbers, got NoneType None"),
    ("HugeReward", "step", "the reward must be finite in float32, got -1.79"),
    ("WrongShape", "reset", r"the observation must have shape \(2,\), got \(3,\)"),
    ("WrongDtype", "reset", "the observation must be made of numbers, got str 'left'"),
    ("TextFlag", "step", "terminated must be made of numbers, got str 'False'"),
]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("name", "method", "message"), BREACHES)
def test_a_breach_is_told_at_once_and_where_it_is(name: str, method: str, message: str, wrapped: bool) -> None:
    env = make_env(f"contracts:{name}-v0") if wrapped else made_by(getattr(contracts, name))
    with pytest.raises(ConfigError, match=message) as caught:
        check_works(env, LaneOptions())
    assert line_of(getattr(contracts, name), method) in str(caught.value)


def made_by(make: Any) -> HostEnv:
    return backend.from_maker("Mine", make, {}, make())


def test_check_env_reports_it() -> None:
    (check,) = conformance.check(backend.make("contracts:FourValues-v0"), num_steps=5)
    assert not check.is_ok and "got 4 values" in check.detail


@pytest.mark.parametrize("space", [contracts.NESTED, spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3])])
def test_the_conformance_suite_takes_every_space(space: gymnasium.Space) -> None:
    class Sampled(contracts.Plain):
        observation_space = space

        def reset(self, **options: Any) -> Any:
            super().reset(**options)
            return self.observe(), {}

        def step(self, action: Any) -> Any:
            return self.observe(), *super().step(action)[1:]

        def observe(self) -> Any:
            space.seed(int(self.np_random.integers(2**31)))
            return space.sample()

    assert [found for found in conformance.check(made_by(Sampled), num_steps=20) if not found.is_ok] == []


def test_what_the_environment_raises_is_told_with_its_own_line() -> None:
    with pytest.raises(ConfigError, match=r"failed: OSError: no game today \(.*counters\.py:\d+\)"):
        check_works(backend.make("counters:Counter-v0", fault="raise in reset"), LaneOptions())


def test_a_worker_tells_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"got 4 values .*step of FourValues, .*contracts\.py"):
        check_works(backend.make("contracts:FourValues-v0"), LaneOptions(num_env_workers=3))
    assert multiprocessing.active_children() == [] and "Traceback" not in capfd.readouterr().err


def test_combined_actions_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qfleet"):
        check_works(made_by(contracts.Several), LaneOptions())
    (actions,) = (record.getMessage() for record in caplog.records)
    assert "learned as one choice among 6 combinations" in actions


def test_bytes_in_floats_that_no_bound_declares_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class Image(contracts.Plain):
        observation_space = spaces.Box(-np.inf, np.inf, (6, 6, 3))

        def reset(self, **options: Any) -> Any:
            return np.full((6, 6, 3), 200.0, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros((6, 6, 3), np.float32), 0.0, True, False, {}

    with caplog.at_level(logging.WARNING, "qfleet"):
        check_works(made_by(Image), LaneOptions())
    assert "an image of floats up to 200, which isn't divided by 255" in caplog.text


def test_a_function_renders_if_it_takes_the_mode_or_makes_environments_with_it() -> None:
    for make in (contracts.Rendered, lambda: contracts.Rendered("rgb_array")):
        env = made_by(make)
        assert env.make_rendered_lanes is not None
        with contextlib.closing(env.make_rendered_lanes(LaneOptions())) as lanes:
            lanes.reset(0)
            assert lanes.render().shape == (4, 4, 3)


def test_a_function_that_ignores_the_mode_is_told_to_take_it() -> None:
    env = made_by(lambda: contracts.Rendered())
    assert env.make_rendered_lanes is not None
    with pytest.raises(ConfigError, match="let the function that makes it take render_mode"):
        env.make_rendered_lanes(LaneOptions())


def test_an_environment_that_works_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qfleet"):
        check_works(backend.make("CartPole-v1"), LaneOptions())
    assert caplog.records == []


def test_lanes_of_a_users_own_must_return_what_their_spec_says() -> None:
    env = backend.make("CartPole-v1")
    wrong = env._replace(make_lanes=backend.make("FrozenLake-v1").make_lanes)
    with pytest.raises(ConfigError, match=r"must return observation of reset as float32\[1, 4\], got bool\[1, 16\]"):
        check_works(wrong, LaneOptions())


def test_a_maker_must_return_a_new_environment_each_time() -> None:
    one = contracts.Plain()
    with pytest.raises(ConfigError, match="must be a new one for each lane, but its maker returned the same object"):
        check_works(made_by(lambda: one), LaneOptions())


def test_what_cannot_be_sent_to_workers_is_refused() -> None:
    generator = (i for i in range(3))
    env = made_by(lambda: (generator, contracts.Plain())[1])
    with pytest.raises(ConfigError, match="can be sent to worker processes, got TypeError: cannot pickle 'generator'"):
        check_works(env, LaneOptions(num_env_workers=1))


def test_a_function_travels_to_workers_which_do_without_jax() -> None:
    def make() -> gymnasium.Env:
        assert multiprocessing.parent_process() is None or "jax" not in sys.modules
        return contracts.Plain()

    check_works(made_by(make), LaneOptions(num_env_workers=1))


def test_an_environment_in_a_worker_may_start_a_process() -> None:
    check_works(backend.make("contracts:StartsProcess-v0"), LaneOptions(num_env_workers=1))
    assert multiprocessing.active_children() == []


def test_workers_are_refused_where_no_process_may_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="num_env_workers must be 0 .* such as multiprocessing.Pool's, got 2"):
        backend.make("counters:Counter-v0").make_lanes(2, LaneOptions(num_env_workers=2))


def test_spaces_must_be_gymnasiums() -> None:
    class NoSpace(contracts.Plain):
        action_space: Any = 3

    with pytest.raises(ConfigError, match=r"its action_space must be one of gymnasium\.spaces, got 3"):
        made_by(NoSpace)


def test_the_time_limit_of_a_wrapper_is_known_and_options_reach_the_maker() -> None:
    def make(limit: int = 9) -> gymnasium.Env:
        return gymnasium.wrappers.TimeLimit(contracts.Plain(), limit)

    assert backend.from_maker("Mine", make, {}, make()).spec.time_limit == 9
    env = backend.from_maker("Mine", make, {"limit": 3}, make(limit=3))
    lanes = env.make_lanes(1, LaneOptions())
    lanes.reset(0)
    for _ in range(3):
        lanes.send(np.zeros(1, np.int32))
        step = lanes.recv()
    assert env.spec.time_limit == 3 and step.truncated.all()


def test_several_choices_reach_the_environment_as_it_takes_them() -> None:
    env = made_by(contracts.Several)
    assert env.spec.num_actions == 6
    lanes = env.make_lanes(1, LaneOptions())
    lanes.reset(0)
    lanes.send(np.array([5], np.int32))
    np.testing.assert_array_equal(lanes.recv().observation, [[1, 2]])


def test_a_reward_of_shape_one_is_taken() -> None:
    class OneNumber(contracts.Plain):
        def step(self, action: Any) -> tuple:
            return np.zeros(2, np.float32), np.array([2.5]), np.array([True]), False, {}

    lanes = made_by(OneNumber).make_lanes(1, LaneOptions())
    lanes.reset(0)
    lanes.send(np.zeros(1, np.int32))
    step = lanes.recv()
    assert step.reward.tolist() == [2.5] and step.terminated.all() and not step.failed.any()


def test_an_environment_without_a_renderer_is_refused_with_its_own_remedy() -> None:
    env = made_by(contracts.Plain)
    assert env.make_rendered_lanes is not None
    with pytest.raises(ConfigError, match=r"Mine must have the render mode 'rgb_array'.*metadata\['render_modes'\]"):
        env.make_rendered_lanes(LaneOptions())


def test_a_vector_environment_of_several_choices_gets_them() -> None:
    gymnasium.register("SeveralVector-v0", vector_entry_point=contracts.several_vector)
    lanes = backend.make("SeveralVector-v0").make_lanes(2, LaneOptions())
    lanes.reset(0)
    lanes.send(np.array([4, 5], np.int32))
    np.testing.assert_array_equal(lanes.recv().observation, [[1, 1], [1, 2]])
    assert isinstance(contracts.Several.action_space, spaces.MultiDiscrete)


def test_a_new_wrapper_around_the_same_environment_is_not_a_new_environment() -> None:
    one = contracts.Plain()
    with pytest.raises(ConfigError, match="must be a new one for each lane, but its maker returned the same object"):
        check_works(made_by(lambda: gymnasium.wrappers.TimeLimit(one, 9)), LaneOptions())


@pytest.mark.parametrize("method", ["reset", "step", "close"])
def test_an_environment_that_ends_the_process_fails_like_any_other(method: str) -> None:
    def leave(*_: Any, **__: Any) -> Any:
        sys.exit("the window was closed")

    kind = type("Leaves", (contracts.Plain,), {method: leave})
    if method == "close":
        check_works(made_by(kind), LaneOptions())
        return
    with pytest.raises(ConfigError, match=r"failed: SystemExit: the window was closed \(.*test_first_step\.py"):
        check_works(made_by(kind), LaneOptions())


def test_a_space_that_cannot_be_read_is_told() -> None:
    class NoSpace(contracts.Plain):
        @property
        def observation_space(self) -> Any:  # type: ignore[override]
            raise NotImplementedError("to do")

    with pytest.raises(ConfigError, match="its observation_space must be there, got NotImplementedError: to do"):
        made_by(NoSpace)


def test_parts_of_an_observation_that_are_not_what_they_seem_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class Parts(contracts.Plain):
        observation_space = spaces.Dict(
            camera=spaces.Box(0, 255, (36, 48, 3), np.uint8),
            speed=spaces.Box(-1, 1, (2,)),
            teammate=spaces.Dict(action_mask=spaces.MultiBinary(2)),
        )

        def reset(self, **options: Any) -> Any:
            return self.observation_space.sample(), super().reset(**options)[1]

        def step(self, action: Any) -> Any:
            return self.observation_space.sample(), *super().step(action)[1:]

    with caplog.at_level(logging.WARNING, "qfleet"):
        check_works(made_by(Parts), LaneOptions())
    image, mask = (record.getMessage() for record in caplog.records)
    assert (
        "observation['teammate']['action_mask'], which is an input like the others: the agent may choose any action"
        in mask
    )
    assert "an image, observation['camera'] of shape (36, 48, 3), beside other parts, so it is flattened" in image


def test_an_action_mask_that_a_reset_lacks_is_refused() -> None:
    class MasksLater(contracts.Plain):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], {"action_mask": np.ones(2)}

    with pytest.raises(
        ConfigError, match=r"info\['action_mask'\] must be there from the first reset on .*step of Mask"
    ):
        check_works(made_by(MasksLater), LaneOptions())


def test_a_time_limit_of_steps_that_nobody_keeps_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qfleet"):
        check_works(made_by(contracts.Plain), LaneOptions(step_timeout_seconds=5))
    assert "step_timeout_seconds=5 has no effect without num_env_workers" in caplog.text
