"""Trains one seed of a run with a process for each; the run starts it, as `python -m qfleet.cli.seed`."""

import argparse
import dataclasses
import gc
import json
import sys
import traceback

from qfleet.cli.main import end_process
from qfleet.config import ConfigError, RunFailed
from qfleet.config.encoding import decode_topology


def main() -> int:
    """Continues the run of one seed, which is an ordinary run, and reports its progress. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="qfleet.cli.seed")
    parser.add_argument("run")
    parser.add_argument("--report-descriptor", type=int, required=True)
    parser.add_argument("--settings", required=True, help="JSON of env_steps, stop_return and topology")
    arguments = parser.parse_args()
    gc.set_threshold(10_000)  # as in `qfleet train`
    from qfleet.runtime.peers import Reporter
    from qfleet.runtime.signals import StopFlag

    reporter = Reporter(arguments.report_descriptor, saves_at_end=True)
    settings = json.loads(arguments.settings)
    try:
        with StopFlag(ends_process=True):
            from qfleet.api import resume

            run = resume(
                arguments.run,
                env_steps=settings["env_steps"],
                stop_return="none" if settings["stop_return"] is None else settings["stop_return"],
                topology=decode_topology(settings["topology"]),
                trust=True,  # whoever started this process has checked it
            )
            for progress in run:
                reporter.tell("progress", **dataclasses.asdict(progress))
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, (ConfigError, RunFailed)):
            reporter.tell("failed", error=str(error), is_config=isinstance(error, ConfigError))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(end_process(main()))
