"""What constructors accept: plain values, which a run's record gives back as what they were."""

import enum
import json
import os
import pathlib
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from random_settings import random_config

from qfleet.config import (
    ActorLearnerConfig,
    AgentConfig,
    ConfigError,
    FusedConfig,
    GossipConfig,
    LaneOptions,
    MeshConfig,
    OverlappedConfig,
    TopologyConfig,
    TrainConfig,
)
from qfleet.config.checks import MAX_COUNT, MAX_EPISODES, MAX_SIZE
from qfleet.config.encoding import decode, encode
from qfleet.config.values import show

NUM_EXAMPLES = int(os.environ.get("QFLEET_TEST_CONFIGS", "100"))
"""Number of random configs; 5,000 take a minute."""


class Flavour(str, enum.Enum):  # noqa: UP042, an enum of the kind that prints as its name
    ADAM = "adam"


def run(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"env": "CartPole-v1", **settings})


@pytest.mark.parametrize(
    ("make", "name", "value", "expected"),
    [
        (AgentConfig, "learning_rate", np.float64(1e-3), 1e-3),
        (AgentConfig, "learning_rate", np.float32(0.5), 0.5),
        (AgentConfig, "learning_rate", jnp.float32(0.5), 0.5),
        (AgentConfig, "learning_rate", Fraction(1, 4), 0.25),
        (AgentConfig, "max_gradient_norm", 10, 10.0),
        (AgentConfig, "max_gradient_norm", None, None),
        (AgentConfig, "hidden_sizes", (np.int64(64), 32.0), (64, 32)),
        (AgentConfig, "hidden_sizes", [64], (64,)),
        (AgentConfig, "hidden_sizes", np.array([64, 32]), (64, 32)),
        (AgentConfig, "double", np.bool_(True), True),
        (AgentConfig, "optimiser", Flavour.ADAM, "adam"),
        (AgentConfig, "loss", np.str_("squared"), "squared"),
        (AgentConfig, "optimiser_options", {"nesterov": True, "momentum": 0.9}, {"nesterov": True, "momentum": 0.9}),
        (MeshConfig, "data", np.int32(2), 2),
        (LaneOptions, "max_failures", 1e1, 10),
        (run, "run_dir", pathlib.Path("a") / "b", "a/b"),
        (run, "env_steps", np.int64(3_000), 3_000),
        (run, "env_steps", 1e5, 100_000),
        (run, "seed", np.uint32(7), 7),
        (run, "num_seeds", np.int8(2), 2),
        (run, "stop_return", np.int64(475), 475.0),
        (run, "env_options", {"is_slippery": np.False_, "n": np.int64(50)}, {"is_slippery": False, "n": 50}),
        (run, "env_options", {"desc": ("SF", "HG"), "x": None}, {"desc": ["SF", "HG"], "x": None}),
        (run, "env_options", {"config": {"lanes": 3, "v": np.eye(1)}}, {"config": {"lanes": 3, "v": [[1.0]]}}),
        (run, "env_options", {"map_name": "8x8", "p": 1.0}, {"map_name": "8x8", "p": 1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or show(value),  # the same in every process
)  # fmt: skip
def test_values_are_brought_to_plain_python(make: Any, name: str, value: Any, expected: Any) -> None:
    found = getattr(make(**{name: value}), name)
    assert repr(found) == repr(expected)  # the types are the same too


@pytest.mark.parametrize(
    ("make", "name", "value", "message"),
    [
        (AgentConfig, "double", "no", "double must be True or False, got 'no'; give False"),
        (AgentConfig, "double", 1, "double must be True or False, got 1; give True"),
        (AgentConfig, "double", None, "double must be True or False, got None; leave it out for the default, False"),
        (AgentConfig, "n_step", True, "n_step must be a whole number, got True; give 1"),
        (AgentConfig, "n_step", 2.5, "n_step must be a whole number, got 2.5; give 2 or 3"),
        (AgentConfig, "batch_size", "5_000", "batch_size must be a whole number, got '5_000'; give 5000 without"),
        (AgentConfig, "learning_rate", "1e-3", "learning_rate must be a number, got '1e-3'; give 0.001 without"),
        (AgentConfig, "learning_rate", "high", "learning_rate must be a number, got 'high'; leave it out"),
        (AgentConfig, "learning_rate", np.nan, "learning_rate must be finite, got nan; leave it out"),
        (AgentConfig, "learning_rate", 1e300, r"learning_rate must be at most 3.4e\+38 in magnitude, got 1e\+300"),
        (AgentConfig, "learning_rate", 1e-300, r"learning_rate must be positive, at least 1.2e-38, got 1e-300"),
        (AgentConfig, "max_gradient_norm", 0.0, "max_gradient_norm must be positive, or None to leave gradients alone"),
        (OverlappedConfig, "num_envs", 2**31, "num_envs must be a whole number, at most 2147483647, got 2147483648"),
        (GossipConfig, "ray_address", "host:99999", "ray_address must be auto, local or HOST:PORT, got host:99999"),
        (ActorLearnerConfig, "num_actors", 10**6, "num_actors must be a whole number, at most 65536, got 1000000"),
        (AgentConfig, "hidden_sizes", 64, r"hidden_sizes must be a tuple, .*, got 64; give \(64,\)"),
        (AgentConfig, "hidden_sizes", (64, "x"), r"hidden_sizes\[1\] must be a whole number, got 'x'"),
        (AgentConfig, "hidden_sizes", (0,), r"hidden_sizes\[0\] must be a whole number, at least 1, got 0"),
        (AgentConfig, "loss", "hubber", "loss must be one of squared, huber, got 'hubber'. Did you mean huber"),
        (AgentConfig, "optimiser_options", {"eps": np.inf}, r"optimiser_options\[eps\] must be finite, got inf"),
        (AgentConfig, "optimiser_options", {"mask": len}, r"optimiser_options\[mask\] must be a number, True"),
        (MeshConfig, "data", "2", "data must be a whole number, got '2'; give 2 without quotation marks"),
        (LaneOptions, "step_timeout_seconds", 1e9, r"step_timeout_seconds must be at most 1e\+06, got 1000000000.0"),
        (FusedConfig, "mesh", {"data": 2}, "mesh must be of class MeshConfig, got {'data': 2}"),
        (run, "env", 3, "env must be text, got 3"),
        (run, "agent", None, "agent must be of class AgentConfig, got None"),
        (run, "stop_return", float("nan"), "stop_return must be finite, got nan; leave it out for the default, None"),
        (run, "run_dir", "", "run_dir must be the path of a folder, got ''"),
        (run, "env_steps", 10**400, "env_steps must be .* at most 1000000000000000, got a whole number of about 401"),
        (run, "env_steps", 10**5_000, "got a whole number of about 5001 digits"),
        (run, "eval_episodes", 2**64, f"eval_episodes must be a whole number, at most {MAX_EPISODES}, got"),
        (run, "env_options", {1: 2}, "the names in env_options must be text, got 1; put it in quotation marks"),
        (run, "env_options", {"x": [{"y": {3}}]}, r"env_options\[x\]\[0\]\[y\] must be a number, .* got \{3\}"),
        (run, "env_options", {"x" * 5_000: {3}}, r"env_options\['x+ \.\.\. \(5002 characters\)\] must be a number"),
        (run, "env_options", [], "env_options must be a mapping of names to values, got \\[\\]"),
        (run, "env_options", {"x": 2**64}, r"env_options\[x\] must be a whole number of at most 64 bits, got"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or show(value),  # the same in every process
)  # fmt: skip
def test_other_values_are_refused_with_field_value_and_remedy(make: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make(**{name: value})
    assert len(str(raised.value)) < 400


def test_an_option_within_itself_is_refused() -> None:
    options: dict[str, Any] = {}
    options["self"] = options
    with pytest.raises(ConfigError, match="nested at most 16 deep"):
        run(env_options=options)


def test_a_config_does_not_change_with_the_mapping_that_it_was_made_from() -> None:
    options = {"sizes": [1]}
    config = run(env_options=options)
    options["sizes"].append(2)
    assert config.env_options == {"sizes": [1]}


@pytest.mark.parametrize("seed", range(0, NUM_EXAMPLES, 50))
def test_every_config_comes_back_from_json_as_it_was(seed: int) -> None:
    for number in range(seed, min(seed + 50, NUM_EXAMPLES)):
        config = random_config(number)
        back = decode(json.loads(json.dumps(encode(config), allow_nan=False)))
        assert back == config and repr(back) == repr(config)  # 1, 1.0 and True are equal, but print as what they are


def test_the_bounds_of_counts_hold_wherever_they_are_reached() -> None:
    config = run(env_steps=MAX_COUNT, agent=AgentConfig(env_steps_per_learner_step=1e-3, target_update_period=MAX_SIZE))
    assert config.env_steps / config.agent.env_steps_per_learner_step < 2**63
    for name in ("env_steps", "eval_period_env_steps", "video_period_env_steps", "checkpoints_kept"):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number, at most {MAX_COUNT}, got"):
            run(**{name: MAX_COUNT + 1})
    for name in ("n_step", "batch_size", "replay_capacity", "target_update_period", "num_epochs", "num_minibatches"):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number, at most {MAX_SIZE}, got"):
            AgentConfig(**{name: 2**53 + 1})
    with pytest.raises(ConfigError, match="env_steps_per_learner_step must be 0.001 to .*, got 1e-09"):
        AgentConfig(env_steps_per_learner_step=1e-9)


def test_a_remedy_for_minibatches_is_found_at_once() -> None:
    agent = AgentConfig(replay="none", num_minibatches=MAX_SIZE, rollout_length=2**20)
    with pytest.raises(ConfigError, match=f"try {2**30}"):
        run(agent=agent, topology=FusedConfig(num_envs=2**10))


@pytest.mark.parametrize("rate", [0.005, np.float32(0.5), np.array(0.1)])
def test_a_rate_of_target_updates_below_1_needs_a_period(rate: float) -> None:
    with pytest.raises(ConfigError, match="give target_update_period=1"):
        AgentConfig(target_update_rate=rate)
    assert AgentConfig(target_update_rate=rate, target_update_period=500).target_update_period == 500
    assert AgentConfig().target_update_period == AgentConfig(target_update_rate=1).target_update_period == 500


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("nothing to say")


@pytest.mark.parametrize(
    ("name", "value"),
    [("double", Unspeakable()), ("loss", Unspeakable()), ("double", 10**5_000)],
    ids=["flag", "word", "number"],
)
def test_a_value_that_cannot_be_shown_is_refused_like_any_other(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*, got a "):
        AgentConfig(**{name: value})


def test_only_classes_that_a_folder_can_name_are_parts_of_a_run() -> None:
    class Mine(FusedConfig):
        pass

    for settings in (
        {"topology": Mine()},
        {"topology": TopologyConfig()},
        {"agent": type("Own", (AgentConfig,), {})()},
    ):
        with pytest.raises(ConfigError, match="must be of a class of qfleet, which config.json can hold, got"):
            run(**settings)
