"""Several runs side by side: how their settings differ, and their curves with the seeds taken together."""

import dataclasses
import functools
import html
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qfleet.config import ConfigError
from qfleet.config.encoding import encode
from qfleet.runtime.saved_run import SavedRun
from qfleet.runtime.statistics import Band, band_of

X_AXES = ("env_steps", "wall_seconds")
"""What a curve can be drawn against."""

NUM_BAND_POINTS = 100
"""Most points at which the curves of several seeds are taken together."""

_NOT_LEARNED = (
    "seed",
    "num_seeds",
    "run_dir",
    "checkpoint_period_seconds",
    "checkpoints_kept",
    "checkpoint_replay",
    "video_period_env_steps",
    "report",
)
"""Settings that don't change what one seed learns. Runs that differ in no other form a group."""


class Curve(NamedTuple):
    """A metric of one seed, without the records that lack it."""

    label: str
    x: np.ndarray
    """`[points]` float, ascending: environment steps or seconds."""
    y: np.ndarray
    """`[points]` float."""


class GroupBand(NamedTuple):
    """The seeds of a group taken together, up to where the shortest of them ends."""

    x: np.ndarray
    """`[points]` float."""
    band: Band


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of the same settings with different seeds."""

    label: str
    runs: tuple[SavedRun, ...]

    @property
    def num_seeds(self) -> int:
        """Number of seeds over all runs."""
        return sum(run.config.num_seeds for run in self.runs)

    def curves(self, metric: str, x: str = "env_steps") -> list[Curve]:
        """Returns one curve per seed. If a run of several seeds has only their mean, that is one curve.

        Args:
          metric: name of a column of the runs' metrics.
          x: `env_steps` or `wall_seconds`.

        Raises:
          ConfigError: if `x` is something else.
        """
        if x not in X_AXES:
            raise ConfigError(f"x must be {' or '.join(X_AXES)}, got {x!r}")
        curves = [curve for run in self.runs for curve in _curves_of(run, metric, x)]
        return [curve for curve in curves if curve.x.size]

    def band(self, metric: str, x: str = "env_steps") -> GroupBand | None:
        """Returns the middle and the band of the seeds' curves, or None if fewer than two seeds have the metric.

        The curves are interpolated at the same points, from the last of their beginnings to the first of their ends.

        Args and Raises: as for `curves`.
        """
        curves = self.curves(metric, x)
        if len(curves) < 2:
            return None
        first, last = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
        points = np.unique(np.concatenate([curve.x for curve in curves]))
        points = points[(points >= first) & (points <= last)]
        if not points.size:
            return None
        if points.size > NUM_BAND_POINTS:
            points = np.linspace(first, last, NUM_BAND_POINTS)
        return GroupBand(points, band_of(np.stack([np.interp(points, curve.x, curve.y) for curve in curves], axis=-1)))

    @property
    def final_returns(self) -> np.ndarray:
        """Mean return of the newest evaluation of each seed that has one, `[seeds]`."""
        return np.array([curve.y[-1] for curve in self.curves("eval_return_mean")])


class Comparison:
    """Several runs, in groups of the same settings."""

    def __init__(self, runs: Sequence[SavedRun]) -> None:
        """Groups the runs. The groups are in the order of their first runs."""
        self.runs = tuple(runs)

    def __repr__(self) -> str:
        return f"Comparison({len(self.runs)} runs in {len(self.groups)} groups)"

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: one row per run, with the settings that tell its group from the others."""
        columns = ("run", "group", "seed", "stopped", "env_steps", "return_mean", "best_return_mean")
        rows = [[_cell(row[name]) for name in columns] for row in self.table()]
        head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """The runs by settings. A group is labelled by the settings in which it differs from the others."""
        members: dict[str, list[SavedRun]] = {}
        for run in self.runs:
            members.setdefault(json.dumps(_learned_settings(run), sort_keys=True), []).append(run)
        groups = list(members.values())
        labels = _labels_of(groups)
        return tuple(Group(label, tuple(runs)) for label, runs in zip(labels, groups, strict=True))

    @functools.cached_property
    def differences(self) -> dict[str, list[Any]]:
        """The settings in which the groups differ: each one's values by dotted name, `[groups]`. None if it has none.

        Seeds, folders and how checkpoints are kept don't count.
        """
        flat = [_flat(_learned_settings(group.runs[0])) for group in self.groups]
        names = list(dict.fromkeys(name for settings in flat for name in settings))
        values = {name: [settings.get(name) for settings in flat] for name in names}
        return {name: each for name, each in values.items() if any(value != each[0] for value in each)}

    def table(self) -> list[dict[str, Any]]:
        """Returns one row per run, for `pandas.DataFrame` for example. A value that a run doesn't have is None."""
        return [_row(run, group.label) for group in self.groups for run in group.runs]


