"""`qfleet eval RUN`."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.cli.show import evaluation_in_words, status_line
from qfleet.cli.streams import only_the_answer_on_stdout
from qfleet.config import RunFailed
from qfleet.config.checks import MAX_EPISODES, MAX_SEED, check_checkpoint, check_count
from qfleet.runtime.finding_runs import POLICY_HELP, find_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalFlags:
    """Plays episodes with what a run has learned, on seeds that training does not use."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=POLICY_HELP)]
    episodes: int = 100
    """Number of episodes to play."""
    checkpoint: int | Literal["best"] | None = None
    """Environment step of the checkpoint to evaluate, or `best` for that of the best evaluation.
    The default is the newest one."""
    train_seed: int | None = None
    """Seed to evaluate, of a run with several seeds. The default is the first one."""
    seed: int = 0
    """Seed of the episodes."""
    exploration: float | None = None
    """Probability of a random action. The default is the run's eval_exploration."""
    max_episode_steps: int | None = None
    """Environment steps after which an episode is cut. The default is the limit of the run's evaluations."""
    num_env_workers: int | None = None
    """Processes that step an environment that isn't written in JAX. The default is as in training."""
    trust: bool = False
    """Import modules (MODULE:NAME, of the environment or the agent's parts) that only the run's folder names.
    Importing runs their code."""
    json: bool = False
    """Print one line of JSON."""


def run(arguments: Sequence[str]) -> int:
    """Evaluates the run that the flags name."""
    flags = tyro.cli(_EvalFlags, prog="qfleet eval", args=list(arguments), registry=FLAG_TYPES)
    check_count("episodes", flags.episodes, maximum=MAX_EPISODES)
    check_count("seed", flags.seed, minimum=0, maximum=MAX_SEED)
    check_checkpoint(flags.checkpoint)
    run_dir = find_run(flags.run)
    from qfleet.runtime.signals import interrupts_held_back

    with interrupts_held_back():
        from qfleet.api import load
        from qfleet.runtime.activity import announce

    with only_the_answer_on_stdout(flags.json), status_line():
        announce("loading")
        policy = load(run_dir, checkpoint=flags.checkpoint, seed=flags.train_seed, trust=flags.trust)
        given = {name: getattr(flags, name) for name in ("exploration", "max_episode_steps", "num_env_workers")}
        given = {name: value for name, value in given.items() if value is not None}
        options = dataclasses.replace(policy.options, **given)
        announce(f"evaluating {flags.episodes} episodes")
        episodes = policy.play_episodes(flags.episodes, flags.seed, options)
    returns = episodes.returns.tolist()
    if not returns:
        raise RunFailed(f"{policy.spec.name} failed in every episode")
    result = {
        "run": run_dir,
        "env": policy.spec.name,
        "episodes": len(returns),
        "different_episodes": int(episodes.num_different()),
        "cut_episodes": int(episodes.was_cut.sum()),
        "episode_limit": policy.episode_limit(options),
        "exploration": options.exploration,
        "return_mean": statistics.fmean(returns),
        "return_std": statistics.pstdev(returns),
        "return_min": min(returns),
        "return_max": max(returns),
        "returns": returns,
    }
    if flags.json:
        from qfleet.runtime.run_directory import strict_json

        print(strict_json(result))
    else:
        words = evaluation_in_words(
            len(returns),
            num_different=result["different_episodes"],
            num_cut=result["cut_episodes"],
            limit=result["episode_limit"],
            exploration=options.exploration,
        )
        print(
            f"{policy.spec.name}: mean greedy return {result['return_mean']:.1f} {words} "
            f"(std {result['return_std']:.1f}, min {result['return_min']:.1f}, max {result['return_max']:.1f})"
        )
    return 0
