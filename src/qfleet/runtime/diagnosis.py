"""What is wrong with a run that doesn't learn, from its metrics, its config and its summary.

Each check looks for one fault. It says nothing if the run hasn't measured what it needs. docs/diagnose.md explains each
finding, and how the thresholds were measured.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from qfleet.config import TrainConfig
from qfleet.runtime.evidence import MIN_LEARNER_STEPS, Evidence

MEASURED = "measured: benchmarks/diagnose.py"
"""Source of a threshold that lies between healthy runs and runs made to fail."""

MIN_EPISODES = 10
"""Least number of training episodes before a lack of rewards or of ends means anything."""

LEAST_REPLAY_RATIO = 0.25
"""Least number of times that each environment step should be learned from: a third of the lowest published one."""

LEAST_SHARE_OF_RATIO = 0.5
"""Least share of the configured replay ratio that a limiter should let through."""

MIN_DUE_STEPS = 2_000
"""Least number of learner steps that must be due before being behind means anything: a fleet begins some behind."""

MOST_TRUNCATED = 0.95
"""Share of episodes from which on truncation dominates."""

LEAST_MOVE, MOST_MOVE = 0.01, 10.0
"""Norm of the change of the parameters between two evaluations, over the norm that they had before."""

LEAST_TARGET_UPDATES = 5
"""Least number of times that the target network should have been replaced."""

LEAST_TARGET_AGE = 10
"""Least number of learner steps in which a target network should be replaced, if it is to hold values still."""

MOST_DEAD = 0.8
"""Share of dormant hidden units from which on a network is too small for what it should learn."""

MOST_TIMES_BOUND = 3.0
"""Multiple of the greatest possible value from which on values count as exploded."""

LEAST_SHARE_OF_RETURN = 0.1
"""Share of the discounted returns below which values count as collapsed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    name: str
    """Such as `small_replay`; docs/diagnose.md has a section for each."""
    sentence: str
    """What is wrong, in one or two sentences."""
    figure: float
    """What was measured."""
    threshold: float
    """What the figure should not be above, or not be below."""
    source: str
    """Where the threshold comes from: a paper, or a measurement."""
    knob: str
    """What to change."""
    severity: Literal["high", "medium"]
    """`high` if nothing sound can be learned while it lasts, `medium` if it may be the reason why nothing is."""


def shown(number: float) -> str:
    """Returns a figure or a threshold as text: "40,064", "0.07031"."""
    return f"{number:,.0f}" if 1e3 <= abs(number) < 1e9 else f"{number:.4g}"


def diagnose(metrics: Mapping[str, np.ndarray], config: TrainConfig, summary: Mapping[str, Any]) -> list[Finding]:
    """Returns what is wrong with a run, the likeliest root cause first. An empty list means that nothing was found.

    Args:
      metrics: a column of each metric by name, as `qfleet.read_metrics` returns them; NaN where a record has no value.
      config: of the run.
      summary: content of its summary.json; empty while the run hasn't ended.
    """
    evidence = Evidence(metrics, config, summary)
    return [finding for check in _CHECKS if (finding := check(evidence)) is not None]