def settings_of(run: SavedRun) -> dict[str, Any]:
    """Returns the settings of a run by dotted name, such as `agent.learning_rate`."""
    return _flat(encode(run.config))


def _learned_settings(run: SavedRun) -> dict[str, Any]:
    return {name: value for name, value in encode(run.config).items() if name not in _NOT_LEARNED}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _labels_of(groups: list[list[SavedRun]]) -> list[str]:
    """Returns a label for each group: what few settings tell it from the others, or the name of its first folder."""
    flat = [_flat(_learned_settings(runs[0])) for runs in groups]
    named = {"env", "preset", "topology.name"}
    differing = [
        name for name in dict.fromkeys(n for f in flat for n in f) if len({str(f.get(name)) for f in flat}) > 1
    ]
    chosen = [name for name in differing if name in named] or differing
    labels = [", ".join(_setting(name, settings.get(name)) for name in chosen) for settings in flat]
    if not differing:
        config = groups[0][0].config
        return [f"{config.env}, {config.preset}"]
    is_clear = len(set(labels)) == len(labels) and max(map(len, labels)) <= 60
    return labels if is_clear else [runs[0].path.absolute().name for runs in groups]


def _setting(name: str, value: Any) -> str:
    return str(value) if name in ("env", "preset", "topology.name") else f"{name.rsplit('.', 1)[-1]} {value}"


def _curves_of(run: SavedRun, metric: str, x: str) -> list[Curve]:
    metrics, config = run.metrics, run.config
    names = {f"seed {config.seed + i}": f"{metric}_seed_{i}" for i in range(config.num_seeds)}
    if config.num_seeds == 1 or not all(name in metrics for name in names.values()):
        label = "mean of seeds" if config.num_seeds > 1 else f"seed {config.seed}"
        names = {label: metric}
    curves = []
    for label, name in names.items():
        y = metrics.get(name, np.zeros(0))
        has_value = ~np.isnan(y)
        xs = metrics[x][has_value] if y.size else np.zeros(0)
        curves.append(Curve(label, np.maximum.accumulate(xs.astype(np.float64)) if xs.size else xs, y[has_value]))
    return curves


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _row(run: SavedRun, group: str) -> dict[str, Any]:
    config, summary, metrics = run.config, run.outcome, run.metrics

    def newest(name: str) -> Any:
        """Returns what the summary says, and while there is none, what the newest record does that says something."""
        values = metrics.get(name, np.zeros(0))
        values = values[~np.isnan(values)]
        return summary.get(name, values[-1].item() if values.size else None)

    return {
        "run": str(run.path),
        "group": group,
        "env": config.env,
        "preset": config.preset,
        "topology": config.topology.name,
        "seed": config.seed,
        "num_seeds": config.num_seeds,
        "stopped": summary.get("stopped"),
        "env_steps": newest("env_steps"),
        "wall_seconds": newest("wall_seconds"),
        "return_mean": newest("eval_return_mean"),
        "best_return_mean": summary.get("best_eval_return_mean"),
        "env_steps_per_second": newest("env_steps_per_second"),
        "learner_steps_per_second": newest("learner_steps_per_second"),
    }
