"""What a check says."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from qfleet.config import ConfigError

Verdict = Literal["good", "warn", "bad"]

VERDICTS: tuple[Verdict, ...] = ("good", "warn", "bad")
"""From best to worst. Only what would keep a run from starting, or end it, is bad."""


class Check(NamedTuple):
    """The result of a check."""

    name: str
    verdict: Verdict
    found: str
    """What is there, in words."""
    remedy: str = ""
    """What to do about it, or how to get more. It may be empty."""
    facts: Mapping[str, Any] = {}
    """The same as values that JSON can hold."""


def from_error(name: str, verdict: Verdict, error: ConfigError) -> Check:
    """Returns the check that says what an error of ours says: the rule and the value, and then the remedy."""
    found, _, remedy = str(error).partition("; ")
    return Check(name, verdict, found, remedy)