def _starved_learner(run: Evidence) -> Finding | None:
    """The learner hardly learns, because few learner steps are due or a limiter holds it back."""
    agent, planned = run.agent, run.config.num_learner_steps
    if not run.has_replay or run.has_learned:
        return None
    ratio = planned * agent.batch_size / run.config.env_steps
    if ratio < LEAST_REPLAY_RATIO:
        return Finding(
            name="starved_learner",
            sentence=f"Each environment step is learned from {ratio:.2g} times on average: the run has {planned:,} "
            f"learner steps of {agent.batch_size} transitions in {run.config.env_steps:,} environment steps.",
            figure=ratio,
            threshold=LEAST_REPLAY_RATIO,
            source="a third of the lowest published ratio, 0.78 (Horgan et al. 2018, arXiv 1803.00933)",
            knob=f"env_steps_per_learner_step (now {agent.env_steps_per_learner_step:g}) or warmup_env_steps (now "
            f"{agent.warmup_env_steps:,}) down",
            severity="high",
        )
    due = (run.env_steps - agent.warmup_env_steps) / agent.env_steps_per_learner_step
    share = run.learner_steps * run.num_learners / max(due, 1)
    if due < MIN_DUE_STEPS or share >= LEAST_SHARE_OF_RATIO:
        return None
    return Finding(
        name="starved_learner",
        sentence=f"The learner has taken {share:.0%} of the learner steps that are due by now.",
        figure=share,
        threshold=LEAST_SHARE_OF_RATIO,
        source="ours: a limiter holds the ratio within a few rounds",
        knob="more hardware for the learner, or env_steps_per_learner_step (now "
        f"{agent.env_steps_per_learner_step:g}) up to what it can do",
        severity="high",
    )


def _small_replay(run: Evidence) -> Finding | None:
    """The replay holds less than one episode of each lane."""
    length = run.newest("episode_length_mean")
    if not run.has_replay or length is None or run.has_learned:
        return None
    rows = run.agent.replay_capacity // run.config.topology.num_envs
    if rows >= length:
        return None
    return Finding(
        name="small_replay",
        sentence=f"The replay holds {rows:,} steps of each of {run.config.topology.num_envs} lanes, less than one "
        f"episode, which takes {length:,.0f} steps on average: a batch never covers a whole one.",
        figure=float(rows),
        threshold=length,
        source="one episode; Fedus et al. 2020, arXiv 2007.06700, on how more capacity helps",
        knob=f"replay_capacity (now {run.agent.replay_capacity:,}) up, or num_envs down",
        severity="medium",
    )


def _exploration_ended(run: Evidence) -> Finding | None:
    """Exploration had decayed while no episode had brought any reward yet."""
    start, end = run.agent.exploration_start, run.agent.exploration_end
    exploration, env_steps = run.column("exploration"), run.column("env_steps")
    has_ended = exploration <= end + 0.05 * (start - end)
    if start == end or run.has_learned or not np.any(has_ended) or has_ended[0]:
        return None
    ended_at = float(env_steps[has_ended][0])
    in_vain = (env_steps > ended_at) & (env_steps < run.first_reward_at) & (run.column("num_episodes") > 0)
    share = ended_at / run.env_steps
    if not np.any(in_vain) or share > 0.5:
        return None
    reward = "None has come since" if math.isinf(run.first_reward_at) else f"It came at {run.first_reward_at:,.0f}"
    return Finding(
        name="exploration_ended",
        sentence=f"Exploration had come to its end, {end:g}, by environment step {ended_at:,.0f}, before the first "
        f"reward. {reward}.",
        figure=ended_at,
        threshold=min(run.first_reward_at, float(run.env_steps)),
        source="the first reward of this run; Mnih et al. 2015 explore for 2 % of the run, 1,000,000 frames of 50 M",
        knob=f"exploration_env_steps (now {run.agent.exploration_env_steps:,}) or exploration_end (now {end:g}) up",
        severity="high",
    )


def _no_reward(run: Evidence) -> Finding | None:
    """No reward has differed from zero."""
    if not math.isinf(run.first_reward_at) or run.num_episodes < MIN_EPISODES:
        return None
    return Finding(
        name="no_reward",
        sentence=f"No reward has differed from zero in {run.num_episodes:,} training episodes and in evaluations: "
        f"there is nothing to learn from yet.",
        figure=0.0,
        threshold=0.0,
        source="the returns of this run",
        knob="longer or stronger exploration (exploration_env_steps, exploration_end), a reward on the way, an easier "
        "start; `qfleet check-env` plays the environment",
        severity="high",
    )


