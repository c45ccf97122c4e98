"""What the terminal says of an evaluation."""

from typing import Any

import pytest

from qfleet.cli.show import evaluation_in_words, outcome

SUMMARY: dict[str, Any] = {
    "env": "CartPole-v1",
    "stopped": "return reached", "env_steps": 4096, "learner_steps": 64, "wall_seconds": 2.0, "seed": 3, "num_seeds": 1,
    "eval_return_mean": 85.0, "eval_returns": [[85.0] * 100], "eval_num_different": 2, "eval_num_cut": 0,
    "eval_episode_limit": None, "eval_exploration": 0.0, "eval_at_env_steps": 4096, "confirmed_by_new_episodes": [40],
    "solved_at_env_steps": [4096], "num_videos": 0, "num_video_failures": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((100, 2, 0, None, 0.0), "over 100 episodes, 2 of them different"),
        ((100, 100, 0, 500, 0.0), "over 100 episodes, all different"),
        ((1, 1, 0, None, 0.0), "over 1 episode"),
        ((20, 18, 3, 500, 0.0), "over 20 episodes, 18 of them different, 3 of 20 cut at 500 steps"),
        ((20, 20, 0, None, 0.001), "over 20 episodes with 0.1% random actions, all different"),
    ],
)
def test_a_mean_return_is_said_with_what_it_was_measured_over(counts: tuple, words: str) -> None:
    num_episodes, num_different, num_cut, limit, exploration = counts
    said = evaluation_in_words(
        num_episodes, num_different=num_different, num_cut=num_cut, limit=limit, exploration=exploration
    )
    assert said == words


def test_the_outcome_says_how_many_episodes_were_different_and_when_they_were_played() -> None:
    assert "mean greedy return: 85.0 over 100 episodes, 2 of them different\n" in outcome(SUMMARY, "runs/a")
    later = outcome(SUMMARY | {"env_steps": 5000}, "runs/a")
    assert "over 100 episodes, 2 of them different, after 4,096 environment steps\n" in later
    assert "mean greedy return" not in outcome(SUMMARY | {"eval_return_mean": None, "eval_returns": None}, "runs/a")


def test_the_outcome_says_if_a_return_was_confirmed_by_the_same_episodes_again() -> None:
    assert "deterministic" not in outcome(SUMMARY, "runs/a")
    again = outcome(SUMMARY | {"confirmed_by_new_episodes": [0]}, "runs/a")
    assert "the episodes that confirm the return repeat earlier ones: the environment is deterministic" in again
    assert "--eval-exploration 0.001" in again


def test_the_commands_that_it_prints_can_be_pasted() -> None:
    assert "next: qfleet eval 'my runs/a' | qfleet resume 'my runs/a' --env-steps" in outcome(SUMMARY, "my runs/a")
    stopped = SUMMARY | {"stopped": "interrupted", "env_steps": 0, "eval_return_mean": None, "eval_returns": None}
    assert outcome(stopped, "runs/a").endswith("\nnext: qfleet resume runs/a"), "there is no checkpoint to evaluate"
