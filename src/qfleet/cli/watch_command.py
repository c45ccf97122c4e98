"""`qfleet watch RUN`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.config.checks import MAX_EPISODES, MAX_FRAMES_PER_SECOND, MAX_SEED, check_checkpoint, check_count
from qfleet.runtime.finding_runs import POLICY_HELP, find_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WatchFlags:
    """Plays greedy episodes with what a run has learned, and writes a video of each, as an mp4 and a GIF."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=POLICY_HELP)]
    episodes: int = 1
    """Number of episodes to play."""
    checkpoint: int | Literal["best"] | None = None
    """Environment step of the checkpoint to watch, or `best` for that of the best evaluation.
    The default is the newest one."""
    train_seed: int | None = None
    """Seed to watch, of a run with several seeds. The default is the first one."""
    seed: int = 0
    """Seed of the episodes."""
    out: str | None = None
    """Folder for the videos. The default is `videos` in the run's folder, or in zoo/NAME for an agent of the zoo."""
    frames_per_second: int = 30
    """Frames per second of the mp4, in which each step is one frame."""
    trust: bool = False
    """Import modules (MODULE:NAME, of the environment or the agent's parts) that only the run's folder names.
    Importing runs their code."""


def run(arguments: Sequence[str]) -> int:
    """Films the run that the flags name."""
    flags = tyro.cli(_WatchFlags, prog="qfleet watch", args=list(arguments), registry=FLAG_TYPES)
    check_count("episodes", flags.episodes, maximum=MAX_EPISODES)
    check_count("seed", flags.seed, minimum=0, maximum=MAX_SEED)
    check_count("frames_per_second", flags.frames_per_second, maximum=MAX_FRAMES_PER_SECOND)
    check_checkpoint(flags.checkpoint)
    run_dir = find_run(flags.run)
    from qfleet.runtime.signals import interrupts_held_back

    with interrupts_held_back():
        from qfleet.api import load
        from qfleet.loading import videos_folder
        from qfleet.runtime.video import check_extra

    check_extra()  # before loading the checkpoint, which takes a while
    folder = Path(flags.out) if flags.out else videos_folder(run_dir)
    policy = load(run_dir, checkpoint=flags.checkpoint, seed=flags.train_seed, trust=flags.trust)
    videos = policy.film(folder, flags.episodes, flags.seed, flags.frames_per_second)
    for i, video in enumerate(videos):
        print(f"episode {i}: return {video.episode_return:.1f} in {video.episode_steps} steps", flush=True)
        print(f"  {folder / video.mp4.name}\n  {folder / video.gif.name}", flush=True)
    return 0