def _learning_rate(run: Evidence) -> Finding | None:
    """The parameters move too far or too little."""
    moves = run.moves
    if not len(moves) or run.learner_steps < MIN_LEARNER_STEPS:
        return None
    finding = functools.partial(Finding, name="learning_rate", severity="high", source=MEASURED)
    if (most := float(moves.max())) > MOST_MOVE:
        return finding(
            sentence=f"Between two evaluations the parameters moved {most:,.1f} times as far as they were long: the "
            f"learning rate is too high.",
            figure=most,
            threshold=MOST_MOVE,
            knob=f"learning_rate (now {run.agent.learning_rate:g}) down, or max_gradient_norm down",
        )
    if (whole := float(moves.sum())) < LEAST_MOVE:
        return finding(
            sentence=f"In {run.learner_steps:,} learner steps the parameters moved {whole:.2g} of their length: the "
            f"learning rate is too low.",
            figure=whole,
            threshold=LEAST_MOVE,
            knob=f"learning_rate (now {run.agent.learning_rate:g}) up",
        )
    return None


def _target_network(run: Evidence) -> Finding | None:
    """The target network follows too slowly, or so fast that it holds nothing still."""
    if not run.has_replay or run.learner_steps < MIN_LEARNER_STEPS or run.has_learned:
        return None
    age = run.target_age
    finding = functools.partial(Finding, name="target_network", severity="medium")
    knob = f"target_update_period (now {run.agent.target_update_period:,})"
    rate = f" or target_update_rate (now {run.agent.target_update_rate:g})" if run.agent.target_update_rate < 1 else ""
    num_learner_steps, n_step = run.config.num_learner_steps // run.num_learners, run.agent.n_step
    if (num_updates := num_learner_steps / age) < LEAST_TARGET_UPDATES and run.horizon > num_updates * n_step:
        return finding(
            sentence=f"The target network is replaced {num_updates:.2g} times in the {num_learner_steps:,} learner "
            f"steps of the run. Each time, values look {n_step} environment step{'s' if n_step > 1 else ''} further "
            f"ahead, and {run.horizon:,.0f} count.",
            figure=num_updates,
            threshold=LEAST_TARGET_UPDATES,
            source="ours: rewards travel n_step steps per update (Mnih et al. 2015: 5,000 updates)",
            knob=f"{knob} down{rate and rate + ' up'}, or a longer run (env_steps)",
        )
    if age < LEAST_TARGET_AGE:
        return finding(
            sentence=f"The target network is replaced in {age:g} learner step{'' if age == 1 else 's'}, so it holds no "
            f"value still, and returns don't get better.",
            figure=age,
            threshold=LEAST_TARGET_AGE,
            source="ours; van Hasselt et al. 2018, arXiv 1812.02648: values diverge more often the faster it is",
            knob=f"{knob} up{rate and rate + ' down'}",
        )
    return None


def _dead_units(run: Evidence) -> Finding | None:
    """Most hidden units are dormant."""
    share = run.newest("dead_units_fraction")
    if share is None or share <= MOST_DEAD:
        return None
    return Finding(
        name="dead_units",
        sentence=f"{share:.0%} of the hidden units are dormant: they hardly ever fire on what the agent meets.",
        figure=share,
        threshold=MOST_DEAD,
        source=f"Sokar et al. 2023, arXiv 2302.12902, tau 0.025; threshold {MEASURED}",
        knob="learning_rate down, layer_norm on, env_steps_per_learner_step up, wider hidden_sizes",
        severity="high",
    )


_AGAINST_EXPLOSION = "learning_rate down, target_update_period up, double on, max_gradient_norm down"


