"""The figures of a report, as plain data that its script hands to plotly.js."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qfleet.runtime.comparison import X_AXES, Comparison, Curve, Group
from qfleet.runtime.metrics_reading import Metrics

MAX_POINTS = 1_000
"""Most points of a curve that is alone in its figure. More curves share the points."""

MIN_POINTS = 100
"""Points of a curve, however many share the figure."""

MAX_SEEDS_DRAWN = 20
"""Most seeds of a group that are drawn one by one, behind its band."""

Figure = dict[str, Any]
"""A figure: its id, title, note, unit of y, width, and traces. A trace has a name, a style, the number of its colour,
and by x axis the arrays x and y, or low and high for a band."""


class Line(NamedTuple):
    """One metric in a figure."""

    metric: str
    name: str
    style: str = "line"
    """`line`, or `faint` for what is only there to compare with."""


class Plan(NamedTuple):
    """A figure over the records of a run. It is left out if no run has any of its metrics."""

    id: str
    title: str
    unit: str
    note: str
    lines: tuple[Line, ...]
    is_log: bool = False
    is_wide: bool = False


PLANS = (
    Plan(
        "returns", "Return", "return",
        "Evaluations act greedily on episodes of their own. Training episodes explore.",
        (Line("eval_return_mean", "evaluation"), Line("episode_return_mean", "training episodes", "faint")),
        is_wide=True,
    ),
    Plan(
        "values", "Values against returns", "discounted return",
        "What the network expects at the start of evaluation episodes, and what it then received. A value above the "
        "return is an over-estimate.",
        (
            Line("eval_value_mean", "value at the start"),
            Line("eval_discounted_return_mean", "discounted return that followed"),
            Line("q_mean", "greatest value, all steps", "faint"),
        ),
    ),
    Plan(
        "td_error", "TD error", "discounted return", "Mean absolute TD error of the batches.",
        (Line("td_error_mean", "TD error"),), is_log=True,
    ),
    Plan("loss", "Loss", "loss", "Mean loss of the batches.", (Line("loss", "loss"),), is_log=True),
    Plan(
        "exploration", "Exploration", "epsilon or temperature", "Of the last step of each record.",
        (Line("exploration", "exploration"),),
    ),
    Plan(
        "episode_length", "Episode length", "environment steps", "Mean over the training episodes that ended.",
        (Line("episode_length_mean", "episode length"),),
    ),
    Plan(
        "staleness", "Staleness", "learner steps",
        "Learner steps between the parameters that acted and the newest ones.", (Line("staleness", "staleness"),),
    ),
    Plan(
        "replay", "Age of the replay", "environment steps",
        "Mean age of what the replay holds, and how much it holds.",
        (Line("replay_age_mean", "age"), Line("replay_size", "size", "faint")),
    ),
    Plan(
        "priorities", "Priorities", "priority", "Mean and greatest priority in the replay.",
        (Line("priority_mean", "mean"), Line("priority_max", "greatest", "faint")), is_log=True,
    ),
    Plan(
        "update_ratio", "Size of the updates", "change / size",
        "Norm of the change of the parameters per learner step, over the norm of the parameters.",
        (Line("update_ratio", "update"),), is_log=True,
    ),
    Plan(
        "dead_units", "Dead units", "share", "Share of the hidden units that no observation activates.",
        (Line("dead_units_fraction", "dead units"),),
    ),
    Plan(
        "env_speed", "Environment steps per second", "steps/s", "Without evaluations.",
        (Line("env_steps_per_second", "environment steps/s"),),
    ),
    Plan(
        "learner_speed", "Learner steps per second", "steps/s", "Without evaluations.",
        (Line("learner_steps_per_second", "learner steps/s"),),
    ),
)  # fmt: skip
"""The figures that every topology may have, in the order of the page."""

_DRAWN = {line.metric for plan in PLANS for line in plan.lines}

_NOT_DRAWN = {
    *X_AXES,
    "learner_steps",
    "num_episodes",
    "num_env_failures",
    "eval_num_different",
    "eval_num_cut",
    "eval_episodes",
}

_LEFT_OUT_IF_ZERO = {"staleness"}
"""Figures that are left out if they show nothing but zeros."""


def make_figures(comparison: Comparison) -> list[Figure]:
    """Returns the figures of a report, in the order of the page."""
    groups = comparison.groups
    draw = _draw_group if len(groups) > 1 or groups[0].num_seeds > 1 else _draw_run
    figures = [figure for plan in PLANS if (figure := _figure(plan, groups, draw))]
    if len(comparison.runs) == 1:
        metrics = comparison.runs[0].metrics
        figures += [*_time_figures(metrics), *_failure_figure(metrics)]
        figures += [figure for plan in _other_plans(metrics) if (figure := _figure(plan, groups, draw))]
    return figures


def _figure(plan: Plan, groups: Sequence[Group], draw: "Callable[..., Iterator[dict[str, Any]]]") -> Figure | None:
    num_curves = sum(group.num_seeds for group in groups)
    max_points = max(MIN_POINTS, MAX_POINTS // num_curves)
    traces = [trace for number, group in enumerate(groups) for trace in draw(plan, group, number, max_points)]
    is_zero = not any(any(trace["data"]["env_steps"].get("y", ())) for trace in traces)
    if not traces or (is_zero and plan.id in _LEFT_OUT_IF_ZERO):
        return None
    return {
        "id": plan.id,
        "title": plan.title,
        "unit": plan.unit,
        "note": plan.note,
        "log": plan.is_log,
        "wide": plan.is_wide,
        "traces": traces,
    }


def _draw_run(plan: Plan, group: Group, number: int, max_points: int) -> Iterator[dict[str, Any]]:
    """Yields one trace per metric of a single run, each in a colour of its own."""
    for colour, line in enumerate(plan.lines):
        by_axis = {x: group.curves(line.metric, x) for x in X_AXES}
        if by_axis["env_steps"]:
            yield _trace(line.name, line.style, colour, {x: curves[0] for x, curves in by_axis.items()}, max_points)


def _draw_group(plan: Plan, group: Group, number: int, max_points: int) -> Iterator[dict[str, Any]]:
    """Yields the traces of the first metric that a group has of a plan: its seeds, and their middle and band."""
    metrics = [line.metric for line in plan.lines]
    metric = next((metric for metric in metrics if group.curves(metric)), metrics[0])
    by_axis = {x: group.curves(metric, x) for x in X_AXES}
    num_curves = len(by_axis["env_steps"])
    bands = {x: group.band(metric, x) for x in X_AXES}
    is_alone = num_curves == 1 or any(band is None for band in bands.values())
    for i in range(min(num_curves, MAX_SEEDS_DRAWN)):
        curves = {x: curves[i] for x, curves in by_axis.items()}
        yield _trace(group.label if is_alone else curves["env_steps"].label, "line" if is_alone else "seed", number,
                     curves, max_points)  # fmt: skip
    if is_alone:
        return
    data, edges = {}, {}
    for x, band in bands.items():
        assert band is not None
        data[x] = {"x": _plain(band.x), "y": _plain(band.band.middle)}
        edges[x] = {"x": _plain(band.x), "low": _plain(band.band.low), "high": _plain(band.band.high)}
        kind = band.band.kind
    yield {"name": f"{kind} of {num_curves} seeds", "style": "band", "colour": number, "data": edges}
    yield {"name": f"{group.label} ({num_curves} seeds)", "style": "line", "colour": number, "data": data}


def _trace(name: str, style: str, colour: int, curves: dict[str, Curve], max_points: int) -> dict[str, Any]:
    data = {}
    for x, curve in curves.items():
        xs, ys = thinned(curve.x, curve.y, max_points)
        data[x] = {"x": _plain(xs), "y": _plain(ys)}
    return {"name": name, "style": style, "colour": colour, "data": data}


def thinned(x: np.ndarray, y: np.ndarray, max_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a curve of at most `max_points` points. Each is the mean of neighbouring ones, at the last one's x."""
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points + 1).astype(int)
    sums = np.add.reduceat(y, edges[:-1])
    return x[edges[1:] - 1], sums / np.diff(edges)


