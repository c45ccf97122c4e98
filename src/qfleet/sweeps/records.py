"""What is known of the trials of a sweep."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WARMUP_SHARE = 0.25
"""Share of a trial's evaluations before which it isn't stopped early: what learns slowly at first may learn most."""


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """What is known of a trial."""

    number: int
    """From 0 on, which is also the name of its run's folder."""
    state: str
    """"complete", "pruned" if it was stopped early, "failed", or "under way"."""
    settings: Mapping[str, Any]
    """Values of the settings that vary."""
    texts: Mapping[str, str]
    """The same as text, as in the list that they come from."""
    value: float | None
    """Mean return of its last evaluation, over all seeds and episodes; None if it failed or is under way."""
    error: str = ""
    """Why it failed."""


def best_first(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Returns the complete trials with the best first, then those stopped early, those that failed, and the others."""
    order = ["complete", "pruned", "failed", "under way"]
    return sorted(
        records,
        key=lambda each: (order.index(each.state), -(each.value if each.value is not None else -math.inf), each.number),
    )


def bests_so_far(records: Sequence[TrialRecord]) -> Iterator[tuple[int, float]]:
    """Yields for each complete trial, in their order, its number and the best value until then."""
    best = -math.inf
    for record in records:
        if record.state == "complete" and record.value is not None:
            best = max(best, record.value)
            yield record.number, best


def best_of(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Returns the best complete trial, if any is complete."""
    return next((record for record in best_first(records) if record.state == "complete"), None)
