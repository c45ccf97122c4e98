"""What is found wrong with runs, from their metrics: each fault alone, first among others, and none in healthy runs."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from qfleet.config import AgentConfig, FusedConfig, GossipConfig, TrainConfig
from qfleet.runtime import diagnosis
from qfleet.runtime.diagnosis import Finding

EVALUATIONS = 10


def config_of(num_envs: int = 8, **agent: Any) -> TrainConfig:
    settings = {"discount": 0.99, "exploration_env_steps": 10_000, "warmup_env_steps": 1_000} | agent
    return TrainConfig(
        env="written", agent=AgentConfig(**settings), topology=FusedConfig(num_envs=num_envs), env_steps=100_000
    )


def written(**changed: Any) -> dict[str, np.ndarray]:
    """Returns the metrics of a healthy run of 100,000 steps with an evaluation at every second record.

    Each metric may be replaced: by one number, or by one for each record.
    """
    time = np.linspace(0.05, 1.0, 2 * EVALUATIONS)
    is_evaluation = np.arange(len(time)) % 2 == 1

    def evaluated(values: Any) -> np.ndarray:
        return np.where(is_evaluation, values, np.nan)

    columns: dict[str, Any] = {
        "env_steps": (1e5 * time).astype(int), "wall_seconds": 10 * time, "learner_steps": np.round(1e4 * time),
        "num_episodes": np.full(len(time), 50.0), "episode_return_mean": 20 + 180 * time,
        "episode_length_mean": 20 + 180 * time, "q_mean": 10 + 60 * time, "loss": 1 / time, "td_error_mean": 1 / time,
        "exploration": np.maximum(1 - 10 * time, 0.05), "eval_return_mean": evaluated(20 + 480 * time),
        "eval_value_mean": evaluated(10 + 80 * time), "eval_discounted_return_mean": evaluated(20 + 70 * time),
        "eval_truncated_fraction": evaluated(time), "dead_units_fraction": evaluated(0.3),
        "update_ratio": evaluated(3e-4), "replay_size": evaluated(np.minimum(1e5 * time, 1e5)),
        "reward_abs_max": evaluated(1.0), "truncated_fraction": evaluated(0.0),
    }  # fmt: skip
    return {name: np.broadcast_to(values, len(time)) for name, values in (columns | changed).items()}


NOT_LEARNING = {"episode_return_mean": 20.0, "episode_length_mean": 20.0, "eval_return_mean": 20.0,
                "eval_discounted_return_mean": 18.0, "eval_value_mean": 15.0}  # fmt: skip
TRUNCATED = {"episode_return_mean": -200.0, "episode_length_mean": 200.0, "eval_return_mean": -200.0,
             "eval_discounted_return_mean": -87.0, "eval_value_mean": -60.0, "eval_truncated_fraction": 1.0,
             "truncated_fraction": 1.0}  # fmt: skip
NO_REWARD = {"episode_return_mean": 0.0, "eval_return_mean": 0.0, "reward_abs_max": 0.0, "eval_value_mean": 0.0,
             "eval_discounted_return_mean": 0.0, "eval_truncated_fraction": 1.0, "truncated_fraction": 1.0}  # fmt: skip


def found(metrics: dict[str, np.ndarray], config: TrainConfig | None = None) -> list[Finding]:
    return diagnosis.diagnose(metrics, config or config_of(), {})


def names(metrics: dict[str, np.ndarray], config: TrainConfig | None = None) -> list[str]:
    return [finding.name for finding in found(metrics, config)]


def test_a_healthy_run_gives_no_finding() -> None:
    assert names(written()) == []


def test_a_run_that_does_not_learn_for_no_reason_that_can_be_seen_gives_no_finding() -> None:
    assert names(written(**NOT_LEARNING)) == []


@pytest.mark.parametrize("metrics", [{}, {"env_steps": 0}], ids=["before the first record", "one record"])
def test_a_run_that_has_hardly_begun_gives_no_finding(metrics: dict[str, Any]) -> None:
    length = 1 if metrics else 0
    assert names({"env_steps": np.zeros(length, int), "wall_seconds": np.zeros(length)}) == []


def test_what_was_not_measured_is_not_spoken_of() -> None:
    """Such as the run of an older version: nothing beside the evaluations' returns was measured."""
    new = ("eval_value", "eval_disc", "eval_trunc", "dead_", "update_", "replay_", "reward_", "truncated_")
    metrics = {name: values for name, values in written(**NOT_LEARNING).items() if not name.startswith(new)}
    assert names(metrics) == []


