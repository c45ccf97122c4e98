"""Which parts a run consists of, and the processes that measure them."""

import os

from qfleet.config import ActorLearnerConfig, AllReduceConfig, GossipConfig, ParameterServerConfig, TrainConfig
from qfleet.config.python_path import module_folder_variables
from qfleet.planning.costs import Costs
from qfleet.planning.measuring.children import children, reports
from qfleet.planning.measuring.in_step_process import Spec
from qfleet.topologies.all_reduce.local_processes import environment_of, keep_to_its_cores
from qfleet.topologies.all_reduce.processes import free_port

_IN_STEP = "qfleet.planning.measuring.in_step_process"


def measure_parts(config: TrainConfig) -> Costs:
    """Returns the costs of the parts of a run on this machine.

    Raises:
      ConfigError: if the environment, the network or Ray isn't there.
      RunFailed: if a process that measures fails.
    """
    match config.topology:
        case ActorLearnerConfig():
            from qfleet.planning.measuring.actor_learner import measure_actor_learner  # needs Ray

            return measure_actor_learner(config)
        case ParameterServerConfig():
            from qfleet.planning.measuring.parameter_server import measure_parameter_server

            return measure_parameter_server(config)
        case AllReduceConfig(num_processes=number) if number > 1:
            return _measure_equal_processes(config, config.topology)
        case GossipConfig():
            from qfleet.planning.measuring.gossip import measure_gossip

            return measure_gossip(config)
    with children() as started:
        found: Costs = started.start(_IN_STEP, Spec(config), {**os.environ, **module_folder_variables()}).report()
    return found


def _measure_equal_processes(config: TrainConfig, topology: AllReduceConfig) -> Costs:
    """Returns the costs as the first of the processes measures them; all of them measure at once."""
    number, address = topology.num_processes, f"127.0.0.1:{free_port('127.0.0.1')}"
    with children() as started:
        measuring = []
        for i in range(number):
            spec = Spec(config, i, number, topology.devices_per_process, address)
            environment = {**environment_of(i, number, topology.devices_per_process), **module_folder_variables()}
            measuring.append(started.start(_IN_STEP, spec, environment))
            keep_to_its_cores(measuring[-1].pid, i, number)
        found: list[Costs] = reports(measuring)
    return found[0]
