"""Small all-reduce runs for tests, and the processes that take part in them."""

from pathlib import Path

import jax
from other_processes import command_of

import qfleet

SETTINGS = {"env_steps": 4096, "eval_period_env_steps": 2048, "eval_episodes": 8}


def config_for(run_dir: Path, num_processes: int, env: str = "CartPole-v1", preset: str = "pqn", **settings):
    settings = {**SETTINGS, "run_dir": str(run_dir), "silence_seconds": 120, **settings}
    return qfleet.make_config(env, preset, "all-reduce", num_processes=num_processes, **settings)


def params_of(run_dir: Path):
    return jax.tree.leaves(jax.device_get(qfleet.load(run_dir).params))


def peers_of(run_dir: Path) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if "qfleet.cli.peer" in command_of(pid) and str(run_dir) in command_of(pid)]
