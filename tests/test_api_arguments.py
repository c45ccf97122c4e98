"""What callers of the public API may hand over, and one clear error for the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

import qfleet
from qfleet.config import ConfigError, TrainConfig


def tiny(run_dir: Path) -> TrainConfig:
    sizes = {"num_envs": 4, "hidden_sizes": (8,), "env_steps": 256, "eval_period_env_steps": 128, "eval_episodes": 5}
    return qfleet.make_config("CartPole-v1", "pqn", run_dir=str(run_dir), **sizes)


@pytest.mark.parametrize("config", ["CartPole-v1", None, {"env": "CartPole-v1"}])
def test_what_is_no_config_is_refused_with_the_way_to_make_one(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"`config` must be a TrainConfig, got .*; make one, as in .*make_config\("):
        qfleet.train(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"env": "CartPole-v1"}, r"`env` must be .* a function that makes a new environment each time, got a str"),
        ({"network": lambda params, obs: obs}, "`network` must be a qfleet.Network, got a function; convert"),
        ({"optimiser": optax.adam}, "`optimiser` must be an optax.GradientTransformation, got <function adam"),
        ({"optimiser": "adam"}, "`optimiser` must be an optax.GradientTransformation, got 'adam'"),
    ],
)
def test_parts_of_another_kind_are_refused_before_a_folder_is_made(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        qfleet.train(tiny(tmp_path / "run"), **given)
    assert not (tmp_path / "run").exists()


def test_a_run_is_found_by_plain_values(tmp_path: Path) -> None:
    qfleet.train(tiny(tmp_path / "run"))
    assert qfleet.load(tmp_path / "run", checkpoint=256.0, seed=np.int64(0)).label == "step256"
    for wrong in ({"checkpoint": "newest"}, {"seed": "0"}, {"checkpoint": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be a whole number"):
            qfleet.load(tmp_path / "run", **wrong)
    with pytest.raises(ConfigError, match="checkpoint must be a whole number or `best`, got 'newest'"):
        qfleet.resume(tmp_path / "run", checkpoint="newest")
    for ask in (qfleet.load, qfleet.resume):
        with pytest.raises(ConfigError, match="run_dir must be text, got 3"):
            ask(3)
