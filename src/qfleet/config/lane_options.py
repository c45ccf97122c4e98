"""How environments outside the compiled program are stepped."""

import dataclasses
import os

from qfleet.config.checks import MAX_PROCESSES, MAX_SECONDS, check_count, check_positive
from qfleet.config.values import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneOptions(Config):
    """How lanes are stepped, and which failures they survive."""

    num_env_workers: int = 0
    """Processes that step environments without threads of their own. With 0, the process that acts steps them."""
    step_timeout_seconds: float = 60.0
    """Longest time that one step or reset may take. A process that takes longer counts as hung and is replaced."""
    max_failures: int = 10
    """Environments that may raise, hang or die before the run fails; until then each is replaced.
    A process that hangs or dies counts as one failure, although all its lanes are lost with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_env_workers", self.num_env_workers, minimum=0, maximum=MAX_PROCESSES)
        check_positive(self, "step_timeout_seconds", maximum=MAX_SECONDS)
        check_count("max_failures", self.max_failures, minimum=0)

    @property
    def lane_options(self) -> "LaneOptions":
        """Only these options, from a config that has other fields too."""
        return LaneOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LaneOptions)})


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
