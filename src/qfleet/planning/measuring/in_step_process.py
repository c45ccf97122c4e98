"""A process that measures the parts of a run that takes every step together, as `python -m` this module.

It is one of as many equal processes as the run has, so that the messages between them are part of what is measured.
"""

import dataclasses
import os
import pickle
import sys
import traceback
from typing import Any, NamedTuple

from qfleet.config import AllReduceConfig, ConfigError, TrainConfig
from qfleet.planning.costs import Cost


class Spec(NamedTuple):
    """What such a process measures."""

    config: TrainConfig
    """Config of the run."""
    process_id: int = 0
    num_processes: int = 1
    devices_per_process: int = 1
    coordinator: str = ""
    """HOST:PORT of the first process, if there are several."""


def measure(spec: Spec) -> dict[str, Cost]:
    """Returns the costs of the parts, and the memory of the process as that of a part named `memory`."""
    from qfleet.runtime import peers

    if spec.num_processes > 1:
        peers.join(spec.coordinator, spec.num_processes, spec.process_id, spec.devices_per_process, 60.0)
    from qfleet.envs.spec import InGraphEnv
    from qfleet.runtime.cache import enable_compilation_cache
    from qfleet.runtime.process import peak_rss_bytes
    from qfleet.training.assembly import make_env_and_network

    env, network = make_env_and_network(spec.config, None)
    enable_compilation_cache()
    config = _of_one_process(spec.config, is_in_graph=isinstance(env, InGraphEnv))
    if isinstance(env, InGraphEnv):
        from qfleet.planning.measuring.in_graph import measure_rows_and_learning

        costs = measure_rows_and_learning(config, env, network)
    else:
        from qfleet.planning.measuring.host import measure_host_parts

        costs = measure_host_parts(config, env, network)
    return {**costs, "memory": Cost(0.0, num_bytes=peak_rss_bytes())}


def _of_one_process(config: TrainConfig, *, is_in_graph: bool) -> TrainConfig:
    """Returns the config of the fused or overlapped run that each process of the run is, or takes part in."""
    if isinstance(config.topology, AllReduceConfig):
        kind: Any = "in-graph" if is_in_graph else "host"
        config = dataclasses.replace(config, topology=config.topology.in_one_process(kind))
    return config.with_schedule_lengths()


def main() -> int:
    """Measures what a file describes, and reports it through a descriptor."""
    path, descriptor = sys.argv[1], int(sys.argv[2])
    with open(path, "rb") as file:
        spec: Spec = pickle.load(file)  # written by the process that has started this one
    try:
        found: Any = measure(spec)
    except ConfigError as error:
        found = error
    except Exception as error:
        traceback.print_exc()
        found = RuntimeError(f"{type(error).__name__}: {error}")
    with os.fdopen(descriptor, "wb") as report:
        pickle.dump(found, report)
    if spec.num_processes > 1 and isinstance(found, dict):
        from qfleet.runtime import peers

        peers.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