def _exploded_values(run: Evidence) -> Finding | None:
    """Values beyond what rewards can explain."""
    reward, most_return = run.largest("reward_abs_max"), run.largest("episode_return_mean", "eval_return_mean")
    per_step = most_return if reward is None else reward  # a bound that is looser by far, where rewards aren't known
    if "the values diverged" in str(run.summary.get("error")):
        return _diverged(run)
    value = run.newest("eval_value_mean")
    bound = (per_step or math.inf) / (1 - run.agent.discount) if run.agent.discount < 1 else math.inf
    if value is None or abs(value) <= MOST_TIMES_BOUND * bound:
        return None
    return Finding(
        name="exploded_values",
        severity="high",
        sentence=f"The values have exploded: they are {value:,.4g} on average, and rewards of at most "
        f"{per_step:,.3g} can't make more than {bound:,.4g}.",
        figure=abs(value),
        threshold=MOST_TIMES_BOUND * bound,
        source="greatest reward / (1 - discount), three times: van Hasselt et al. 2018, arXiv 1812.02648",
        knob=_AGAINST_EXPLOSION,
    )


def _diverged(run: Evidence) -> Finding:
    """Returns the finding of a run that ended because its loss wasn't finite any more."""
    return Finding(
        name="exploded_values",
        severity="high",
        sentence="The values have exploded: the run ended, because its loss wasn't a finite number any more.",
        figure=run.largest("q_mean") or 0.0,
        threshold=float(np.finfo(np.float32).max),
        source="the greatest 32-bit number",
        knob=_AGAINST_EXPLOSION,
    )


def _collapsed_values(run: Evidence) -> Finding | None:
    """Values far below the returns that follow."""
    values, returns = (np.abs(run.values(f"eval_{name}_mean")[-3:]) for name in ("value", "discounted_return"))
    reward = run.largest("reward_abs_max")
    if reward and run.has_replay:  # each update of the target network lets values look n_step steps further ahead
        returns = np.minimum(returns, reward * run.agent.n_step * (run.learner_steps / run.target_age + 1))
    if len(values) < 3 or len(returns) < 3 or run.learner_steps < MIN_LEARNER_STEPS or not np.all(returns > 0):
        return None
    share = float(np.max(values / returns))
    if share >= LEAST_SHARE_OF_RETURN:
        return None
    return Finding(
        name="collapsed_values",
        severity="high",
        sentence=f"The values have collapsed: their size is {values[-1]:.3g}, where discounted returns of "
        f"{returns[-1]:.3g} can be known by now.",
        figure=share,
        threshold=LEAST_SHARE_OF_RETURN,
        source=MEASURED,
        knob="weight decay and other optimiser_options, max_gradient_norm and huber_delta up, learning_rate",
    )


def _truncation(run: Evidence) -> Finding | None:
    """Almost all episodes end at a time limit, and returns don't get better."""
    shares = run.values("truncated_fraction")
    share = float(np.mean(shares)) if len(shares) else None
    evaluated = run.values("eval_truncated_fraction")
    if not len(evaluated) or run.has_learned or run.num_episodes < MIN_EPISODES:
        return None
    share = float(np.mean(evaluated)) if share is None else min(share, float(np.mean(evaluated)))
    if share < MOST_TRUNCATED:
        return None
    return Finding(
        name="truncation",
        sentence=f"{share:.0%} of the episodes end at a time limit, and returns don't get better: an end that the "
        f"environment itself decides is hardly ever seen.",
        figure=share,
        threshold=MOST_TRUNCATED,
        source="ours; Pardo et al. 2018, arXiv 1712.00378, on what time limits hide",
        knob="the environment's time limit up, exploration longer (exploration_env_steps), n_step up",
        severity="medium",
    )


_CHECKS: tuple[Callable[[Evidence], Finding | None], ...] = (
    _starved_learner,
    _small_replay,
    _exploration_ended,
    _no_reward,
    _target_network,
    _learning_rate,
    _dead_units,
    _exploded_values,
    _collapsed_values,
    _truncation,
)
"""In the order in which they explain each other: each finding is likelier to be a cause of later ones than the reverse.
That all episodes are truncated comes last, because whatever keeps an agent from learning may lead to it."""
