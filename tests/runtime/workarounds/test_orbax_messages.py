"""Late callbacks are not reported, and everything else is."""

import sys
import types

import pytest

from qfleet.runtime.workarounds.orbax_messages import keep_orbax_quiet


def test_only_late_callbacks_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))
    keep_orbax_quiet()
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))  # type: ignore[arg-type]
    assert reported == ["something else"]
