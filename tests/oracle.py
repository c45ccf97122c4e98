"""A slow replay in plain Python to compare the fast one with, and a random stream of experience for both.

Every row keeps its place in history, and every observation carries its own number, so that a sampled transition shows
where it comes from.
"""

import dataclasses
import random

import numpy as np

CONTINUED, TERMINATED, TRUNCATED, NO_STEP = range(4)

BLANK = 0
"""The number of the frame of zeros that stands for the time before an episode."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One lane's part of a row."""

    number: int
    """The number of the observation, which is unique and above `BLANK`."""
    action: int
    reward: float
    terminated: bool
    truncated: bool
    final: bool
    """Whether the observation is the last one of an episode, so that no step was taken."""

    @property
    def outcome(self) -> int:
        if self.final:
            return NO_STEP
        return TERMINATED if self.terminated else TRUNCATED if self.truncated else CONTINUED


@dataclasses.dataclass(frozen=True)
class OracleTransition:
    """The values that a sampled transition must have. Frames are given by their numbers, oldest first."""

    frames: tuple[int, ...]
    action: int
    reward: float
    discount: float
    next_frames: tuple[int, ...]


def random_stream(seed: int, num_rows: int, num_lanes: int, end_probability: float = 0.25) -> list[list[Step]]:
    """Returns rows of random steps. Each step continues its episode, or ends it by termination, truncation or both.

    The action and the reward of a final row mean nothing, so they are numbers that would be noticed if they were used.
    """
    rng = random.Random(seed)
    rows, is_final = [], [False] * num_lanes
    for t in range(num_rows):
        row = []
        for lane in range(num_lanes):
            number, final = t * num_lanes + lane + 1, is_final[lane]
            ends = not final and rng.random() < end_probability
            terminated, truncated = rng.choice([(True, False), (False, True), (True, True)]) if ends else (False, False)
            reward = 1e6 if final else rng.uniform(-1, 1)
            row.append(Step(number, rng.randrange(5), reward, terminated, truncated, final))
            is_final[lane] = ends
        rows.append(row)
    return rows


class OracleReplay:
    """Keeps all history, and knows which part of it the replay may still show."""

    def __init__(self, num_rows: int, num_lanes: int, n_step: int, frame_stack: int, discount: float) -> None:
        self.num_rows, self.num_lanes = num_rows, num_lanes
        self.n_step, self.frame_stack, self.discount = n_step, frame_stack, discount
        self.history: list[list[Step]] = []

    def insert(self, row: list[Step]) -> None:
        self.history.append(row)

    @property
    def times(self) -> range:
        """Times of the rows that the replay still holds."""
        return range(max(0, len(self.history) - self.num_rows), len(self.history))

    def frames(self, t: int, lane: int) -> tuple[int, ...]:
        """Returns the frames that the agent saw at row t, as far back as its frame stack and its episode reach."""
        frames = [self.history[t][lane].number]
        while len(frames) < self.frame_stack:
            t -= 1
            if t < 0 or self.history[t][lane].final:
                break
            frames.insert(0, self.history[t][lane].number)
        return (BLANK,) * (self.frame_stack - len(frames)) + tuple(frames)

    def transition(self, t: int, lane: int) -> OracleTransition:
        """Returns the transition that starts at row t: n steps, or fewer if the episode ends earlier."""
        reward, discount = 0.0, 1.0
        end = t
        while end < t + self.n_step:
            step = self.history[end][lane]
            assert not step.final
            reward += discount * step.reward
            discount *= self.discount
            end += 1
            if step.outcome != CONTINUED:
                discount = 0.0 if step.outcome == TERMINATED else discount
                break
        return OracleTransition(
            self.frames(t, lane), self.history[t][lane].action, reward, discount, self.frames(end, lane)
        )

    def drawable(self, forgets_early: bool = False) -> list[tuple[int, int]]:
        """Returns time and lane of every transition that can be drawn now, oldest first.

        A transition can be drawn if the ring holds its step, the n rows after it, and the frames below it. Frames that
        would lie before the very first row are blank, so they are not missed until the ring is full.

        Args:
          forgets_early: whether such frames are missed earlier, as soon as their places in the ring are used.
        """
        never_full = len(self.history) < self.num_rows
        return [
            (t, lane)
            for t in self.times
            for lane in range(self.num_lanes)
            if not self.history[t][lane].final
            and t + self.n_step < len(self.history)
            and (t - self.frame_stack + 1 >= len(self.history) - self.num_rows or (never_full and not forgets_early))
        ]


