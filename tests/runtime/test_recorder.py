"""Videos during training: they change nothing about the run, and a failure costs only the video."""

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import probes
import pytest

import qfleet
from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.envs.registry import make_env
from qfleet.runtime.checkpoints import Checkpoints

av = pytest.importorskip("av")
pytest.importorskip("PIL")

BLACK = np.zeros((4, 6, 3), np.uint8)


class Renderer:
    """Draws black pictures, and calls `action` from picture `at` on. The first picture is the check before the run."""

    def __init__(self) -> None:
        self.pictures, self.at, self.action = 0, 0, lambda: None

    def __call__(self, state: Any, observation: Any) -> np.ndarray:
        self.pictures += 1
        if self.at and self.pictures >= self.at:
            self.action()
        return BLACK


RENDERER = Renderer()
qfleet.register_env("Drawn-v0", lambda: probes.time_limit(steps=5)._replace(render=RENDERER))
qfleet.register_env("NotDrawn-v0", probes.time_limit)


@pytest.fixture(autouse=True)
def renderer() -> Renderer:
    RENDERER.__init__()  # type: ignore[misc]
    return RENDERER


def tiny(run_dir: Path, env: str = "Drawn-v0", preset: str = "dqn", **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "num_envs": 4,
        "hidden_sizes": (8,),
        "batch_size": 8,
        "replay_capacity": 256,
        "warmup_env_steps": 32,
        "env_steps": 512,
        "eval_period_env_steps": 128,
        "eval_episodes": 2,
        "run_dir": str(run_dir),
    }
    return qfleet.make_config(env, preset, **defaults | settings)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "videos").iterdir())


@pytest.mark.parametrize("env", ["CartPole-v1", "gym:CartPole-v1"])
def test_a_run_with_videos_is_the_run_without(env: str, tmp_path: Path) -> None:
    if env.startswith("gym"):
        pytest.importorskip("pygame")
    settings: dict[str, Any] = {"lock_step": True} if env.startswith("gym") else {}
    runs = tmp_path / "plain", tmp_path / "filmed"
    plain = qfleet.train(tiny(runs[0], env, **settings))
    filmed = qfleet.train(tiny(runs[1], env, video_period_env_steps=128, **settings))
    assert (plain["num_videos"], filmed["num_videos"]) == (0, 4)
    assert plain["eval_returns"] == filmed["eval_returns"]
    states = []
    for run in runs:
        with Checkpoints(run / "checkpoints", keep=3, run_id=None) as checkpoints:
            states.append({item: checkpoints.restore_item(item, env_steps=512) for item in ("learner", "replay")})
    assert jax.tree.leaves(states[0])
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_videos_come_at_the_first_evaluation_after_every_period(tmp_path: Path) -> None:
    summary = qfleet.train(tiny(tmp_path / "run", video_period_env_steps=200))
    stems = [f"step{steps}-seed0-episode0" for steps in (256, 512)]
    assert names(tmp_path / "run") == [f"{stem}{suffix}" for stem in stems for suffix in (".gif", ".mp4")]
    assert (summary["num_videos"], summary["num_video_failures"]) == (2, 0)


def test_a_resumed_run_goes_on_with_its_videos(tmp_path: Path) -> None:
    run = qfleet.iterate(tiny(tmp_path / "run", video_period_env_steps=300))
    for progress in run:
        if progress.env_steps >= 320:
            break
    for _ in qfleet.resume(tmp_path / "run", env_steps=640):
        pass
    assert [name for name in names(tmp_path / "run") if name.endswith("mp4")] == [
        "step384-seed0-episode0.mp4",
        "step640-seed0-episode0.mp4",
    ]