def _time_figures(metrics: Metrics) -> Iterator[Figure]:
    """Yields where the wall time went, and how a profiled run divides its training time."""
    parts = time_spent(metrics)
    if parts:
        yield {
            "id": "time", "title": "Where the time went", "unit": "seconds", "kind": "bars",
            "note": "Wall time of the run, over all its starts.",
            "bars": [{"name": name, "value": _number(seconds)} for name, seconds in parts.items()],
        }  # fmt: skip
    shares = [name for name in metrics if name.startswith("time_share_")]
    if shares:
        ys = np.nan_to_num(np.stack([metrics[name] for name in shares]))
        traces = []
        for number, (name, y) in enumerate(zip(shares, ys, strict=True)):
            curves = {x: Curve(name, metrics[x].astype(float), y) for x in X_AXES}
            traces.append(_trace(name.removeprefix("time_share_").replace("_", " "), "area", number, curves, 200))
        yield {
            "id": "time_shares", "title": "Parts of a training step", "unit": "share of the time",
            "note": "Measured in lock step, waiting for each part.", "traces": traces,
        }  # fmt: skip


def time_spent(metrics: Metrics) -> dict[str, float]:
    """Returns the seconds that a run spent starting, training, and on evaluations and checkpoints.

    A record tells of how many environment steps it took and how fast they were taken, so the time left over between
    two records is that of an evaluation, a video or a checkpoint.
    """
    speed = metrics.get("env_steps_per_second", np.zeros(0))
    has_speed = np.isfinite(speed) & (speed > 0)
    if not np.any(has_speed):
        return {}
    steps, wall = metrics["env_steps"][has_speed], metrics["wall_seconds"][has_speed]
    new_steps = np.diff(steps, prepend=0)
    training = np.where(new_steps > 0, new_steps / speed[has_speed], 0.0)
    gaps = np.maximum(np.diff(wall, prepend=0.0) - training, 0.0)
    return {
        "start and compilation": float(gaps[0]),
        "training": float(training.sum()),
        "evaluations and checkpoints": float(gaps[1:].sum()),
    }


