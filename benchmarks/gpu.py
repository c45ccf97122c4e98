"""All that a GPU has to show, in one command that keeps to its time, the most important first.

    python benchmarks/gpu.py [--seconds 360]

One line of JSON for each result, as soon as it is measured, and one table at the end. What fails is a line with its
`error`, and what there is no time for a line with `skipped`; neither keeps the rest from its turn. The exit code is 1
if anything failed.

The parts are measured in a process of their own, which is replaced where it dies or doesn't come to an end: this one
doesn't use JAX. It runs without a GPU too, and with `--tiny` in a minute or two.
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
    """One of the things to show; `gpu_worker.py` has what measures it."""

    name: str
    share: float
    """Of the whole time that it takes at most, unless it is the last. With less than half of that left it isn't
    begun."""


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
"""What a part may take to come to its end once its time is up."""


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=360.0, help="for all of it")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
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
    """Yields all results, within so many seconds."""
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
    """The process that measures is no use any more."""


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
          part: its name.
          until: when it shall come to its end, by `time.monotonic`, which all processes of a machine share.
          limit: when to give it up.

        Raises:
          WorkerLost: if the process has died, or the part is given up.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, as the next line says
            print(json.dumps({"part": part, "until": until}), file=self._process.stdin, flush=True)
        while result := self._next(limit):
            yield {"part": part, **result}

    def end(self) -> None:
        """Ends it, and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # it has died

    def _next(self, limit: float) -> dict[str, Any]:
        """Returns the next result, an empty one at the end of a part."""
        try:
            line = self._lines.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            raise WorkerLost("it took too long, and its process was ended") from None
        if not line:
            raise WorkerLost(f"its process died, exit code {self._process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result


def print_tables(results: Sequence[dict[str, Any]]) -> None:
    """Prints the results, those side by side that have the same fields."""
    for _, alike in itertools.groupby(results, key=lambda result: (result["part"], *result)):
        print()
        common.print_table(list(alike))


if __name__ == "__main__":
    main()