def test_a_video_shows_what_watch_shows_of_that_checkpoint(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", "CartPole-v1", video_period_env_steps=512, num_seeds=2, seed=3)
    qfleet.train(config)
    (watched,) = qfleet.watch(tmp_path / "run", out_dir=tmp_path)
    assert watched.gif.name == "step512-trained3-seed0-episode0.gif"
    assert (tmp_path / "run" / "videos" / watched.gif.name).read_bytes() == watched.gif.read_bytes()


@pytest.mark.parametrize(
    ("env", "period", "message"),
    [
        ("NotDrawn-v0", 128, "must have something to draw"),
        ("Drawn-v0", 0, "video_period_env_steps must be a whole number, at least 1, got 0"),
    ],
)
def test_what_can_not_be_filmed_is_found_before_any_work(env: str, period: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        qfleet.iterate(tiny(tmp_path / "run", env, video_period_env_steps=period))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["av", "PIL"])
def test_a_missing_extra_is_found_before_any_work(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install 'qfleet\\[video\\]'"):
        qfleet.iterate(tiny(tmp_path / "run", video_period_env_steps=128))
    assert not (tmp_path / "run").exists()


def fail() -> None:
    raise OSError("no display")


def test_a_renderer_that_fails_at_once_is_found_before_any_work(tmp_path: Path, renderer: Renderer) -> None:
    renderer.at, renderer.action = 1, fail
    with pytest.raises(ConfigError, match=r"time-limit must render for videos, got OSError: no display"):
        qfleet.iterate(tiny(tmp_path / "run", video_period_env_steps=128))
    assert not (tmp_path / "run").exists()


def test_a_renderer_that_fails_later_is_told_once_and_costs_no_run(
    tmp_path: Path, renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    renderer.at, renderer.action = 4, fail
    with caplog.at_level(logging.WARNING, "qfleet"):
        summary = qfleet.train(tiny(tmp_path / "run", video_period_env_steps=128))
    assert (summary["stopped"], summary["num_videos"], summary["num_video_failures"]) == ("env steps", 0, 4)
    (message,) = caplog.messages
    assert message.startswith("the video of environment step 128 failed, the run continues: OSError: no display")
    assert names(tmp_path / "run") == []


def test_a_signal_gives_up_the_video_and_keeps_the_run(tmp_path: Path, renderer: Renderer) -> None:
    renderer.at, renderer.action = 4, lambda: signal.raise_signal(signal.SIGINT)
    run = qfleet.iterate(tiny(tmp_path / "run", video_period_env_steps=128))
    assert [progress.env_steps for progress in run][-1] == 128
    assert (run.summary["stopped"], run.summary["num_videos"]) == ("interrupted", 0)
    assert renderer.pictures == 4
    assert names(tmp_path / "run") == []
    assert (tmp_path / "run" / "checkpoints" / "128").is_dir()


class Lanes:
    """Lanes whose episodes all have the same length. The class counts the instances that are open."""

    num_open = 0

    def __init__(self, num_lanes: int, fails_at: int = -1) -> None:
        self._num_lanes, self._fails_at, self._steps = num_lanes, fails_at, 0
        Lanes.num_open += 1

    def reset(self, seed: int) -> np.ndarray:
        self._steps = 0
        return np.zeros((self._num_lanes, 1), np.float32)

    def send(self, action: np.ndarray) -> None:
        self._steps += 1

    def recv(self) -> qfleet.HostStep:
        if self._steps == self._fails_at:
            raise RunFailed("environments may fail at most")
        nobody = np.zeros(self._num_lanes, bool)
        ended = np.full(self._num_lanes, self._steps % 6 == 5)
        obs, reward = np.zeros((self._num_lanes, 1), np.float32), np.ones(self._num_lanes, np.float32)
        return qfleet.HostStep(obs, reward, ended, nobody, nobody)

    def render(self) -> np.ndarray:
        return BLACK

    def close(self) -> None:
        Lanes.num_open -= 1


@pytest.mark.parametrize(("fails_at", "num_videos"), [(-1, 4), (3, 0)])
def test_nothing_of_a_videos_environment_stays_open(fails_at: int, num_videos: int, tmp_path: Path) -> None:
    def make() -> qfleet.HostEnv:
        spec = make_env("NotDrawn-v0").spec
        lanes = lambda num_lanes, options: Lanes(num_lanes)  # noqa: E731
        return qfleet.HostEnv(spec, lanes, lanes, lambda options: Lanes(1, fails_at))

    qfleet.register_env("Counted-v0", make)
    before = Lanes.num_open
    run = qfleet.iterate(tiny(tmp_path / "run", "Counted-v0", video_period_env_steps=128))
    for _ in run:
        assert Lanes.num_open == before + 2  # the lanes of training and those of evaluation
    assert Lanes.num_open == before
    assert (run.summary["num_videos"], run.summary["num_video_failures"]) == (num_videos, 4 - num_videos)
