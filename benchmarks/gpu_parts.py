"""The measurements of `gpu.py` that use qfleet's public interface, and how they keep to their time."""

import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import common

import qfleet

Result = dict[str, Any]

CARTPOLE, BREAKOUT, PONG = "CartPole-v1", "gymnax:Breakout-MinAtar", "ale:Pong"

NEVER = 10**12
"""Number of environment steps that no run reaches."""

NO_TIME: Result = {"skipped": "not enough time left"}


class Sizes(NamedTuple):
    """The sizes of everything that is measured."""

    seconds: float
    """Duration of each measurement, once everything is compiled and warm."""
    envs: tuple[str, ...]
    """Environments written in JAX."""
    lanes: tuple[int, ...]
    """Their numbers of lanes."""
    pong_lanes: tuple[int, ...]
    """Numbers of lanes of Pong."""
    batch_sizes: tuple[int, ...]
    """Batch sizes of the learner alone."""
    frames: int
    """Number of frames in a replay of Atari."""
    network: Mapping[str, Any]
    """Settings that replace those of the presets."""
    breakout: Mapping[str, Any]
    """Settings of the run that must reach a return."""
    pong: Mapping[str, Any]
    """Settings of the run that takes the time that is left."""
    tests: str
    """Which of the tests marked `gpu` to run: what pytest's -k takes."""


FULL = Sizes(
    seconds=3.0,
    envs=(CARTPOLE, BREAKOUT),
    lanes=(4_096, 65_536),
    pong_lanes=(64, 256),
    batch_sizes=(32, 256, 512, 2_048),
    frames=1_000_000,
    network={},
    breakout={"stop_return": 60.0, "eval_period_env_steps": 250_000},
    # The preset explores for a tenth of its 50 million steps. This is a tenth of the steps that there is time for here.
    pong={"exploration_env_steps": 300_000, "eval_period_env_steps": 250_000, "eval_episodes": 8},
    tests="",
)
TINY = Sizes(
    seconds=0.1,
    envs=(CARTPOLE,),
    lanes=(8,),
    pong_lanes=(2,),
    batch_sizes=(4,),
    frames=2_000,
    network={"torso": "mlp", "hidden_sizes": (8,)},
    breakout={"stop_return": 0.0, "num_envs": 8, "eval_period_env_steps": 1_024, "eval_episodes": 2},
    pong={"num_envs": 2, "eval_period_env_steps": 64, "eval_episodes": 1, "env_steps": 64},
    tests="convolution",
)


