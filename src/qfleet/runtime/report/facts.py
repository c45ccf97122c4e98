"""What a report says in words and tables, as plain data: outcome, settings, versions, what was damaged."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from qfleet.runtime.comparison import Comparison, Group, settings_of
from qfleet.runtime.saved_run import SavedRun
from qfleet.runtime.statistics import FEWEST_SEEDS_OF_INTERVAL, band_of

NOTHING = "-"
"""Stands for a value that a run doesn't have."""

Facts = list[tuple[str, str]]
"""Names and values, in the order of the page."""


def make_facts(comparison: Comparison) -> dict[str, Any]:
    """Returns the title, the key figures and the tables of a report."""
    runs, is_one = comparison.runs, len(comparison.runs) == 1
    return {
        "title": _title(comparison),
        "subtitle": str(runs[0].path) if is_one else f"{len(runs)} runs in {_count(len(comparison.groups), 'group')}",
        "state": _state(runs[0]) if is_one else "",
        "cards": _cards(runs[0]) if is_one else [],
        "groups": [] if is_one else [_group_row(group) for group in comparison.groups],
        "runs": [] if is_one else [_run_row(row) for row in comparison.table()],
        "notes": list(_notes(runs)),
        "differences": [] if is_one else _differences(comparison),
        "settings": [(name, _value(value)) for name, value in settings_of(runs[0]).items()],
        "environment": _environment(runs[0]),
        "summary": [(name, _value(value)) for name, value in runs[0].summary.items() if _is_short(value)],
    }


def _title(comparison: Comparison) -> str:
    config = comparison.runs[0].config
    if len(comparison.groups) == 1:
        return f"{config.env} · {config.preset} · {config.topology.name}"
    envs = {run.config.env for run in comparison.runs}
    return f"{config.env}: {len(comparison.groups)} settings" if len(envs) == 1 else f"{len(envs)} environments"


def _state(run: SavedRun) -> str:
    if outcome := run.outcome:
        return f"stopped: {outcome.get('stopped')}"
    metrics = run.metrics
    if not metrics.num_records:
        return "no records yet"
    return "under way, or killed before its end"


def _cards(run: SavedRun) -> Facts:
    summary, metrics = run.outcome, run.metrics

    def newest(name: str) -> Any:
        values = metrics.get(name, np.zeros(0))
        values = values[~np.isnan(values)]
        return summary.get(name, values[-1] if values.size else None)

    best_at, failures = _figure(summary.get("best_eval_at_env_steps")), _figure(summary.get("num_env_failures"))
    best = _figure(summary.get("best_eval_return_mean"))
    cards = [
        ("newest return", _figure(newest("eval_return_mean"))),
        ("best return" if best_at == NOTHING else f"best return, at step {best_at}", best),
        ("environment steps", _figure(newest("env_steps"))),
        ("learner steps", _figure(newest("learner_steps"))),
        ("wall time", _duration(newest("wall_seconds"))),
        ("environment steps/s", _figure(newest("env_steps_per_second"))),
        ("episodes", _figure(summary.get("num_episodes"))),
        ("failed environments", NOTHING if failures == "0" else failures),
        ("restarts", _figure(summary.get("num_restarts"))),
    ]
    return [(name, value) for name, value in cards if value != NOTHING]


def _group_row(group: Group) -> dict[str, str]:
    """Returns a row of the table that compares groups: the newest evaluations of their seeds."""
    finals = group.final_returns
    row = {"settings": group.label, "seeds": str(group.num_seeds)}
    if finals.size < 2:
        return {
            **row,
            "newest return": _figure(finals[0]) if finals.size else NOTHING,
            "range": NOTHING,
            "what": "one seed",
        }
    band = band_of(finals[None])
    what = "IQM, 95 % interval" if finals.size >= FEWEST_SEEDS_OF_INTERVAL else "median, interquartile range"
    return {
        **row,
        "newest return": _figure(band.middle[0]),
        "range": f"{_figure(band.low[0])} to {_figure(band.high[0])}",
        "what": what,
    }


def _run_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "run": row["run"],
        "settings": row["group"],
        "seed": str(row["seed"]) if row["num_seeds"] == 1 else f"{row['seed']} to {row['seed'] + row['num_seeds'] - 1}",
        "stopped": str(row["stopped"] or NOTHING),
        "steps": _figure(row["env_steps"]),
        "wall time": _duration(row["wall_seconds"]),
        "newest return": _figure(row["return_mean"]),
        "best return": _figure(row["best_return_mean"]),
        "steps/s": _figure(row["env_steps_per_second"]),
    }


def _notes(runs: Iterable[SavedRun]) -> Iterable[str]:
    """Yields what a reader must know before believing the figures: warnings, failures, damaged records."""
    runs = list(runs)
    for run in runs:
        where = f"{run.path}: " if len(runs) > 1 else ""
        if error := run.outcome.get("error"):
            yield f"{where}{error}"
        warnings = run.outcome.get("warnings")
        for warning in warnings if isinstance(warnings, list) else []:
            yield f"{where}{warning}"
        for damage in run.metrics.damaged:
            yield f"{where}metrics.jsonl, {damage}; the line is left out"
        if run.metrics.num_damaged > len(run.metrics.damaged):
            yield f"{where}metrics.jsonl: {run.metrics.num_damaged} damaged lines in all are left out"


def _differences(comparison: Comparison) -> list[dict[str, str]]:
    labels = [group.label for group in comparison.groups]
    return [
        {"setting": name, **{label: _value(value) for label, value in zip(labels, values, strict=True)}}
        for name, values in comparison.differences.items()
    ]


def _environment(run: SavedRun) -> Facts:
    """Returns versions and hardware of the newest start."""
    starts = run.environment
    if not starts:
        return []
    start = starts[-1]
    facts: Facts = [("starts of the run", str(len(starts)))]
    for name, value in start.items():
        if isinstance(value, dict):
            facts += [(f"{name.rstrip('s')} {key}", _value(each)) for key, each in value.items()]
        elif name == "memory_bytes" and isinstance(value, (int, float)):
            facts.append(("memory", f"{value / 2**30:.1f} GiB"))
        elif name == "command" and isinstance(value, list):
            facts.append((name, " ".join(map(str, value))))
        elif value is not None:
            facts.append((name.replace("_", " "), _value(value)))
    return facts


def _is_short(value: Any) -> bool:
    return value is not None and not isinstance(value, dict) and (not isinstance(value, list) or len(str(value)) < 100)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _figure(value: Any) -> str:
    """Returns a number as a reader wants it: whole with separators, or of four significant digits."""
    number = _number(value)
    if number is None:
        return NOTHING
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 1000 else f"{number:.4g}"


def _duration(value: Any) -> str:
    seconds = _number(value)
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _number(value: Any) -> float | None:
    """Returns what may be a number of a damaged file as a float, or None."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