def _failure_figure(metrics: Metrics) -> Iterator[Figure]:
    """Yields the failures and restarts over time, if there were any."""
    names = {
        name: name.removeprefix("fleet_").removeprefix("num_").replace("_", " ")
        for name in metrics
        if name == "num_env_failures" or _is_of_restarts(name)
    }
    traces = []
    for number, (name, words) in enumerate(names.items()):
        counts = np.nan_to_num(metrics[name])
        total = np.cumsum(counts) if name == "num_env_failures" else np.maximum.accumulate(counts)
        if total.size and total[-1] > 0:
            curves = {x: Curve(name, metrics[x].astype(float), total.astype(float)) for x in X_AXES}
            traces.append(_trace(words, "steps", number, curves, 500))
    if traces:
        yield {
            "id": "failures", "title": "Failures and restarts", "unit": "so far",
            "note": "Environments and processes that failed and were replaced.", "traces": traces,
        }  # fmt: skip


def _other_plans(metrics: Metrics) -> list[Plan]:
    """Returns a plan for each metric that has no figure yet, such as those of a fleet."""
    names = [
        name
        for name in metrics
        if name not in _DRAWN | _NOT_DRAWN
        and not (name.startswith("time_share_") or "_seed_" in name or _is_of_restarts(name))
    ]
    return [
        Plan(f"other_{name}", name.replace("_", " "), "", "", (Line(name, name.replace("_", " ")),)) for name in names
    ]


def _is_of_restarts(name: str) -> bool:
    return name.startswith("fleet_") and "restart" in name


def _plain(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    """Returns a number of six significant digits, which is more than a screen can show."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
