"""Measures everything that needs a GPU with one command, which keeps to a given time; the most important comes first.

    python benchmarks/gpu.py [--seconds 360]

It prints each result as one line of JSON as soon as it is measured, and tables at the end. A measurement that fails
gives a line with its `error`, and one that there is no time for gives a line with `skipped`. In both cases the others
still take place. The exit code is 1 if anything failed.

The parts are measured in a process of their own, which is replaced if it dies or takes too long. This process does not
use JAX. The benchmark also runs without a GPU, and takes a minute or two with `--tiny`.
"""

import argparse
import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import common


class Part(NamedTuple):
    """A part of the benchmark, which `gpu_worker.py` measures."""

    name: str
    share: float
    """Largest share of the whole time that the part may take, unless it is the last part. If less than half of that
    time is left, the part is skipped."""


PARTS = (
    Part("device", 0.06),
    Part("rollouts", 0.21),
    Part("replay", 0.16),
    Part("learner", 0.2),
    Part("pong", 0.18),
    Part("mesh", 0.05),
    Part("tests", 0.16),
    Part("train-breakout", 0.16),
    Part("train-pong", 0.1),
)

SECONDS_TO_STOP = 5.0
"""Time that a part may take to end once its own time is up."""


def main() -> None:
    """Measures all parts, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=360.0, help="time for the whole benchmark")
    parser.add_argument("--tiny", action="store_true", help="use sizes that only show that the benchmark runs")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    arguments = parser.parse_args()
    parts = [part for part in PARTS if part.name in arguments.parts]
    results = []
    for result in measure_all(parts, arguments.seconds, arguments.tiny):
        print(json.dumps(result), flush=True)
        results.append(result)
    print_tables(results)
    sys.exit(any("error" in result for result in results))


def measure_all(parts: Sequence[Part], seconds: float, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yields the results of all parts, within the given time."""
    ends_at = time.monotonic() + seconds
    worker: Worker | None = None
    try:
        for part in parts:
            share, left = part.share * seconds, ends_at - SECONDS_TO_STOP - time.monotonic()
            if left < share / 2:
                yield {"part": part.name, "skipped": "not enough time left"}
                continue
            until = time.monotonic() + (left if part is parts[-1] else min(share, left))
            worker = worker or Worker(tiny)
            try:
                yield from worker.measure(part.name, until, min(until + share / 2, ends_at))
            except WorkerLost as error:
                worker.end()
                worker = None
                yield {"part": part.name, "error": str(error)}
    finally:
        if worker:
            worker.end()


class WorkerLost(Exception):
    """The process that measures can no longer be used."""


class Worker:
    """The process that measures one part after the other."""

    def __init__(self, tiny: bool) -> None:
        command = [sys.executable, str(common.HERE / "gpu_worker.py"), *(["--tiny"] if tiny else [])]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def measure(self, part: str, until: float, limit: float) -> Iterator[dict[str, Any]]:
        """Yields the results of a part.

        Args:
          part: name of the part.
          until: when the part must end, in the time of `time.monotonic`, which all processes of a machine share.
          limit: when to give the part up.

        Raises:
          WorkerLost: if the process has died, or the part is given up.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has died, which `_next` reports
            print(json.dumps({"part": part, "until": until}), file=self._process.stdin, flush=True)
        while result := self._next(limit):
            yield {"part": part, **result}

    def end(self) -> None:
        """Ends the process, and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the process has ended

    def _next(self, limit: float) -> dict[str, Any]:
        """Returns the next result, or an empty one at the end of a part."""
        try:
            line = self._lines.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            raise WorkerLost("the part took too long, and its process was ended") from None
        if not line:
            raise WorkerLost(f"the process that measures died with exit code {self._process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result


def print_tables(results: Sequence[dict[str, Any]]) -> None:
    """Prints the results, with one table for all neighbours that have the same part and fields."""
    for _, alike in itertools.groupby(results, key=lambda result: (result["part"], *result)):
        print()
        common.print_table(list(alike))


if __name__ == "__main__":
    main()
