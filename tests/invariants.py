"""What must always hold in a simulated world, and the error that says that it doesn't."""

from typing import Any


class Violation(AssertionError):
    """Something happened that must never happen."""

    def __init__(self, invariant: str, message: str = "") -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant


def require(invariant: str, condition: bool, *facts: Any) -> None:
    """Raises `Violation` unless the condition holds."""
    if not condition:
        raise Violation(invariant, ", ".join(map(str, facts)))
