"""Rules that configs check on construction. Each raises `ConfigError`, which names the rule, the value and the fix."""

import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from qfleet.config.errors import ConfigError, suggest


def check(holds: bool, name: str, rule: str, value: Any) -> None:
    """Raises ConfigError, with the rule that `name` broke, unless the rule holds."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value}")


def check_count(name: str, value: int, minimum: int = 1) -> None:
    """Checks that a value is a whole number of at least `minimum`."""
    check(isinstance(value, int) and value >= minimum, name, f"a whole number, at least {minimum}", value)


def check_counts(config: Any, *names: str, minimum: int = 1) -> None:
    """Checks that these fields of a config are whole numbers of at least `minimum`."""
    for name in names:
        check_count(name, getattr(config, name), minimum)


def check_choices(config: Any) -> None:
    """Checks that every field whose type is a Literal has one of its values."""
    for name, kind in typing.get_type_hints(type(config)).items():
        choices, value = typing.get_args(kind), getattr(config, name)
        if typing.get_origin(kind) is Literal and value not in choices:
            hint = suggest(str(value), choices)
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")


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


def check_ray_address(address: str) -> None:
    """Checks the address of a Ray cluster."""
    check(address in ("auto", "local") or is_host_and_port(address), "ray_address", "auto, local or HOST:PORT", address)


def is_host_and_port(address: str) -> bool:
    """Returns whether an address is HOST:PORT."""
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal()