def device(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields the software and the device that are measured."""
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "gymnax", "ale-py")
    first = jax.devices()[0]
    yield {
        **{package: version_of(package) for package in packages},
        "qfleet": version_of("qfleet"),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "platform": first.platform,
        "device": first.device_kind,
        "num_devices": len(jax.devices()),
        "memory_gb": round((first.memory_stats() or {}).get("bytes_limit", 0) / 1e9, 1) or None,
        "driver": driver_version(),
    }


def rollouts(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields the speed of `pqn`, which has no replay."""
    runs = [{"env": env, "preset": "pqn", "lanes": lanes} for lanes in sizes.lanes for env in sizes.envs]
    return in_turn(runs, functools.partial(speed, sizes), until)


def replay(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields the speed with a prioritised replay, then with a uniform one."""
    order = [(preset, lanes) for preset in ("rainbow_lite", "double_dqn") for lanes in sizes.lanes]
    runs = [{"env": env, "preset": preset, "lanes": lanes} for preset, lanes in order for env in reversed(sizes.envs)]
    return in_turn(runs, functools.partial(speed, sizes), until)


def pong(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields the speed on Atari's Pong, with and without where its time goes for a replay, then without a replay."""
    order = [("atari_dqn", False), ("atari_dqn", True), ("atari_pqn", False)]
    runs = [
        {"env": PONG, "preset": preset, "lanes": lanes, "profile": profile}
        for preset, profile in order
        for lanes in sizes.pong_lanes
    ]
    return in_turn(runs, functools.partial(speed, sizes), until)


def tests(sizes: Sizes, until: float) -> Iterator[Result]:
    """Runs tests marked `gpu` in a process of their own, and yields how many there are."""
    folder = common.HERE.parent / "tests"
    files = [str(file) for file in sorted(folder.rglob("test_*.py")) if "@pytest.mark.gpu\n" in file.read_text()]
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        selection = ["-m", "gpu", "-k", sizes.tests]
        command = [sys.executable, "-m", "pytest", *selection, "-q", "--junitxml", report.name, *files]
        # An empty JAX_PLATFORMS means all platforms, so that tests see the CPU beside the GPU. Nothing is preallocated,
        # because this process already holds three quarters of the GPU's memory.
        variables = os.environ | {"JAX_PLATFORMS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        pipe, timeout = subprocess.PIPE, until - time.monotonic()
        ran = subprocess.run(
            command, cwd=folder.parent, env=variables, timeout=timeout, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        print(ran.stdout)
        if ran.returncode:
            raise RuntimeError(ran.stdout[-2_000:])
        suite = next(xml.etree.ElementTree.parse(report.name).iter("testsuite"))
    yield {"tests": int(suite.attrib["tests"]), "skipped_tests": int(suite.attrib["skipped"])}


def train_breakout(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields how `pqn` reaches a return on MinAtar's Breakout, with the settings tuned on a CPU."""
    return training(qfleet.make_config(BREAKOUT, "pqn", **sizes.network, **sizes.breakout), until)


def train_pong(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields what `atari_pqn` learns on Pong in the time that is left."""
    return training(qfleet.make_config(PONG, "atari_pqn", **sizes.network, **sizes.pong), until)


def in_turn(settings: Iterable[Result], measure: Callable[..., Result], until: float) -> Iterator[Result]:
    """Yields each of the settings together with the result of `measure(**settings, until=until)`.

    If one measurement fails, that is its result, and the others still take place. A measurement is skipped if less time
    is left than half of what the longest one so far took. The longest is usually the first, which warms things up for
    the others.
    """
    longest = 0.0
    for each in settings:
        started = time.monotonic()
        if started + longest / 2 > until:
            yield each | NO_TIME
            continue
        try:
            result = measure(**each, until=until)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        yield each | result
        longest = max(longest, time.monotonic() - started)


def speed(
    sizes: Sizes, env: str, preset: str, lanes: int, *, until: float, profile: bool | None = None
) -> dict[str, Any]:
    """Returns steps/s of a run, and the seconds that it took to compile; with `profile` also how its time is divided.

    Timing begins with the second record after the first learner step, because until then chunks change their length.
    """
    config = config_for(sizes, env, preset, lanes, profile)
    num_learned, env_steps, learner_steps, seconds = 0, 0, 0, 0.0
    with common.scratch() as folder:
        run = qfleet.iterate(dataclasses.replace(config, run_dir=str(Path(folder) / "run")))
        for progress in run:
            if num_learned >= 2:
                env_steps += progress.new_env_steps
                learner_steps += progress.new_learner_steps
                seconds += progress.train_seconds
            num_learned += progress.new_learner_steps > 0
            if seconds >= sizes.seconds or time.monotonic() > until:
                break
    if not seconds:
        return NO_TIME
    return {
        "env_steps_per_second": round(env_steps / seconds),
        "learner_steps_per_second": round(learner_steps / seconds, 1),
        "timed_seconds": round(seconds, 1),
        "compile_seconds": round(run.summary["compile_seconds"], 1),
        **{part: round(share, 3) for part, share in (run.summary["time_shares"] or {}).items()},
    }


def config_for(sizes: Sizes, env: str, preset: str, lanes: int, profile: bool | None) -> qfleet.TrainConfig:
    """Returns a preset with the given number of lanes and the replay ratio that the preset has with its own number."""
    settings = dict(sizes.network) | ({} if profile is None else {"profile": profile})
    agent = qfleet.make_config(env, preset).agent
    if agent.replay != "none":
        batch_size = 4 * lanes
        settings |= {
            "batch_size": batch_size,
            "env_steps_per_learner_step": batch_size / agent.replay_ratio,
            "replay_capacity": sizes.frames if env == PONG else 64 * lanes,
            "warmup_env_steps": 8 * lanes,
            "exploration_env_steps": max(agent.exploration_env_steps, 16 * lanes),
        }
    return qfleet.make_config(
        env,
        preset,
        num_envs=lanes,
        env_steps=NEVER,
        eval_period_env_steps=NEVER,
        checkpoint_replay=False,
        checkpoint_period_seconds=NEVER,
        **settings,
    )


def training(config: qfleet.TrainConfig, until: float) -> Iterator[Result]:
    """Yields a run's evaluations, and at the end the best of them, and how far and how fast the run came.

    The run stops when there may not be enough time for another chunk, which may include an evaluation.
    """
    best, longest, started, before = None, 0.0, time.monotonic(), math.inf
    with common.scratch() as folder:
        run = qfleet.iterate(dataclasses.replace(config, run_dir=str(Path(folder) / "run")))
        for progress in run:
            now = time.monotonic()
            longest, before = max(longest, now - before), now
            if progress.eval_return_mean is not None:
                best = max(progress.eval_return_mean, best or progress.eval_return_mean)
                yield {
                    "env_steps": progress.env_steps,
                    "seconds": round(now - started, 1),
                    "eval_return_mean": round(progress.eval_return_mean, 2),
                }
            if now + 1.5 * longest > until:
                break
    yield {
        "env": config.env,
        "preset": config.preset,
        "wanted_return": config.stop_return,
        "stopped": run.summary["stopped"],
        "best_eval_return": best,
        "env_steps": run.summary["env_steps"],
        "seconds": round(time.monotonic() - started, 1),
        "compile_seconds": round(run.summary["compile_seconds"], 1),
        "env_steps_per_second": round(run.summary["env_steps_per_second"] or 0),
    }


def version_of(package: str) -> str | None:
    """Returns the version of a package, or None if it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver, or None if there is none."""
    if not (command := shutil.which("nvidia-smi")):
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(query, stdout=subprocess.PIPE, text=True).stdout
    return output.splitlines()[0] if output else None
