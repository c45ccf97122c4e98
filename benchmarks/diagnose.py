"""Runs made to fail in each way, and healthy runs: what `qfleet diagnose` says of each.

python benchmarks/diagnose.py                          # all runs, in a temporary folder
python benchmarks/diagnose.py --only dead_units        # one of them
python benchmarks/diagnose.py --runs FOLDER            # keeps the runs there, and takes those that are there already
"""

import argparse
import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import qfleet
from qfleet.envs.spec import InGraphEnv, StepResult


class Case(NamedTuple):
    """One run, and what is planted in it."""

    planted: str
    """Name of the finding that should come first; "" for a healthy run."""
    env: str | Callable[[], InGraphEnv]
    preset: str | None = None
    topology: str | None = None
    settings: Mapping[str, Any] = {}
    network: qfleet.Network | None = None
    optimiser: optax.GradientTransformation | None = None


def corridor(length: int) -> InGraphEnv:
    """Returns a corridor whose far end alone pays. A random walk of 100 steps rarely comes further than 25 fields."""
    spec = qfleet.EnvSpec(
        name=f"corridor-{length}", observation_shape=(length,), observation_dtype=np.dtype(np.float32), num_actions=2,
        time_limit=100,
    )  # fmt: skip

    def show(field: jax.Array) -> jax.Array:
        return jax.nn.one_hot(field, length)

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(0), show(jnp.int32(0))

    def step(field: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        field = jnp.clip(field + 2 * action - 1, 0, length - 1)
        is_end = field == length - 1
        return StepResult(field, show(field), is_end.astype(jnp.float32), is_end, jnp.bool_(False))

    return InGraphEnv(spec, reset, step)


def short_corridor() -> InGraphEnv:
    """Returns a corridor of 20 fields: random walks come to its end in one of ten episodes."""
    return corridor(20)


def long_corridor() -> InGraphEnv:
    """Returns a corridor of 80 fields, to whose end no random walk comes."""
    return corridor(80)


def two_states() -> InGraphEnv:
    """Returns two states with the features 1 and 2 and reward 1, visited in turn: 1, then 2, then a time limit.

    Source: Tsitsiklis and Van Roy 1997: with one weight, values grow without limit at discounts above 5/6.
    """
    spec = qfleet.EnvSpec(
        name="two-states", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2, time_limit=2
    )

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(0), jnp.ones(1)

    def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        return StepResult(state + 1, jnp.full(1, 2.0), jnp.float32(1), jnp.bool_(False), jnp.bool_(False))

    return InGraphEnv(spec, reset, step)


ONE_WEIGHT = qfleet.Network(
    init=lambda key: {"w": jnp.ones(1)}, apply=lambda params, obs: jnp.broadcast_to(obs * params["w"], (len(obs), 2))
)

SMALL = {"num_envs": 8, "hidden_sizes": (64, 64), "env_steps": 40_000, "eval_period_env_steps": 4_000}
"""Settings of the planted runs, which take seconds."""

PLANTED = {
    "few learner steps": Case(
        "starved_learner", "CartPole-v1", "dqn", settings={**SMALL, "env_steps_per_learner_step": 2_000.0}
    ),
    "small replay": Case(
        "small_replay", "MountainCar-v0", "dqn",
        settings={**SMALL, "replay_capacity": 512, "env_steps_per_learner_step": 4.0},
    ),
    "short exploration": Case(
        "exploration_ended", short_corridor, "dqn",
        settings={**SMALL, "warmup_env_steps": 100, "exploration_env_steps": 200, "exploration_end": 0.0},
    ),
    "no reward": Case("no_reward", long_corridor, "dqn", settings={**SMALL, "exploration_env_steps": 80_000}),
    "truncation": Case("truncation", "MountainCar-v0", "dqn", settings={**SMALL, "exploration_env_steps": 80_000}),
    "high learning rate": Case("learning_rate", "CartPole-v1", "dqn", settings={**SMALL, "learning_rate": 1.0}),
    "low learning rate": Case("learning_rate", "CartPole-v1", "dqn", settings={**SMALL, "learning_rate": 1e-8}),
    "slow target": Case("target_network", "CartPole-v1", "dqn", settings={**SMALL, "target_update_period": 10**6}),
    "fast target": Case(
        "target_network", "CartPole-v1", "dqn",
        settings={**SMALL, "target_update_period": 1, "env_steps_per_learner_step": 1.0, "discount": 0.999},
    ),
    "dead units": Case("dead_units", "CartPole-v1", "dqn", settings={**SMALL, "learning_rate": 0.05}),
    "exploding values": Case(
        "exploded_values", two_states, "dqn", network=ONE_WEIGHT,
        settings={**SMALL, "discount": 0.9, "optimiser": "sgd", "learning_rate": 0.05, "loss": "squared",
                  "target_update_period": 100},
    ),
    "collapsed values": Case(
        "collapsed_values", "CartPole-v1", "dqn",
        settings={**SMALL, "optimiser": "adamw", "optimiser_options": {"weight_decay": 30.0}},
    ),
}  # fmt: skip

HEALTHY = {
    "pqn, CartPole": Case("", "CartPole-v1", "pqn", settings={"env_steps": 200_000}),
    "pqn, CartPole, 4 seeds": Case("", "CartPole-v1", "pqn", settings={"env_steps": 150_000, "num_seeds": 4}),
    "double_dqn, CartPole": Case("", "CartPole-v1", "double_dqn", settings={"env_steps": 80_000}),
    "dqn, CartPole": Case("", "CartPole-v1", "dqn", settings={"env_steps": 150_000}),
    "rainbow_lite, CartPole": Case("", "CartPole-v1", "rainbow_lite", settings={"env_steps": 80_000}),
    "pqn, Acrobot": Case("", "Acrobot-v1", "pqn", settings={"env_steps": 300_000}),
    "double_dqn, MountainCar": Case("", "MountainCar-v0", "double_dqn", settings={"env_steps": 400_000}),
    "double_dqn, Gymnasium's CartPole, overlapped": Case(
        "", "gymnasium:CartPole-v1", "double_dqn", settings={"env_steps": 60_000}
    ),
    "rainbow_lite, FrozenLake, overlapped": Case("", "FrozenLake-v1", "rainbow_lite", settings={"env_steps": 100_000}),
    "pqn, MinAtar Breakout": Case("", "gymnax:Breakout-MinAtar", "pqn", settings={"env_steps": 600_000}),
    "pqn, CartPole, all-reduce": Case("", "CartPole-v1", "pqn", "all-reduce", {"env_steps": 200_000}),
    "prioritised double_dqn, CartPole, actor-learner": Case(
        "", "CartPole-v1", "double_dqn", "actor-learner",
        {"env_steps": 80_000, "num_actors": 2, "num_replay_shards": 1, "replay": "prioritised"},
    ),
}  # fmt: skip


def main() -> None:
    """Trains what isn't there yet, diagnoses it, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the runs whose names contain this")
    parser.add_argument("--runs", type=Path, help="folder in which runs are kept and found")
    arguments = parser.parse_args()
    logging.basicConfig()
    results = []
    with folder_of(arguments.runs) as root:
        for name, case in (PLANTED | HEALTHY).items():
            if arguments.only in name:
                results.append(result_of(name, case, root / name.replace(" ", "-")))
                print(results[-1], flush=True)
    common.report("diagnose", results)
    planted, healthy = ([r for r in results if bool(r["planted"]) == kind] for kind in (True, False))
    print(f"{sum(r['is_right'] for r in planted)} of {len(planted)} planted faults are named first")
    print(f"{sum(not r['is_right'] for r in healthy)} false alarms on {len(healthy)} healthy runs")


def result_of(name: str, case: Case, run_dir: Path) -> dict[str, Any]:
    """Trains a run, unless it is there, and returns what is said of it."""
    if not (run_dir / "summary.json").exists():
        train(case, run_dir)
    findings, run = qfleet.diagnose(run_dir), qfleet.open_run(run_dir)
    first = findings[0].name if findings else ""
    return {
        "run": name,
        "planted": case.planted,
        "first": first,
        "is_right": first == case.planted,
        "others": " ".join(finding.name for finding in findings[1:]),
        "return": (run.summary or {}).get("eval_return_mean"),
    }


def train(case: Case, run_dir: Path) -> None:
    """Trains a run into `run_dir`. If the values diverge so far that the run fails, that is part of it."""
    config = qfleet.make_config(case.env, case.preset, case.topology, **{**case.settings, "run_dir": str(run_dir)})
    make_env = None if isinstance(case.env, str) else case.env
    with contextlib.suppress(qfleet.RunFailed):
        qfleet.train(config, env=make_env, network=case.network, optimiser=case.optimiser)


@contextlib.contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    """Yields the folder of the runs: the given one, or one that is deleted afterwards."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
