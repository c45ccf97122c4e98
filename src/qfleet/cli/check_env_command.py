"""`qfleet check-env NAME`."""

import dataclasses
from collections.abc import Sequence

import tyro

from qfleet.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CheckFlags:
    """Checks that an environment keeps the contract that learning relies on. The exit code is 1 if it doesn't."""

    env: tyro.conf.Positional[str]
    """Name of the environment, as listed by `qfleet envs`."""
    steps: int = 500
    """Steps to take in each of the four lanes."""
    num_env_workers: int = 0
    """Processes that step the environment, if it is one of Gymnasium's."""
    seed: int = 0
    """Seed of the environment and of the random actions."""


def run(arguments: Sequence[str]) -> int:
    """Checks the environment that the flags name."""
    flags = tyro.cli(_CheckFlags, prog="qfleet check-env", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    for name, least in (("steps", 1), ("num_env_workers", 0), ("seed", 0)):
        if getattr(flags, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(flags, name)}")
    from qfleet.envs import conformance
    from qfleet.envs.registry import backend_of, make_env
    from qfleet.runtime.devices import clear_platform_errors

    with clear_platform_errors():
        checks = conformance.check(
            make_env(flags.env), num_steps=flags.steps, seed=flags.seed, num_env_workers=flags.num_env_workers
        )
    print(f"{flags.env} ({backend_of(flags.env)})")
    for found in checks:
        print(f"{'ok  ' if found.is_ok else 'FAIL'} {found.what}{': ' if found.detail else ''}{found.detail}")
    return 0 if all(found.is_ok for found in checks) else 1
