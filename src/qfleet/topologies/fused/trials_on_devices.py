"""The program of many trials: learners whose configs differ only in numbers that the program takes as inputs."""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from qfleet.config import FusedConfig, TrainConfig
from qfleet.config.encoding import encode
from qfleet.config.own_parts import own_parts
from qfleet.config.topology import MeshConfig
from qfleet.core.learner import make_learner
from qfleet.core.numbers import Numbers, numbers_of
from qfleet.core.types import Network, Params
from qfleet.envs.spec import InGraphEnv
from qfleet.topologies.fused.program import Program, make_program
from qfleet.topologies.fused.program_on_devices import OVER_SEEDS, ProgramOnDevices
from qfleet.topologies.mesh import REPLICATED
from qfleet.topologies.schedule import Plan

SCHEDULES = (
    "exploration_start",
    "exploration_end",
    "exploration_schedule",
    "exploration_env_steps",
    "exploration_fraction",
    "importance_exponent_start",
    "importance_exponent_env_steps",
    "importance_exponent_fraction",
)
"""Settings of the agent that only the host's plans depend on."""

INPUTS = (*Numbers._fields, *SCHEDULES)
"""Settings of the agent in which the trials of one program may differ."""


def program_key(config: TrainConfig) -> str | None:
    """Returns a text that is the same for all configs whose runs one program can train.

    None if no program can train this run beside others: it isn't fused, has a mesh, or parts of the user's own, which
    may read any setting.
    """
    topology = config.topology
    if not isinstance(topology, FusedConfig) or topology.mesh != MeshConfig() or own_parts(config.agent):
        return None
    encoded = encode(config)
    agent = {name: value for name, value in encoded["agent"].items() if name not in INPUTS}
    copies_target = config.agent.target_update_rate == 1.0  # which is another program than Polyak averaging
    return json.dumps([{**encoded, "agent": agent, "run_dir": None}, copies_target], sort_keys=True)


class TrialsPlan(NamedTuple):
    """What the program of many trials takes as its plan."""

    plan: Plan
    """`[learners, iterations, rows]`, but `num_updates` is the same for all learners, `[iterations, rows]`."""
    numbers: Numbers
    """`[learners]` each."""


class TrialsOnDevices(ProgramOnDevices):
    """The program of many trials, with a share of their learners on each device.

    The learners are those of all seeds of the first trial, then those of the next one, as if they were the seeds of one
    run. In place of a seed, each has its seed and its numbers.
    """

    def __init__(self, whole: TrainConfig, configs: Sequence[TrainConfig], env: InGraphEnv, network: Network) -> None:
        """Checks the sizes; nothing is compiled.

        Args:
          whole: config of the first trial, with as many seeds as all trials have together.
          configs: the configs of the trials, all with the same `program_key`.
          env: the environment.
          network: the Q-network.
        """
        super().__init__(whole, env, network, None)
        self._configs, self._env = configs, env

    @functools.cached_property
    def seeds(self) -> tuple[Array, Numbers]:
        """The seed and the numbers of each learner, `[learners]` each, divided among the devices."""
        seeds = np.array([seed for config in self._configs for seed in config.seeds], np.uint32)
        each = [numbers_of(config.agent) for config in self._configs for _ in config.seeds]
        numbers: Any = Numbers(*np.array(each, np.float32).T)
        return jax.device_put((seeds, numbers), self.sharding_of_seeds)

    @property
    def _of_one_seed(self) -> tuple[Program, Any]:
        program = self._program

        def run(state: Any, plan: TrialsPlan, num_iterations: Array) -> Any:
            return self._with_numbers(plan.numbers).run(state, plan.plan, num_iterations)

        def play_episodes(params: Params, learner: Any, *further: Any) -> Any:
            seed, numbers = learner
            return self._with_numbers(numbers).play_episodes(params, seed, *further)

        changes: dict[str, Any] = {
            "init": lambda learner: program.init(learner[0]),
            "run": run,
            "begin_episodes": lambda learner, *further: program.begin_episodes(learner[0], *further),
            "play_episodes": play_episodes,
        }
        divided: Any = OVER_SEEDS
        # A number of updates for each learner would make the loop over them compute all of its state at each turn.
        plan = Plan(exploration=divided, importance_exponent=divided, num_updates=REPLICATED)
        return program._replace(**changes), TrialsPlan(plan, divided)

    def _with_numbers(self, numbers: Numbers) -> Program:
        """Returns the program of a learner with these numbers, which are inputs of what is being compiled."""
        config = self._config
        learner = make_learner(self._agent, config.agent, numbers=numbers)
        return make_program(config, self._env, self._agent, learner, numbers=numbers)
