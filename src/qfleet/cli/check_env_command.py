"""`qfleet check-env NAME`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from qfleet.cli.flag_types import FLAG_TYPES, check_given_once
from qfleet.config.checks import MAX_PROCESSES, MAX_SEED, MAX_SIZE, check_count
from qfleet.config.values import to_plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CheckFlags:
    """Checks that an environment keeps the contract that learning relies on. The exit code is 1 if it doesn't."""

    env: tyro.conf.Positional[str]
    """Name of the environment, as listed by `qfleet envs`."""
    steps: int = 500
    """Steps to take in each of the four lanes."""
    num_env_workers: int = 0
    """Processes that step the environment, if it is one of Gymnasium's."""
    env_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the function that makes the environment, as for `qfleet train`."""
    seed: int = 0
    """Seed of the environment and of the random actions."""


def run(arguments: Sequence[str]) -> int:
    """Checks the environment that the flags name."""
    check_given_once("--env-options", arguments)
    flags = tyro.cli(_CheckFlags, prog="qfleet check-env", args=list(arguments), registry=FLAG_TYPES)
    check_count("steps", flags.steps, maximum=MAX_SIZE)
    check_count("num_env_workers", flags.num_env_workers, minimum=0, maximum=MAX_PROCESSES)
    check_count("seed", flags.seed, minimum=0, maximum=MAX_SEED)
    options = to_plain(Mapping[str, Any], flags.env_options, "env_options")
    from qfleet.runtime.signals import interrupts_held_back

    with interrupts_held_back():
        from qfleet.envs import conformance
        from qfleet.envs.registry import backend_of, make_env
        from qfleet.runtime.devices import clear_platform_errors

    with clear_platform_errors():
        checks = conformance.check(
            make_env(flags.env, **options),
            num_steps=flags.steps,
            seed=flags.seed,
            num_env_workers=flags.num_env_workers,
        )
    print(f"{flags.env} ({backend_of(flags.env)})")
    for found in checks:
        print(f"{'ok  ' if found.is_ok else 'FAIL'} {found.what}{': ' if found.detail else ''}{found.detail}")
    return 0 if all(found.is_ok for found in checks) else 1