FAULTS: list[tuple[str, dict[str, Any], dict[str, Any], float, float]] = [
    ("starved_learner", NOT_LEARNING, {"warmup_env_steps": 100_000}, 0.0, 0.25),
    ("starved_learner", NOT_LEARNING, {"env_steps_per_learner_step": 1_000.0}, 0.127, 0.25),
    ("starved_learner", {**NOT_LEARNING, "learner_steps": np.linspace(50, 990, 20)}, {}, 0.1, 0.5),
    ("small_replay", NOT_LEARNING, {"replay_capacity": 128}, 16, 20),
    ("exploration_ended", NO_REWARD, {}, 10_000, 100_000),
    ("no_reward", {**NO_REWARD, "exploration": np.linspace(1, 0.5, 20)}, {}, 0, 0),
    ("truncation", TRUNCATED, {}, 1.0, 0.95),
    ("learning_rate", {**NOT_LEARNING, "update_ratio": 1.0}, {}, 500, 10),
    ("learning_rate", {**NOT_LEARNING, "update_ratio": 1e-8}, {}, 1e-4, 0.01),
    ("target_network", NOT_LEARNING, {"target_update_period": 5_000}, 1.98, 5),
    ("target_network", NOT_LEARNING, {"target_update_period": 1}, 1, 10),
    ("dead_units", {**NOT_LEARNING, "dead_units_fraction": 0.9}, {}, 0.9, 0.8),
    ("exploded_values", {**NOT_LEARNING, "eval_value_mean": 1e4}, {}, 1e4, 300),
    ("collapsed_values", {**NOT_LEARNING, "eval_value_mean": 0.18}, {}, 0.01, 0.1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "metrics", "agent", "figure", "threshold"), FAULTS)
def test_each_fault_is_named_first_with_its_figure_and_its_threshold(
    name: str, metrics: dict[str, Any], agent: dict[str, Any], figure: float, threshold: float
) -> None:
    first = found(written(**metrics), config_of(**agent))[0]
    assert first.name == name
    assert first.figure == pytest.approx(figure, rel=0.02)
    assert first.threshold == pytest.approx(threshold, rel=0.02)
    assert first.sentence and first.source and first.knob


def test_causes_come_before_what_they_explain() -> None:
    findings = found(
        written(**NOT_LEARNING | {"update_ratio": 1.0, "eval_value_mean": 1e4, "dead_units_fraction": 0.9})
    )
    assert [finding.name for finding in findings] == ["learning_rate", "dead_units", "exploded_values"]


@pytest.mark.parametrize(
    ("metrics", "agent"),
    [
        ({}, {"replay_capacity": 128}),
        ({}, {"target_update_period": 1}),
        ({"eval_truncated_fraction": 1.0, "truncated_fraction": 1.0}, {}),
        ({}, {"env_steps_per_learner_step": 1_000.0}),
    ],
    ids=["small replay", "fast target", "all truncated", "few learner steps"],
)
def test_what_may_be_right_is_not_spoken_of_in_a_run_that_learns(
    metrics: dict[str, Any], agent: dict[str, Any]
) -> None:
    assert names(written(**metrics), config_of(**agent)) == []


def test_a_reward_before_the_end_of_exploration_is_no_finding() -> None:
    """The first reward came at 5,000 steps; exploration ended at 10,000, and later episodes got nothing."""
    rewards = {**NO_REWARD, "episode_return_mean": np.r_[0.1, np.zeros(19)]}
    assert "exploration_ended" not in names(written(**rewards))
    later = {**NO_REWARD, "episode_return_mean": np.r_[np.zeros(19), 0.1]}
    assert names(written(**later))[0] == "exploration_ended"


