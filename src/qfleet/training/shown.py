"""How a run is shown where somebody looks at it: as text, and in a notebook as a bar of progress with a curve."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

from qfleet.config import TrainConfig
from qfleet.runtime.activity import announced_to
from qfleet.runtime.notebook import Curve, NotebookView, is_notebook, run_html
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import RunDirectory
from qfleet.training.leaving import closed_at_exit


class ShownRun:
    """Base class of runs under way."""

    config: TrainConfig
    directory: RunDirectory
    summary: dict[str, Any]
    _is_under_way = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._title} in {self.directory.path}: {self._state}>"

    def _repr_html_(self) -> str:
        """Returns what a notebook shows of the run: config, state, returns, and what to do next."""
        config, env_steps = self.config, int(self.summary.get("env_steps") or 0)
        curve = Curve.of(self.directory.metrics_path)
        if not self.summary:
            newest = [line[-1][0] for line in curve.lines.values()]
            env_steps = int(max(newest, default=0))
        details = f"{env_steps:,} of {config.env_steps:,} environment steps, in {self.directory.path}"
        mean_return = self.summary.get("eval_return_mean")
        if mean_return is not None:
            details = f"mean greedy return {mean_return:.1f}, {details}"
        completed = 1.0 if self.summary.get("stopped") == "return reached" else min(1.0, env_steps / config.env_steps)
        return run_html(self._title, self._state, completed=completed, details=details, curve=curve, after=self._next)

    @property
    def _title(self) -> str:
        config = self.config
        several = config.num_seeds > 1
        seeds = f"seeds {config.seeds[0]} to {config.seeds[-1]}" if several else f"seed {config.seed}"
        return f"{config.env} with {config.preset}, {config.topology.name}, {seeds}"

    @property
    def _state(self) -> str:
        if self.summary:
            error = self.summary.get("error")
            return f"stopped: {self.summary['stopped']}" + (f", {error}" if error else "")
        return "under way" if self._is_under_way else "not begun"

    @property
    def _next(self) -> str:
        path = str(self.directory.path)
        if not self.summary:
            return "" if self._is_under_way else "for progress in run: ..."
        if self.summary["stopped"] in ("interrupted", "failed"):
            return f"for progress in qfleet.resume({path!r}): ..."
        longer = f"for progress in qfleet.resume({path!r}, env_steps={2 * self.config.env_steps}): ..."
        return f"qfleet.load({path!r}).evaluate()\n{longer}"

    def _shown(self, train: Callable[[], Generator[Progress, None, None]]) -> Iterator[Progress]:
        """Returns the iterator over the run, which `train` makes. In a notebook, it also shows the run's progress."""
        return closed_at_exit(self._with_view(train) if is_notebook() else train())

    def _with_view(self, train: Callable[[], Generator[Progress, None, None]]) -> Generator[Progress, None, None]:
        self._is_under_way = True
        view = NotebookView(self._title, Curve.of(self.directory.metrics_path))
        view.begin(self.config.env_steps)
        try:
            with announced_to(view.status):
                # The iterator isn't kept in a variable, because then `failure_of_loop` would find nothing.
                for progress in train():
                    view.update({"env_steps": progress.env_steps, **progress.metrics()})
                    yield progress
        finally:
            self._is_under_way = False
            view.end(self._repr_html_())
