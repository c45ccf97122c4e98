"""One process of an all-reduce run; its launcher starts it, as `python -m qfleet.cli.peer`."""

import argparse
import json
import os
import sys
import traceback

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.config.encoding import decode_topology


def main() -> int:
    """Trains as one of several processes, and reports to their launcher."""
    parser = argparse.ArgumentParser(prog="qfleet.cli.peer")
    parser.add_argument("run")
    parser.add_argument("--process-id", type=int, required=True)
    parser.add_argument("--topology", required=True, help="JSON of what `encode_topology` returns")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--timeout-seconds", type=float, required=True)
    parser.add_argument("--report-descriptor", type=int, required=True)
    parser.add_argument("--env-steps", type=int, required=True)
    parser.add_argument("--stop-return", default="null", help="a number in JSON, or null")
    arguments = parser.parse_args()
    from qfleet.runtime import peers
    from qfleet.runtime.signals import StopFlag

    reporter = peers.Reporter(arguments.report_descriptor)
    try:
        # From now on, a request to stop is kept until the run can answer it. After the run, it changes nothing.
        with StopFlag(ends_process=True):
            from qfleet.training.peer import run_peer

            topology = decode_topology(json.loads(arguments.topology))
            assert isinstance(topology, AllReduceConfig)

            run_peer(
                arguments.run,
                process_id=arguments.process_id,
                topology=topology,
                coordinator=arguments.coordinator,
                timeout_seconds=arguments.timeout_seconds,
                env_steps=arguments.env_steps,
                stop_return=json.loads(arguments.stop_return),
                reporter=reporter,
            )
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, (ConfigError, RunFailed)):
            reporter.tell("failed", error=str(error), is_config=isinstance(error, ConfigError))
        os._exit(1)  # at once, because an orderly exit would wait for the other processes, which wait for this one
    peers.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
