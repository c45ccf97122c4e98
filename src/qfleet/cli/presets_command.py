"""`qfleet presets`."""

from collections.abc import Sequence

import tyro

from qfleet.presets import PRESETS, TUNED


def run(arguments: Sequence[str]) -> int:
    """Lists the presets."""
    tyro.cli(_list, prog="qfleet presets", args=list(arguments))
    return 0


def _list() -> None:
    """Lists the presets, where they come from, and the environments that they are tuned for."""
    for name, preset in PRESETS.items():
        print(f"{name}: {preset.summary}\n    {preset.source}")
        tuned = [env for tuned_preset, env in TUNED if tuned_preset == name]
        if tuned:
            print(f"    tuned for {', '.join(tuned)}")
