"""Many trials in one program, each of them the topology of an ordinary run.

`FusedTrials` trains the learners of all trials, and a `FusedTrial` shows its run its own share of them. The runs must
be advanced in turn: the first one of a round trains a chunk of all trials, and the others take their shares of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.types import Network, Params
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.evaluation import Episodes, never
from qfleet.runtime.records import Progress
from qfleet.topologies.base import Layout, Topology
from qfleet.topologies.footprint import Footprint
from qfleet.topologies.fused.chunk import Chunk, progress_of
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.fused.trials_on_devices import SCHEDULES, TrialsOnDevices, TrialsPlan
from qfleet.topologies.replay_measures import ReplayMeasures
from qfleet.topologies.restoring import read_state
from qfleet.topologies.schedule import Plan


class FusedTrials(Fused):
    """The learners of many trials in one program. Only `FusedTrial`s call its methods."""

    _chunk_seconds = 1.0  # because each chunk costs the host a millisecond or two for every trial

    def __init__(self, whole: TrainConfig, configs: Sequence[TrainConfig], env: InGraphEnv, network: Network) -> None:
        """Checks the sizes; `start` does the work. Args: as for `TrialsOnDevices`."""
        super().__init__(whole, env, network, on_devices=TrialsOnDevices(whole, configs, env, network))
        self.configs, self.env = configs, env
        self._num_seeds = configs[0].num_seeds
        self._start_seconds: float | None = None
        self._chunk: Chunk | None = None
        self._made: dict[Hashable, Any] = {}  # what trials have asked for since the newest chunk
        self._restored: dict[int, dict[str, Any]] = {}  # states that aren't in place yet, by the index of the trial
        self._counters: dict[str, int] = {}

    def start(self) -> float:
        """Compiles the program if that hasn't been done, and returns the wall time that it took, in seconds."""
        if self._start_seconds is None:
            self._start_seconds = super().start()
        return self._start_seconds

    def chunk_after(self, env_steps: int, until_env_steps: int) -> Chunk:
        """Returns the chunk of all trials that begins at `env_steps`, which is trained if it is a new one."""
        self._put_restored_in_place()
        if env_steps == self.env_steps:
            self._made.clear()
            self._chunk = self._run_chunk(until_env_steps)
        chunk = self._chunk
        assert chunk is not None and env_steps == chunk.env_steps - chunk.new_env_steps, "trials must take turns"
        return chunk

    @property
    def newest_steps(self) -> tuple[int, int]:
        """The environment steps and learner steps after the newest chunk, or in the states that were restored."""
        self._put_restored_in_place()
        return self.env_steps, self.learner_steps

    def episodes(
        self, index: int, num_episodes: int, batch: int, limit: int | None, should_stop: Callable[[], bool]
    ) -> Episodes | None:
        """Returns a trial's share of an evaluation of all trials; see `Topology.evaluate`."""
        played = self._once(
            (num_episodes, batch, limit),
            lambda: self.evaluate(num_episodes, batch, max_episode_steps=limit, should_stop=should_stop),
        )
        first = index * self._num_seeds
        return None if played is None else jax.tree.map(lambda x: x[first : first + self._num_seeds], played)

    def learner_of(self, index: int) -> LearnerState:
        """Returns the learner state of a trial on the host, as a fused run of it alone would have it."""
        learner: LearnerState = self.share_of(self._once("learner", lambda: _on_host(self.learner)), index)
        return learner

    def state_of(self, index: int) -> dict[str, Any]:
        """Returns the parts of a trial's checkpoint on the host, as a fused run of it alone would have them."""
        state: dict[str, Any] = self.share_of(self._once("state", lambda: _on_host(self.state)), index)
        return state

    def replay_of(self, index: int) -> Any:
        """Returns what `ReplayMeasures` reads of a trial's replay, on the host; `()` without a replay."""
        return self.share_of(self._once("replay", lambda: _on_host(_measured(self._fused_state.replay))), index)

    def share_of(self, arrays: Any, index: int) -> Any:
        """Returns a trial's share of arrays on the host: without the leading axis if it has one seed."""
        first = index * self._num_seeds
        own = first if self._num_seeds == 1 else slice(first, first + self._num_seeds)
        return jax.tree.map(lambda x: x[own], arrays)

    def restore_trial(self, index: int, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Notes the state from which a trial goes on. The others must go on from the same environment step."""
        assert not self._restored or counters == self._counters, "the trials of a program must be equally far"
        self._restored[index], self._counters = state, counters

    def _put_restored_in_place(self) -> None:
        """Goes on from the states that were restored. A trial without one isn't trained any more, and begins anew."""
        if not self._restored:
            return
        restored, self._restored = self._restored, {}
        own = _on_host(self.state)
        shares = [restored.get(i, self.share_of(own, i)) for i in range(len(self.configs))]
        join = jnp.stack if self._num_seeds == 1 else jnp.concatenate
        joined = jax.tree.map(lambda *xs: join(xs), *shares)
        self.restore(jax.device_put(joined, self._on_devices.sharding_of_seeds), self._counters)

    def _once(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """Returns what `make` returns for all trials, which is called once after each chunk."""
        self._put_restored_in_place()
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]

    def _plan(self) -> Plan:
        """Returns the plans of all learners, as `TrialsPlan` has them."""
        schedules = [tuple(getattr(config.agent, name) for name in SCHEDULES) for config in self.configs]
        agents = {schedule: config.agent for schedule, config in zip(schedules, self.configs, strict=True)}
        planned = {schedule: self._plan_of(agent) for schedule, agent in agents.items()}
        plans = [planned[schedule] for schedule in schedules for _ in range(self._num_seeds)]
        return Plan(
            exploration=np.stack([plan.exploration for plan in plans]),
            importance_exponent=np.stack([plan.importance_exponent for plan in plans]),
            num_updates=plans[0].num_updates,
        )

    def _to_program(self, plan: Plan) -> TrialsPlan:
        return TrialsPlan(plan, self._seeds[1])


def _on_host(tree: Any) -> Any:
    """Returns copies of arrays that stay valid when the program changes them. Random keys are copied on the device."""
    is_key = functools.partial(jnp.issubdtype, arg2=jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jnp.copy(x) if is_key(x.dtype) else np.array(x), tree)


def _measured(replay: Any) -> Any:
    """Returns a replay without its largest arrays, which `ReplayMeasures` doesn't read."""
    if not replay:
        return replay
    ring = replay.ring._replace(rows=replay.ring.rows._replace(obs=(), action=(), carry=()))
    tree = replay.tree and dataclasses.replace(replay.tree, levels=replay.tree.levels[-1:])
    return replay._replace(ring=ring, tree=tree)


class FusedTrial(Topology):
    """One of many trials in one program, as the topology of an ordinary run."""

    def __init__(self, together: FusedTrials, index: int) -> None:
        """Begins where the trials begin.

        Args:
          together: all trials.
          index: number of this one among them.
        """
        self._together, self._index, self._config = together, index, together.configs[index]
        self._replay_measures = ReplayMeasures()
        self.env_steps = self.learner_steps = self._replay_starts_at = 0

    def footprint(self) -> Footprint:
        """Returns what it keeps beside the arrays of all trials: nothing."""
        whole = self._together.footprint()
        return Footprint(axes=whole.axes, devices=whole.devices, parts=())

    def start(self) -> float:
        """Compiles the program of all trials, unless another trial has, and returns the seconds that it took."""
        return self._together.start()

    def advance(self, until_env_steps: int) -> Progress:
        """Takes this trial's share of the next chunk, which is trained if no other trial has asked for it.

        Raises:
          RunFailed: if a reward, an observation or the loss of this trial isn't finite.
        """
        chunk = self._together.chunk_after(self.env_steps, until_env_steps)
        self.env_steps, self.learner_steps = chunk.env_steps, chunk.learner_steps
        stats, exploration = self._together.share_of((chunk.stats, chunk.exploration), self._index)
        # The exploration is the same for all of a trial's seeds.
        own = chunk._replace(stats=stats, exploration=np.ravel(exploration)[0])
        return progress_of(own, self._config, self._together.env.spec)

    def evaluate(
        self,
        num_episodes: int,
        batch: int = 0,
        *,
        max_episode_steps: int | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns this trial's share of an evaluation of all trials.

        Args: as for `Topology.evaluate`.
        """
        return self._together.episodes(self._index, num_episodes, batch, max_episode_steps, should_stop)

    @property
    def params(self) -> Params:
        """The newest parameters, on the host."""
        return self.learner.params

    @property
    def learner(self) -> LearnerState:
        """The newest learner state, on the host."""
        self._catch_up()
        return self._together.learner_of(self._index)

    @property
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name, the same as those of a fused run of this trial alone."""
        self._catch_up()
        return self._together.state_of(self._index)

    def _catch_up(self) -> None:
        """Counts the steps of a chunk of which this trial hasn't taken its share.

        That is so if an exception ends all runs in the middle of a round. What is saved is the newest state.
        """
        self.env_steps, self.learner_steps = self._together.newest_steps

    def replay_measures(self) -> dict[str, float]:
        """As for `Fused`."""
        replay = self._together.replay_of(self._index)
        return self._replay_measures.read(replay) if replay else {}

    @property
    def layout(self) -> Layout:
        """The layout of a fused run."""
        return self._together.layout

    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds."""
        spec = self._together.env.spec
        return read_state(self, checkpoints, checkpoint, metadata, self._config.agent, spec.frame_stack)

    def restore(self, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Goes on from a checkpoint once all trials do, from the same environment step."""
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        self._replay_starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps
        self._together.restore_trial(self._index, state, counters)
