"""How environments outside the compiled program step."""

import dataclasses

from qfleet.config.checks import check, check_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneOptions:
    """How lanes run and which failures they survive."""

    num_env_workers: int = 0
    """Processes that step environments which have no threads of their own; 0 steps them in the process that acts."""
    step_timeout_seconds: float = 60.0
    """A process that takes longer over one step or reset counts as hung, and is replaced."""
    max_failures: int = 10
    """Environments that may raise, hang or die before the run fails; each is replaced until then. A process that hangs
    or dies is one failure, though it takes all its lanes with it."""

    def __post_init__(self) -> None:
        check_count("num_env_workers", self.num_env_workers, minimum=0)
        check(self.step_timeout_seconds > 0, "step_timeout_seconds", "positive", self.step_timeout_seconds)
        check_count("max_failures", self.max_failures, minimum=0)

    @property
    def lane_options(self) -> "LaneOptions":
        """These options alone, where a config has them among other fields."""
        return LaneOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LaneOptions)})
