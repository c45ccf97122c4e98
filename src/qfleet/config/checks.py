"""Rules that configs check on construction. Each raises `ConfigError`, which names the rule, the value and the fix."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from qfleet.config.errors import ConfigError
from qfleet.config.values import MAX_FLOAT, show, to_plain

MAX_COUNT = 10**15
"""Largest number of steps. It is exact in float64 too."""

MAX_SIZE = 2**31 - 1
"""Largest size of an array, and largest number of steps that a device counts: both are 32-bit integers."""

MAX_EPISODES = 10**6
"""Largest number of episodes in one evaluation, which plays them all at once."""

MAX_FRAMES_PER_SECOND = 1_000
"""Highest frame rate of a video."""

MAX_SEED = 2**32 - 1
"""Largest seed; a random key is made from a 32-bit integer."""

MAX_PROCESSES = 2**16
"""Largest number of processes or of independent learners."""

MAX_SECONDS = 10**6
"""Longest time that can be waited for, eleven days; the operating system counts milliseconds in 32 bits."""

MIN_POSITIVE = 1.2e-38
"""Smallest positive setting; float32, in which runs compute, holds no smaller one in full precision."""


def check(holds: bool, name: str, rule: str, value: Any) -> None:
    """Raises ConfigError, with the rule that `name` broke, unless the rule holds."""
    if not holds:
        is_word = isinstance(value, str) and 0 < len(value) < 100
        raise ConfigError(f"{name} must be {rule}, got {value if is_word else show(value)}")


def check_count(name: str, value: Any, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
    """Returns a value as an `int`, after checking that it is a whole number from `minimum` to `maximum`."""
    number: int = to_plain(int, value, name)
    check(number >= minimum, name, f"a whole number, at least {minimum}", number)
    check(number <= maximum, name, f"a whole number, at most {maximum}", number)
    return number


def check_checkpoint(checkpoint: Any) -> "int | Literal['best'] | None":
    """Returns which checkpoint is meant: an environment step, "best", or None for the newest."""
    if checkpoint is None or checkpoint == "best":
        return checkpoint
    if isinstance(checkpoint, str):
        raise ConfigError(f"checkpoint must be a whole number or `best`, got {show(checkpoint)}")
    return check_count("checkpoint", checkpoint, minimum=0)


def check_counts(config: Any, *names: str, minimum: int = 1, maximum: int = MAX_COUNT) -> None:
    """Checks that these fields of a config are whole numbers from `minimum` to `maximum`."""
    for name in names:
        check_count(name, getattr(config, name), minimum, maximum)


def check_positive(config: Any, *names: str, maximum: float = MAX_FLOAT, or_none: str = "") -> None:
    """Checks that these fields of a config are positive numbers that float32 holds.

    Args:
      config: the config.
      names: names of the fields.
      maximum: the largest value that is allowed.
      or_none: what None means, such as ", or None for no limit", if None is allowed.
    """
    for name in names:
        value = getattr(config, name)
        if value is None and or_none:
            continue
        check(value > 0, name, f"positive{or_none}", value)
        check(value >= MIN_POSITIVE, name, f"positive, at least {MIN_POSITIVE:g}", value)
        check(value <= maximum, name, f"at most {maximum:g}", value)


def check_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Checks that `value` is a multiple of `divisor`; the error suggests the next multiple."""
    if value % divisor:
        raise ConfigError(
            f"{name} must divide over {divisor_name}, got {name}={value}, {divisor_name}={divisor}; "
            f"try {math.ceil(value / divisor) * divisor}"
        )


def check_resources(name: str, amounts: Mapping[str, float]) -> None:
    """Checks that no amount of a Ray resource is negative."""
    check(all(amount >= 0 for amount in amounts.values()), name, "all at least 0", dict(amounts))


def check_silence(seconds: float) -> None:
    """Checks the number of seconds of silence after which a process counts as lost."""
    check(seconds >= 5, "silence_seconds", "at least 5", seconds)
    check(seconds <= MAX_SECONDS, "silence_seconds", f"at most {MAX_SECONDS}", seconds)


def check_ray_address(address: str, name: str = "ray_address") -> None:
    """Checks the address of a Ray cluster, which is the value of the setting `name`."""
    check(address in ("auto", "local") or is_host_and_port(address), name, "auto, local or HOST:PORT", address)


def check_ray_address_trusted(address: str | None, where: str, flag: str | None, *, trust: bool) -> None:
    """Checks that the user, rather than a file alone, wants this process to join a Ray cluster, which runs code.

    Args:
      address: of the cluster; None if there is none, or if the user has given it.
      where: the file or folder that names it.
      flag: by which the user may give it, if any.
      trust: whether the user trusts what the file names.

    Raises:
      ConfigError: if the address is that of another machine, and isn't trusted.
    """
    if address in (None, "auto", "local") or trust:
        return
    remedy = "give --trust" if flag is None else f"give {flag} {address}, or --trust"
    raise ConfigError(
        f"the address of a Ray cluster that only a file names must be trusted, because a cluster runs code: {where} "
        f"names {address}; if it is yours, {remedy}"
    )


def is_host_and_port(address: str) -> bool:
    """Returns whether an address is HOST:PORT."""
    host, _, port = address.rpartition(":")
    is_port = port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65_535
    return bool(host) and "/" not in host and is_port
