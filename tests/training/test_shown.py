"""What a notebook shows of a run, with IPython replaced; and that an interrupt leaves the run resumable."""

import re
import signal
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

import qfleet
from qfleet.config import TrainConfig
from qfleet.runtime import notebook
from qfleet.runtime.notebook import Curve, is_notebook, run_html
from qfleet.training import shown as shown_module


class Notebook:
    """Stands for IPython: keeps the HTML of each output."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        contents = [bundle["text/html"]]
        self.outputs.append(contents)
        return types.SimpleNamespace(update=lambda bundle, raw: contents.append(bundle["text/html"]))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    found = Notebook()
    for module in (notebook, shown_module):
        monkeypatch.setattr(module, "is_notebook", lambda: True)
    display = types.SimpleNamespace(display=found.display)
    monkeypatch.setitem(sys.modules, "IPython.display", display)  # type: ignore[arg-type]
    monkeypatch.setattr(notebook, "REFRESH_SECONDS", 0.0)
    return found


def make(path: Path, **settings: Any) -> TrainConfig:
    sizes = {
        "num_envs": 4,
        "hidden_sizes": (8,),
        "num_minibatches": 1,
        "eval_episodes": 2,
        "eval_period_env_steps": 128,
    }
    return qfleet.make_config("CartPole-v1", "pqn", **sizes | {"env_steps": 256, "run_dir": str(path)} | settings)


def test_only_a_kernel_is_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_notebook()
    for shell, is_one in ((types.SimpleNamespace(kernel=object()), True), (object(), False), (None, False)):
        module = types.SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
        assert is_notebook() is is_one


def test_training_shows_one_output_that_ends_with_the_outcome(tmp_path: Path, shown: Notebook) -> None:
    qfleet.train(make(tmp_path / "run"))
    starting, training = shown.outputs
    assert "compiling" in "".join(starting) and starting[-1] == "<div></div>"
    assert any(": training<" in content and "env steps 128/256 (50%)" in content for content in training)
    assert "CartPole-v1 with pqn, fused, seed 0</b>: stopped: env steps<" in training[-1]
    assert "width:100.0%" in training[-1] and "<polyline" in training[-1]
    assert f"qfleet.load(&#x27;{tmp_path}/run&#x27;).evaluate()" in training[-1]


def test_an_interrupt_leaves_a_run_that_goes_on_in_the_same_process(tmp_path: Path, shown: Notebook) -> None:
    before = signal.getsignal(signal.SIGINT)
    run = qfleet.iterate(make(tmp_path / "run", env_steps=10_000))
    assert ": not begun<" in run._repr_html_() and ">for progress in run: ...</code>" in run._repr_html_()
    for progress in run:
        if progress.env_steps >= 256:
            assert ": under way<" in run._repr_html_() and "<polyline" in run._repr_html_()
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert run.summary["stopped"] == "interrupted"
    assert "stopped: interrupted" in shown.outputs[-1][-1]
    assert f"for progress in qfleet.resume(&#x27;{tmp_path}/run&#x27;): ..." in shown.outputs[-1][-1]
    again = qfleet.resume(run.directory.path, env_steps=run.summary["env_steps"] + 128)
    assert list(again) and again.summary["stopped"] == "env steps"
    with pytest.raises(KeyboardInterrupt, match="goes on"):
        train_and_interrupt(make(tmp_path / "other", env_steps=1_000))
    assert list(qfleet.resume(tmp_path / "other"))


def train_and_interrupt(config: TrainConfig) -> None:
    """Trains, and interrupts that at the first record, as the stop button of a notebook does."""
    add, is_first = Curve.add, True

    def interrupting(curve: Curve, record: Any) -> None:
        nonlocal is_first
        if is_first:
            signal.raise_signal(signal.SIGINT)
        is_first = False
        add(curve, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curve, "add", interrupting)
        qfleet.train(config)


def test_an_exception_in_the_loop_is_still_found_through_the_view(tmp_path: Path, shown: Notebook) -> None:
    run = qfleet.iterate(make(tmp_path / "run"))
    with pytest.raises(ZeroDivisionError):
        for _ in run:
            _ = 1 / 0
    assert run.summary["stopped"] == "failed"
    assert "an exception has left the loop over the run, at" in run.summary["error"]
    assert "stopped: failed, an exception has left the loop" in shown.outputs[-1][-1]


def test_a_notebook_that_can_not_show_it_does_not_cost_the_run(
    tmp_path: Path, shown: Notebook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise ValueError("the kernel is gone")

    monkeypatch.setattr(sys.modules["IPython.display"], "display", fail)
    assert qfleet.train(make(tmp_path / "run"))["stopped"] == "env steps"
    assert caplog.text.count("the notebook can't show the run any more; the run goes on: ValueError: the kernel") == 2


def test_a_run_says_as_text_what_it_is(tmp_path: Path) -> None:
    run = qfleet.iterate(make(tmp_path / "run"))
    assert repr(run) == f"<Run CartPole-v1 with pqn, fused, seed 0 in {tmp_path}/run: not begun>"
    assert list(run)
    assert repr(run).endswith(": stopped: env steps>")


def test_the_picture_is_well_formed_and_takes_the_colours_of_the_page() -> None:
    curve = Curve()
    assert curve.svg() == ""
    for i in range(2_000):
        value = {"episode_return_mean": float(i), "eval_return_mean": float("nan"), "eval_return_mean_seed_0": None}
        curve.add({"env_steps": float(i), **value})
    curve.add({"env_steps": 2_000.0, "eval_return_mean": 5.0, "eval_return_mean_seed_0": 4.0, "loss": 1.0})
    content = run_html("a <b>", "training & more", completed=0.5, details="", curve=curve, after="x < y")
    root = ElementTree.fromstring(content.replace("<br>", "<br/>"))
    lines = root.findall(".//polyline")
    assert [line.attrib["points"].count(",") for line in lines if "stroke-width" in line.attrib][::2] == [1, 1]
    assert len(lines) == 3 and len(curve.lines["episode_return_mean"]) <= notebook.MAX_POINTS
    assert curve.lines["episode_return_mean"][-1] == (1999.0, 1999.0), "the newest point stays"
    assert "currentColor" in content and not re.search(":(black|white)|#000|#fff", content)


def test_a_flat_or_unreadable_curve_is_no_error(tmp_path: Path) -> None:
    flat = Curve()
    flat.add({"env_steps": 1.0, "eval_return_mean": 2.0})
    assert "<polyline" in flat.svg()
    (tmp_path / "metrics.jsonl").mkdir()
    assert Curve.of(tmp_path / "metrics.jsonl").lines == Curve.of(tmp_path / "absent").lines == {}