def test_an_agent_without_a_replay_has_none_that_is_too_small_and_no_target_network() -> None:
    config = config_of(replay="none", replay_capacity=1, target_update_period=1)
    assert names(written(**NOT_LEARNING, learner_steps=0.0), config) == []


def test_a_learner_that_is_behind_at_the_beginning_is_not_starved() -> None:
    """Of 1,900 learner steps that are due by now, a tenth has been taken."""
    metrics = written(**NOT_LEARNING, learner_steps=np.linspace(10, 190, 20)) | {"env_steps": np.arange(1, 21) * 1_000}
    assert names(metrics) == []


def test_peers_that_share_the_learner_steps_are_not_starved() -> None:
    """Each of four peers takes a quarter of 10,000 learner steps, and has a target network of its own."""
    config = dataclasses.replace(config_of(), topology=GossipConfig(num_processes=4, num_envs=8))
    assert names(written(**NOT_LEARNING, learner_steps=np.linspace(100, 2_475, 20)), config) == ["target_network"]
    (finding,) = found(written(**NOT_LEARNING, learner_steps=np.linspace(100, 2_475, 20)), config)
    assert finding.figure == pytest.approx(2_475 / 500, rel=0.01)


def test_without_a_known_reward_values_are_held_against_returns() -> None:
    """No return is above 20, so no value can be beyond 20 / (1 - 0.99) = 2,000."""
    (finding,) = found(written(**NOT_LEARNING | {"reward_abs_max": np.nan, "eval_value_mean": 6_001.0}))
    assert finding.threshold == pytest.approx(6_000)
    assert names(written(**NOT_LEARNING | {"reward_abs_max": np.nan, "eval_value_mean": 5_999.0})) == []


def test_a_discount_of_one_bounds_no_value() -> None:
    assert names(written(**NOT_LEARNING | {"eval_value_mean": 1e4}), config_of(discount=1.0)) == []


def test_no_number_of_a_finding_is_unknown() -> None:
    for _, metrics, agent, _, _ in FAULTS:
        for finding in found(written(**metrics), config_of(**agent)):
            assert math.isfinite(finding.figure) and math.isfinite(finding.threshold)


def test_a_run_that_ended_with_values_that_are_no_numbers_has_exploded() -> None:
    error = "the loss must be finite, but it wasn't by learner step 300: the values diverged; try a lower ..."
    (finding,) = diagnosis.diagnose(written(**NOT_LEARNING), config_of(), {"stopped": "failed", "error": error})
    assert finding.name == "exploded_values"
    assert diagnosis.diagnose(written(**NOT_LEARNING), config_of(), {"stopped": "failed", "error": "a full disk"}) == []


def test_an_early_lucky_agent_has_not_learned() -> None:
    """An untrained network may keep a pole up for a while. With 19 learner steps, that is luck."""
    agent = {"env_steps_per_learner_step": 5_000.0}
    assert names(written(learner_steps=np.linspace(1, 19, 20)), config_of(**agent))[0] == "starved_learner"


def test_values_that_the_target_network_can_not_have_carried_yet_have_not_collapsed() -> None:
    """Rewards of 1 and two updates of the target network: values are 3 at most, whatever the returns."""
    slow = {"target_update_period": 4_000, "exploration_env_steps": 100_000}
    metrics = written(**NOT_LEARNING | {"eval_value_mean": 1.0, "eval_discounted_return_mean": 90.0})
    assert names(metrics, config_of(**slow)) == ["target_network"]


def test_figures_are_shown_without_exponents_where_people_read_them() -> None:
    numbers = (40_064, 500.0, 0.0703125, 0.0, 1.757e8, 3e20)
    assert [diagnosis.shown(number) for number in numbers] == ["40,064", "500", "0.07031", "0", "175,700,000", "3e+20"]