@dataclasses.dataclass(frozen=True)
class OracleSequence:
    """The values that a sampled sequence must have. Fields after `number` are lists, row by row."""

    number: int
    """The number of the first row's observation, which its stored state carries too."""
    frames: list[tuple[int, ...]]
    is_first: list[bool]
    is_step: list[bool]
    """Of the learned rows only, as are the fields below. Those mean nothing where there is no step."""
    action: list[int]
    reward: list[float]
    discount: list[float]
    bootstrap: list[int]
    """Number of rows to the one to bootstrap from."""


class OracleSequences(OracleReplay):
    """A replay that shows sequences: `burn_in` rows, `length` rows that are learned from, and the rest of a window."""

    def __init__(
        self,
        num_rows: int,
        num_lanes: int,
        n_step: int,
        frame_stack: int,
        discount: float,
        *,
        burn_in: int,
        length: int,
        period: int,
    ) -> None:
        super().__init__(num_rows, num_lanes, n_step, frame_stack, discount)
        self.burn_in, self.length, self.period = burn_in, length, period

    def sequence(self, t: int, lane: int) -> OracleSequence:
        """Returns the sequence that starts at row t."""
        rows = range(t, t + self.burn_in + self.length + self.n_step)
        learned = rows[self.burn_in : self.burn_in + self.length]
        is_step = [not self.history[row][lane].final for row in learned]
        found = [
            self.transition(row, lane) if there else OracleTransition((), 0, 0.0, 0.0, ())
            for row, there in zip(learned, is_step, strict=True)
        ]
        return OracleSequence(
            number=self.history[t][lane].number,
            frames=[self.frames(row, lane) for row in rows],
            is_first=[row > t and self.history[row - 1][lane].final for row in rows],
            is_step=is_step,
            action=[each.action for each in found],
            reward=[each.reward for each in found],
            discount=[each.discount for each in found],
            bootstrap=[
                (each.next_frames[-1] - self.history[row][lane].number) // self.num_lanes if each.next_frames else 0
                for row, each in zip(learned, found, strict=True)
            ],
        )

    def drawable(self, forgets_early: bool = False) -> list[tuple[int, int]]:
        """Returns time and lane of every sequence that can be drawn now, as for transitions.

        They start `period` rows apart, and hold a step that is learned from.
        """
        never_full = len(self.history) < self.num_rows
        return [
            (t, lane)
            for t in self.times
            for lane in range(self.num_lanes)
            if t % self.period == 0
            and t + self.burn_in + self.length + self.n_step - 1 < len(self.history)
            and any(not self.history[t + self.burn_in + i][lane].final for i in range(self.length))
            and (t - self.frame_stack + 1 >= len(self.history) - self.num_rows or (never_full and not forgets_early))
        ]


class OraclePriorities:
    """The priorities that the transitions of an `OracleReplay` must have, to the power alpha."""

    def __init__(self, replay: OracleReplay, exponent: float, smallest: float) -> None:
        self.replay, self.exponent, self.smallest = replay, exponent, smallest
        self.greatest = 1.0
        self.of: dict[tuple[int, int], float] = {}

    def insert(self, row: list[Step]) -> None:
        """Inserts `row` into the replay. Transitions that it makes drawable enter at the greatest priority."""
        self.replay.insert(row)
        drawable = self.replay.drawable(forgets_early=True)
        self.of = {start: self.of.get(start, self.greatest) for start in drawable}

    def set(self, errors: dict[tuple[int, int], float]) -> None:
        """Sets the priorities of transitions, by time and lane, from their TD errors, unless they are overwritten."""
        for start, error in errors.items():
            priority = (abs(error) + self.smallest) ** self.exponent
            self.greatest = max(self.greatest, priority)
            if start in self.of:
                self.of[start] = priority

    def leaves(self) -> np.ndarray:
        """Returns the priority at each slot of the ring, `[rows * lanes]`, which is 0 where no transition can start."""
        leaves = np.zeros((self.replay.num_rows, self.replay.num_lanes))
        for (t, lane), priority in self.of.items():
            leaves[t % self.replay.num_rows, lane] = priority
        return leaves.reshape(-1)


def encode(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns observations that carry their numbers: `[...]` to `[..., 2, 2]`, uint8 images or float arrays."""
    places = np.array([[1, 256], [256**2, 256**3]])
    return (numbers[..., None, None] // places % 256).astype(dtype)


def decode(observations: np.ndarray) -> np.ndarray:
    """Returns the numbers that `encode` encoded."""
    places = np.array([[1, 256], [256**2, 256**3]])
    return (observations.astype(np.int64) * places).sum((-2, -1))


def columns(rows: list[list[Step]], field: str) -> np.ndarray:
    """Returns one field of a stream as an array, `[rows, lanes]`."""
    return np.array([[getattr(step, field) for step in row] for row in rows])
