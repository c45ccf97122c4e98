"""Atari on ALE's native vector environment, against a plain loop over its emulator."""

from typing import Any

import numpy as np
import pytest

from qfleet.config import ConfigError
from qfleet.envs import ale
from qfleet.envs.conformance import check, record
from qfleet.envs.host import LaneOptions

ale_py = pytest.importorskip("ale_py")


def test_conformance() -> None:
    env = ale.make("Breakout")
    assert (env.spec.observation_shape, env.spec.frame_stack, env.spec.time_limit) == ((84, 84), 4, 27_000)
    assert [c for c in check(env, num_steps=120) if not c.is_ok] == []


def test_sticky_actions_and_the_full_set_are_options() -> None:
    assert ale.make("Pong").spec.num_actions == 6
    env = ale.make("Pong", full_action_space=True, repeat_action_probability=0.25)
    assert env.spec.num_actions == 18
    assert [c for c in check(env, num_steps=40) if not c.is_ok] == []


@pytest.mark.parametrize("name", ["MsPacman", "ms_pacman", "mspacman"])
def test_a_game_may_be_written_in_any_case(name: str) -> None:
    assert ale.make(name).spec.num_actions == 9


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"ALE has no game 'Pongg'\. Did you mean Pong"):
        ale.make("Pongg")
    with pytest.raises(ConfigError, match=r"repeat_action_probability must be in \[0, 1\], got 25"):
        ale.make("Pong", repeat_action_probability=25)
    with pytest.raises(ConfigError, match="num_env_workers must be 0 for ale:Pong"):
        ale.make("Pong").make_lanes(1, LaneOptions(num_env_workers=1))


def area_weights(size: int) -> np.ndarray:
    """Returns the share of each pixel in each of the 84 averages, `[84, size]`."""
    edges, pixels = np.arange(85) * size / 84, np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(covered, 0, None) * 84 / size


ROWS, COLUMNS = area_weights(210), area_weights(160)


@pytest.mark.parametrize("is_training", [False, True])
def test_rows_are_those_of_a_plain_loop_over_the_emulator(is_training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers frame skip, max-pooling, rewards, lives, game over and restart, but not the no-ops at the start.

    Only ALE knows their number.
    """
    monkeypatch.setattr(ale, "NOOP_MAX", 0)
    env = ale.make("Breakout")
    actions = np.random.default_rng(0).integers(4, size=(260, 1), dtype=np.int32)
    lanes = (env.make_lanes if is_training else env.make_eval_lanes)(1, LaneOptions())
    recorded = record(lanes, 0, actions)
    lanes.close()

    emulator = ale_py.ALEInterface()
    emulator.setFloat("repeat_action_probability", 0.0)
    emulator.loadROM(ale_py.roms.get_rom_path("breakout"))
    emulator.reset_game()
    ended = False
    for t, action in enumerate(actions[:, 0]):
        starts, lives, reward = ended, emulator.lives(), 0
        if emulator.game_over():
            emulator.reset_game()
            screens = [emulator.getScreenGrayscale()]
        else:
            screens = []
            for _ in range(4):  # after a lost life, all four are no-ops
                if not emulator.game_over():
                    reward += emulator.act(emulator.getMinimalActionSet()[ale.NOOP if starts else action])
                    screens.append(emulator.getScreenGrayscale())
        is_over = emulator.game_over()
        ended = not starts and (is_over or (is_training and emulator.lives() < lives))
        assert (recorded.reward[t, 0], recorded.terminated[t, 0]) == (0 if starts else reward, ended), t
        if t % 5 == 0 and not is_over:  # ALE doesn't draw a game's last screen; a terminal state has no value
            expected = ROWS @ np.max(screens[-2:], axis=0) @ COLUMNS.T
            np.testing.assert_allclose(recorded.observation[t + 1, 0], expected, atol=1)
    assert recorded.terminated.sum() > (5 if is_training else 0) and recorded.reward.any()  # more than one game


def test_training_clips_rewards_and_ends_at_lives_where_evaluation_does_not() -> None:
    env = ale.make("SpaceInvaders")
    actions = np.random.default_rng(0).integers(6, size=(250, 2), dtype=np.int32)
    recordings = []
    for make_lanes in (env.make_lanes, env.make_eval_lanes):
        lanes = make_lanes(2, LaneOptions())
        recordings.append(record(lanes, 0, actions))
        lanes.close()
    training, evaluation = recordings
    assert set(np.unique(training.reward)) == {0, 1} and evaluation.reward.max() >= 5
    assert training.terminated.sum() > evaluation.terminated.sum()


class ScriptedAle:
    """Stands in for ALE's vector environment. The lives and ends of its only lane are scripted; screens count rows."""

    num_envs = 1

    def __init__(self, script: list[tuple[int, bool, bool]]) -> None:
        self.script, self.row, self.sent = script, 0, []

    def reset(self, seed: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self.screen(), {"lives": np.array([3], np.int32)}

    def send(self, action: np.ndarray) -> None:
        self.sent.append(int(action[0]))

    def recv(self) -> tuple[Any, ...]:
        lives, terminated, truncated = self.script[self.row]
        self.row += 1
        return (
            self.screen(),
            np.array([1], np.int32),
            np.array([terminated]),
            np.array([truncated]),
            {"lives": np.array([lives], np.int32)},
        )

    def screen(self) -> np.ndarray:
        return np.full((1, 1, 2, 2), self.row, np.uint8)


def run_script(script: list[tuple[int, bool, bool]]) -> tuple[list[int], list[tuple[int, bool, bool]]]:
    fake = ScriptedAle(script)
    backend = ale.AleVector(fake, lives_end_episodes=True)
    backend.begin([0])
    rows = []
    for _ in script:
        backend.send(np.array([2], np.int32))
        step = backend.recv()
        rows.append((int(step.observation[0, 0, 0]), bool(step.terminated[0]), bool(step.truncated[0])))
    return fake.sent, rows


def test_a_lost_life_terminates_and_the_game_goes_on_after_a_no_op() -> None:
    sent, rows = run_script([(3, False, False), (2, False, False), (2, False, False), (1, False, False)])
    assert sent == [2, 2, ale.NOOP, 2]
    assert rows == [(1, False, False), (2, True, False), (3, False, False), (4, True, False)]


def test_without_lives_left_the_game_ends_only_once() -> None:
    _, rows = run_script([(1, False, False), (1, False, False), (0, False, False), (0, True, False), (3, False, False)])
    assert [terminated for _, terminated, _ in rows] == [True, False, False, True, False]


@pytest.mark.parametrize("end", [(True, False), (False, True)])
def test_a_game_that_ends_in_that_no_op_is_told_one_row_later(end: tuple[bool, bool]) -> None:
    """Row 2 starts an episode, so it can't report the end. Row 3 does, and shows the screen of row 2 again."""
    sent, rows = run_script([(2, False, False), (2, *end), (3, False, False), (3, False, False), (3, False, False)])
    assert rows[1:] == [(2, *end), (2, *end), (4, False, False), (5, False, False)]
    assert sent == [2, ale.NOOP, 2, ale.NOOP, 2]
