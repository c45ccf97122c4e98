"""What is measured beside evaluations: the numbers, and that training doesn't notice."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfleet
from qfleet.runtime.evaluation import Episodes
from qfleet.training.measuring import UpdateSizes, episode_measures


def topology(params: Any, learner_steps: int) -> Any:
    return SimpleNamespace(params=params, learner_steps=learner_steps)


def test_the_update_ratio_is_the_change_per_learner_step_and_per_norm() -> None:
    """From (3, 4), of norm 5, to (3, 6) in four steps: 2 / 5 / 4."""
    sizes = UpdateSizes()
    sizes.begin(topology({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}, 10))
    moved = topology({"a": jnp.array([3.0]), "b": jnp.array([[6.0]])}, 14)
    sizes.begin(moved)  # only the first one counts
    assert sizes.measure(moved) == {"update_ratio": pytest.approx(0.1)}
    assert sizes.measure(moved) == {}  # no further learner step
    again = topology({"a": jnp.array([3.0]), "b": jnp.array([[6.0]])}, 15)
    assert sizes.measure(again) == {"update_ratio": 0.0}


def test_the_copy_of_the_parameters_is_one() -> None:
    params = jnp.ones(3)
    sizes = UpdateSizes()
    sizes.begin(topology(params, 0))
    changed = jax.jit(lambda x: x + 1, donate_argnums=0)(params)  # the old ones are gone
    assert sizes.measure(topology(changed, 1)) == {"update_ratio": pytest.approx(1.0)}


def test_what_episodes_do_not_tell_is_absent() -> None:
    ones = np.ones((1, 2))
    assert episode_measures(Episodes(ones, ones, ones, ones > 1)) == {}
    told = Episodes(ones, ones, ones, ones > 1, ones > 0, ones * [1, 3], ones * [2, 6], ones * np.nan)
    assert episode_measures(told) == {
        "eval_truncated_fraction": 0.0, "eval_value_mean": 2.0, "eval_discounted_return_mean": 4.0
    }  # fmt: skip


MEASURES = {
    "eval_value_mean", "eval_discounted_return_mean", "eval_truncated_fraction", "dead_units_fraction", "update_ratio",
    "replay_size", "replay_age_mean", "reward_abs_max", "truncated_fraction", "priority_mean", "priority_max",
}  # fmt: skip


def trained(run_dir: Path, env: str, period: int, **settings: Any) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Returns the parameters of a tiny run, and its records with an evaluation."""
    config = qfleet.make_config(
        env, "rainbow_lite", num_envs=4, hidden_sizes=(8, 8), batch_size=8, replay_capacity=512,
        warmup_env_steps=64, env_steps=512, eval_period_env_steps=period, eval_episodes=4, run_dir=str(run_dir),
        checkpoint_replay=False, **settings,
    )  # fmt: skip
    qfleet.train(config)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    params = jax.tree.leaves(qfleet.load(run_dir).params)
    return [np.asarray(leaf) for leaf in params], [r for r in records if r["eval_return_mean"] is not None]


@pytest.mark.parametrize("env", ["CartPole-v1", "gymnasium:CartPole-v1"])
def test_a_run_measures_all_and_learns_the_same_bit_for_bit(tmp_path: Path, env: str) -> None:
    """The reference is a run whose parameters are first looked at when it is over."""
    lock_step = {"lock_step": True} if ":" in env else {}
    params, records = trained(tmp_path / "measured", env, 128, **lock_step)
    reference, (last,) = trained(tmp_path / "reference", env, 512, **lock_step)
    for mine, others in zip(params, reference, strict=True):
        np.testing.assert_array_equal(mine, others)
    assert len(records) == 4
    for record in [*records, last]:
        assert set(record) >= MEASURES
        assert all(math.isfinite(record[name]) for name in MEASURES)
    assert [record["replay_size"] for record in records] == [128, 256, 384, 512]
    assert records[-1]["reward_abs_max"] == 1.0 and records[-1]["truncated_fraction"] == 0.0
    assert 0 < records[-1]["update_ratio"] < 1
