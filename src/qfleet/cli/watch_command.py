"""`qfleet watch RUN`."""

import dataclasses
from collections.abc import Sequence

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WatchFlags:
    """Writes videos of greedy episodes with what a run has learned, each as an mp4 and a GIF."""

    run: tyro.conf.Positional[str]
    """The run's folder."""
    episodes: int = 1
    """Episodes to play."""
    checkpoint: int | None = None
    """The environment step of another checkpoint than the newest."""
    train_seed: int | None = None
    """Of a run with many seeds, which one to watch; the first by default."""
    seed: int = 0
    """Of the episodes."""
    out: str | None = None
    """The folder for the videos, instead of the run's folder `videos`."""
    frames_per_second: int = 30
    """Of the mp4, where each step is one frame."""


def run(arguments: Sequence[str]) -> int:
    """Films the run that the flags name."""
    flags = tyro.cli(_WatchFlags, prog="qfleet watch", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    from qfleet.api import load
    from qfleet.runtime.run_directory import RunDirectory
    from qfleet.runtime.video import check_extra

    check_extra()  # before the wait for the checkpoint
    directory = RunDirectory.open(flags.run)
    policy = load(flags.run, checkpoint=flags.checkpoint, seed=flags.train_seed)
    videos = policy.film(flags.out or directory.videos_path, flags.episodes, flags.seed, flags.frames_per_second)
    for i, video in enumerate(videos):
        print(f"episode {i}: return {video.episode_return:.1f} in {video.episode_steps} steps", flush=True)
        print(f"  {video.mp4}\n  {video.gif}", flush=True)
    return 0
