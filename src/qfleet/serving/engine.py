"""A policy as a server runs it: in batches of a few sizes, with the memories of many episodes side by side."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from qfleet.config import ConfigError
from qfleet.config.values import show
from qfleet.core.masks import shown
from qfleet.core.memory import MemoryState
from qfleet.core.types import Params
from qfleet.policy import Policy


class UnknownSession(Exception):
    """A session isn't known, or there is no room for another one. The text says which, and what to do."""


class Question(NamedTuple):
    """Observations that want actions."""

    obs: np.ndarray
    """`[batch, ...]`, encoded."""
    sessions: tuple[str, ...] = ()
    """For each observation, the session whose episode it goes on with; nothing without sessions."""
    is_first: np.ndarray | None = None
    """`[batch]` bool, which of them begin an episode; None without sessions."""


class Actions(NamedTuple):
    """What a policy says to some observations."""

    actions: Any
    """`[batch, ...]`, as the environment takes them."""
    q_values: np.ndarray
    """`[batch, num_actions]` float32; -inf where an action is invalid."""
    label: str
    """The checkpoint of the policy."""


class Engine:
    """Runs one policy. Only `encode` may be called by several threads."""

    def __init__(self, policy: Policy, max_batch: int, max_sessions: int, session_seconds: float) -> None:
        """Compiles nothing yet.

        Args:
          policy: the policy.
          max_batch: most observations in one batch.
          max_sessions: most episodes whose memory is kept.
          session_seconds: time without an observation after which a session may be forgotten.
        """
        self.policy = policy
        self._sizes = [1 << i for i in range((max_batch - 1).bit_length() + 1)]
        self.takes_sessions = policy.is_recurrent or policy.spec.frame_stack > 1
        """Whether the policy can remember anything of an episode."""
        self._sessions = Sessions(max_sessions, session_seconds)
        self._table: MemoryState | None = None
        """The memories of all sessions, and of one more, which stands for the padding of a batch."""
        self._step = jax.jit(self._step_in_table, donate_argnums=1)

    @property
    def num_sessions(self) -> int:
        """Number of sessions that are remembered."""
        return len(self._sessions)

    def encode(self, obs: Any, mask: Any, sessions: tuple[str, ...], is_first: Sequence[bool] | None) -> Question:
        """Returns a question with observations as the agent sees them.

        Args:
          obs: a batch of observations, as `Policy` takes them; single frames if there are sessions.
          mask: which actions are valid, as `Policy` takes them, or None.
          sessions: a name for each observation, or nothing.
          is_first: whether each observation begins an episode; None if none does.

        Raises:
          ConfigError: if something isn't as the policy takes it.
        """
        if sessions and not self.takes_sessions:
            raise ConfigError("a policy that remembers nothing takes no sessions, got some; leave `sessions` out")
        if self.policy.is_recurrent and not sessions:
            raise ConfigError(
                "a policy with a recurrent network must know the episode of each observation, got no sessions; give "
                "`sessions`, a name for each, and `is_first`, which of them begin an episode"
            )
        batch, is_batch = self.policy.encode(obs, mask, is_frame=bool(sessions))
        if not is_batch:
            raise ConfigError("observations must be a batch, got one; put it into a list")
        if not sessions:
            return Question(batch)
        starts = np.zeros(len(batch), bool) if is_first is None else np.asarray(is_first)
        if len(sessions) != len(batch) or starts.shape != (len(batch),) or starts.dtype != bool:
            raise ConfigError(
                f"sessions and is_first must have one entry for each of {len(batch)} observations, got "
                f"{len(sessions)} and {show(is_first)}"
            )
        if len(set(sessions)) < len(sessions):
            raise ConfigError("the sessions of one request must differ, got one twice; send its observations in turn")
        return Question(batch, sessions, starts)

    def warm_up(self) -> None:
        """Compiles the programs of all sizes."""
        for size in self._sizes:
            if not self.policy.is_recurrent:
                np.asarray(self.policy.values(self._blank(size)))
            if self.takes_sessions:
                nobody = np.full(size, self._sessions.capacity, np.int32)
                self._run_step(nobody, self._blank(size, is_frame=True), np.ones(size, bool))

    def act(self, questions: Sequence[Question]) -> list[Actions | UnknownSession]:
        """Returns for each question its actions, or why there are none. At most `max_batch` observations in all."""
        found: list[Actions | UnknownSession | None] = [None] * len(questions)
        for has_sessions in (False, True):
            chosen, slots = [], []
            for i, question in enumerate(questions):
                if bool(question.sessions) == has_sessions:
                    try:
                        slots.append(self._slots_of(question))
                        chosen.append(i)
                    except UnknownSession as error:
                        found[i] = error
            if chosen:
                q = self._values([questions[i] for i in chosen], slots)
                ends = np.cumsum([len(questions[i].obs) for i in chosen])[:-1]
                for i, own in zip(chosen, np.split(q, ends), strict=True):
                    actions = self.policy.decode(np.argmax(own, axis=-1), True)
                    found[i] = Actions(actions, shown(own), self.policy.label)
        return [each for each in found if each is not None]

    def forget(self, session: str) -> bool:
        """Forgets a session, and returns whether it was known."""
        return self._sessions.forget(session)

    def take_over(self, other: "Engine") -> None:
        """Goes on with the sessions of another engine, if both policies remember the same."""
        if self._table is not None and other._table is not None and _shapes(self._table) == _shapes(other._table):
            self._sessions, self._table = other._sessions, other._table

    def _blank(self, size: int, *, is_frame: bool = False) -> np.ndarray:
        """Returns blank observations, or single frames, `[size, ...]`, encoded as those of a request are."""
        spec = self.policy.spec
        shape = spec.observation_shape if is_frame else spec.agent_observation_shape
        mask = np.ones((size, spec.num_actions), bool) if spec.has_action_mask else None
        return self.policy.encode(np.zeros((size, *shape), spec.observation_dtype), mask, is_frame=is_frame)[0]

    def _slots_of(self, question: Question) -> np.ndarray:
        starts = question.is_first
        if starts is None:
            return np.zeros(0, np.int32)
        return self._sessions.slots(question.sessions, starts.tolist())

    def _values(self, questions: Sequence[Question], slots: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the Q-values of all questions together, `[batch, num_actions]`."""
        obs = np.concatenate([question.obs for question in questions])
        size = next(size for size in self._sizes if size >= len(obs))
        padding = size - len(obs)
        padded = np.concatenate([obs, np.zeros((padding, *obs.shape[1:]), obs.dtype)])
        if not questions[0].sessions:
            return np.asarray(self.policy.values(padded))[: len(obs)]
        rows = np.concatenate([*slots, np.full(padding, self._sessions.capacity, np.int32)])
        starts = [question.is_first for question in questions if question.is_first is not None]
        is_first = np.concatenate([*starts, np.ones(padding, bool)])
        return self._run_step(rows, padded, is_first)[: len(obs)]

    def _run_step(self, rows: np.ndarray, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        if self._table is None:
            frames = self._blank(self._sessions.capacity + 1, is_frame=True)
            self._table = jax.jit(self.policy.player.begin)(frames)
        q, self._table = self._step(self.policy.params, self._table, rows, obs, is_first)
        return np.asarray(q)

    def _step_in_table(
        self, params: Params, table: MemoryState, rows: Array, obs: Array, is_first: Array
    ) -> tuple[Array, MemoryState]:
        player = self.policy.player
        state = player.observe(jax.tree.map(lambda x: x[rows], table), obs, is_first)
        q, state, _ = player.values(params, state)
        return q, jax.tree.map(lambda x, new: x.at[rows].set(new), table, state)


@dataclasses.dataclass
class _Session:
    slot: int
    used_at: float


class Sessions:
    """Which row of the memory belongs to which session."""

    def __init__(self, capacity: int, idle_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins without sessions.

        Args:
          capacity: most sessions.
          idle_seconds: time without an observation after which a session makes room for another.
          clock: returns the time in seconds.
        """
        self.capacity, self._idle_seconds, self._clock = capacity, idle_seconds, clock
        self._known: dict[str, _Session] = {}  # those used last come last
        self._free = list(range(capacity))[::-1]

    def __len__(self) -> int:
        return len(self._known)

    def slots(self, names: Sequence[str], starts: Sequence[bool]) -> np.ndarray:
        """Returns the rows of some sessions, `[len(names)]` int32, and gives one to each that begins.

        Raises:
          UnknownSession: if one that doesn't begin isn't known, or there is no room for one that does. Then nothing
            has changed.
        """
        now = self._clock()
        unknown = [name for name, starts_now in zip(names, starts, strict=True) if not starts_now]
        if missing := next((name for name in unknown if name not in self._known), None):
            raise UnknownSession(
                f"session {show(missing)} isn't known: it was never begun, has been silent for more than "
                f"{self._idle_seconds:g} s, or was lost with an earlier policy; begin it with is_first"
            )
        self._make_room(sum(name not in self._known for name in names), set(names), now)
        rows = []
        for name in names:
            session = self._known.pop(name, None) or _Session(self._free.pop(), now)
            session.used_at = now
            self._known[name] = session
            rows.append(session.slot)
        return np.array(rows, np.int32)

    def forget(self, name: str) -> bool:
        """Forgets a session, and returns whether it was known."""
        session = self._known.pop(name, None)
        if session is not None:
            self._free.append(session.slot)
        return session is not None

    def _make_room(self, wanted: int, needed: set[str], now: float) -> None:
        for name in list(self._known):
            if len(self._free) >= wanted:
                return
            if now - self._known[name].used_at <= self._idle_seconds:
                break  # all that follow were used later
            if name not in needed:
                self.forget(name)
        if len(self._free) < wanted:
            raise UnknownSession(
                f"there must be room for a session that begins, got {len(self)} of {self.capacity} in use; end some "
                f"(DELETE /sessions/NAME), or let the server keep more (--max-sessions)"
            )


def _shapes(state: MemoryState) -> Any:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
