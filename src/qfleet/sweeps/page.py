"""The data of sweep.html, as the report's page shows it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qfleet.sweeps.directory import SweepDirectory
from qfleet.sweeps.records import WARMUP_SHARE, TrialRecord, bests_so_far
from qfleet.sweeps.space import Choices, Parameter, Range

MAX_LINES = 300
"""Most trials that the parallel coordinates show: the best ones."""

_NO_IMPORTANCES = (
    "How much each setting matters isn't shown: that takes five complete trials with different results, and more than "
    "one setting that varies."
)


def sweep_data(
    directory: SweepDirectory,
    space: Sequence[Parameter],
    records: Sequence[TrialRecord],
    importances: Mapping[str, float],
) -> dict[str, Any]:
    """Returns all that sweep.html shows, as JSON can hold it.

    Args:
      directory: the sweep's folder.
      space: the settings that vary.
      records: all trials, the best first.
      importances: share of the difference between trials that each setting explains; empty if it isn't known.
    """
    complete = [record for record in records if record.state == "complete"]
    figures = [_parallel(space, complete[:MAX_LINES]), _values(records)] if complete else []
    if importances:
        figures.append(_importances(importances))
    return {
        "facts": _facts(directory, records, _notes(records, has_importances=bool(importances))),
        "figures": figures,
        "axes": {"trials": "Trial"},
        "video": None,
        "findings": [],
    }


def trial_rows(records: Sequence[TrialRecord]) -> list[dict[str, str]]:
    """Returns a row for each trial: its number, result and settings, all as text."""
    return [
        {"trial": str(each.number), "return": "" if each.value is None else f"{each.value:.4g}", "": each.state}
        | dict(each.texts)
        for each in records
    ]


def _facts(directory: SweepDirectory, records: Sequence[TrialRecord], notes: list[str]) -> dict[str, Any]:
    config = directory.plan.config
    count = {state: sum(each.state == state for each in records) for state in ("complete", "pruned", "failed")}
    cards = [(state, str(number)) for state, number in count.items() if number]
    best = next((each for each in records if each.state == "complete"), None)
    if best is not None:
        cards = [("best return", f"{best.value:.4g}"), ("best trial", str(best.number)), *cards]
    return {
        "title": f"Sweep of {config.env} · {config.preset} · {config.topology.name}",
        "subtitle": str(directory.path),
        "state": "",
        "cards": cards,
        "groups": [],
        "differences": [],
        "figures_title": "Trials",
        "runs_title": "All trials",
        "runs": trial_rows(records),
        "notes": notes,
        "settings": [*directory.plan.params.items()],
        "environment": [],
        "summary": [(f"trial {each.number}", each.error) for each in records if each.error],
    }


def _notes(records: Sequence[TrialRecord], *, has_importances: bool) -> list[str]:
    notes = [
        "A trial's return is the mean of its last evaluation. The best of many noisy means is too high an estimate: "
        "train the best settings with other seeds to know what they are worth."
    ]
    if any(each.state == "pruned" for each in records):
        notes.append(
            f"Pruned trials were stopped after at least {WARMUP_SHARE:.0%} of their evaluations, because they were "
            f"below the median of the others then."
        )
    return notes if has_importances else [*notes, _NO_IMPORTANCES]


def _parallel(space: Sequence[Parameter], records: Sequence[TrialRecord]) -> dict[str, Any]:
    """Returns the figure with an axis for each setting and for the return, and a line for each complete trial."""
    values = [record.value for record in records if record.value is not None]
    returns = Range("return", min(values), max(values), is_log=False, is_whole=False)
    lines = []
    for rank, record in enumerate(records):
        chosen = [*(record.texts[each.name] if isinstance(each, Choices) else record.settings[each.name]
                    for each in space), record.value]  # fmt: skip
        lines.append(
            {
                "name": f"trial {record.number}",
                "y": [_position(axis, value) for axis, value in zip((*space, returns), chosen, strict=True)],
                "text": [*record.texts.values(), f"{record.value:.4g}"],
                "share": 1 - rank / len(records),  # of the trials that it is at least as good as
            }
        )
    return {
        "id": "parallel", "title": "Settings and returns", "kind": "parallel", "wide": True, "unit": "",
        "note": "A line is a complete trial. The stronger its colour, the better the trial; the best one is orange.",
        "coordinates": [{"name": axis.name, "ticks": _ticks(axis)} for axis in (*space, returns)],
        "lines": lines,
    }  # fmt: skip


def _position(axis: Parameter, value: Any) -> float:
    """Returns where a value is on its axis, in [0, 1]."""
    if isinstance(axis, Choices):
        return (list(axis.values).index(value) + 0.5) / len(axis.values)
    if axis.low == axis.high:  # all returns are equal
        return 0.5
    scale = math.log if axis.is_log else float
    return (scale(value) - scale(axis.low)) / (scale(axis.high) - scale(axis.low))


def _ticks(axis: Parameter) -> list[tuple[float, str]]:
    if isinstance(axis, Choices):
        return [(_position(axis, text), text) for text in axis.values]
    middle = math.sqrt(axis.low * axis.high) if axis.is_log else (axis.low + axis.high) / 2
    values = dict.fromkeys([axis.low, middle, axis.high])
    return [(_position(axis, value), f"{value:.3g}") for value in values]


def _values(records: Sequence[TrialRecord]) -> dict[str, Any]:
    """Returns the figure of the trials' returns in their order, and the best one until then."""
    complete = sorted((each for each in records if each.state == "complete"), key=lambda each: each.number)
    bests = list(bests_so_far(complete))

    def trace(name: str, style: str, number: int, points: Sequence[tuple[int, float | None]]) -> dict[str, Any]:
        data = {"x": [x for x, _ in points], "y": [y for _, y in points]}
        return {"name": name, "style": style, "colour": number, "data": {"trials": data}}

    return {
        "id": "values", "title": "Best return over trials", "unit": "return", "wide": False, "log": False,
        "note": "Complete trials in the order in which they began.",
        "traces": [
            trace("trial", "points", 0, [(each.number, each.value) for each in complete]),
            trace("best until then", "steps", 1, bests),
        ],
    }  # fmt: skip


def _importances(importances: Mapping[str, float]) -> dict[str, Any]:
    return {
        "id": "importances", "title": "Importance of the settings", "kind": "bars", "unit": "share", "wide": False,
        "note": "Share of the difference between good and other trials that each explains (PED-ANOVA).",
        "hover": "%{x:.0%}<extra></extra>",
        "bars": [{"name": name, "value": share} for name, share in importances.items()],
    }  # fmt: skip
