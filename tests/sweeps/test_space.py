"""What `--param` says: ranges and lists of the fields' own kinds, and one clear error for everything else."""

from typing import Any

import pytest

from qfleet.config import AgentConfig, ConfigError, OverlappedConfig, TrainConfig
from qfleet.sweeps.space import Choices, Range, combinations, read_space, texts_of, with_settings

CONFIG = TrainConfig(env="CartPole-v1", agent=AgentConfig(replay_capacity=10_000, warmup_env_steps=100))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("learning_rate", "1e-4..1e-2:log", Range("learning_rate", 1e-4, 1e-2, is_log=True, is_whole=False)),
        ("discount", "0.9..0.99", Range("discount", 0.9, 0.99, is_log=False, is_whole=False)),
        ("batch_size", "8..64:log", Range("batch_size", 8, 64, is_log=True, is_whole=True)),
        ("num_envs", "4..16", Range("num_envs", 4, 16, is_log=False, is_whole=True)),
        ("env_steps", "1e5..2e5", Range("env_steps", 100_000, 200_000, is_log=False, is_whole=True)),
        ("n_step", "1,3,5", Choices("n_step", {"1": 1, "3": 3, "5": 5})),
        ("double", "yes,no", Choices("double", {"yes": True, "no": False})),
        ("loss", "huber, squared", Choices("loss", {"huber": "huber", "squared": "squared"})),
        ("max_gradient_norm", "none,10", Choices("max_gradient_norm", {"none": None, "10": 10})),
        ("hidden_sizes", "[64],[64, 64]", Choices("hidden_sizes", {"[64]": [64], "[64, 64]": [64, 64]})),
    ],
)
def test_a_setting_varies_as_its_text_says(name: str, text: str, expected: Any) -> None:
    assert read_space(CONFIG, {name: text}) == [expected]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"learning_rat": "1e-4..1e-2"}, "Did you mean learning_rate"),
        ({"num_actors": "1,2"}, "num_actors must come with topology actor-learner"),
        ({"seed": "1,2,3"}, "got seed, which is the same in all trials; give --seed"),
        ({"env": "A,B"}, "got env, which is the same in all trials; give ENV for all"),
        ({"stop_return": "1,2"}, "the same in all trials"),
        ({"learning_rate": "1e-2..1e-4"}, "with LOW below HIGH"),
        ({"learning_rate": "1e-4..1e-2:lin"}, "LOW..HIGH:log"),
        ({"learning_rate": "0..1e-2:log"}, "must begin above 0"),
        ({"learning_rate": "a..b"}, "write for example 1e-4..1e-2:log"),
        ({"learning_rate": "-1..1e-2"}, "learning_rate must be"),
        ({"discount": "0.9..1.5"}, "discount must be"),
        ({"n_step": "1.5..3"}, "n_step must be a whole number"),
        ({"n_step": "3"}, "give --n-step"),
        ({"n_step": "1,,3"}, "or a list such as 1,3,5"),
        ({"n_step": "1,3,1.0"}, "must differ from each other"),
        ({"n_step": "1,0"}, "n_step must be"),
        ({"n_step": "1,two"}, "n_step must be a whole number"),
        ({"loss": "huber,square"}, "Did you mean squared"),
        ({"loss": "huber..squared"}, "isn't a number"),
        ({"double": "1..2"}, "isn't a number"),
        ({"rollout_length": "8,16"}, "rollout_length must be left out with replay uniform"),
        ({"n_step": "1,3", "num_envs": "8,4000"}, "replay_capacity must hold"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_the_sweep(params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        read_space(CONFIG, params)


def test_every_combination_of_ends_and_entries_is_checked() -> None:
    """Neither of them is wrong alone."""
    with pytest.raises(ConfigError, match="huber_delta must be left out with loss squared"):
        read_space(CONFIG, {"loss": "huber,squared", "huber_delta": "0.5..2"})


def test_python_lists_are_the_same_as_text() -> None:
    texts = texts_of({"n_step": [1, 3], "double": [True, False], "learning_rate": "1e-4..1e-2:log"})
    assert texts == {"n_step": "1,3", "double": "true,false", "learning_rate": "1e-4..1e-2:log"}
    assert texts_of({"hidden_sizes": [[64], (8, 8)], "loss": ["huber"]}) == {
        "hidden_sizes": "[64],[8, 8]",
        "loss": "huber",
    }


@pytest.mark.parametrize("params", [{}, {"n_step": 3}, {"n_step": {1, 2}}, ["n_step"], {"n_step": [object()]}])
def test_other_python_values_are_refused(params: Any) -> None:
    with pytest.raises(ConfigError, match="must"):
        texts_of(params)


def test_settings_go_where_they_belong() -> None:
    config = TrainConfig(env="gym:CartPole-v1", topology=OverlappedConfig())
    changed = with_settings(config, {"n_step": 3, "num_envs": 4, "env_steps": 70_000})
    assert (changed.agent.n_step, changed.topology.num_envs, changed.env_steps) == (3, 4, 70_000)


def test_lists_have_combinations_and_ranges_have_not() -> None:
    lists = read_space(CONFIG, {"n_step": "1,3", "double": "yes,no"})
    assert combinations(lists) == [
        {"n_step": n_step, "double": double} for n_step in ("1", "3") for double in ("yes", "no")
    ]
    assert combinations([*lists, *read_space(CONFIG, {"discount": "0.9..0.99"})]) is None
