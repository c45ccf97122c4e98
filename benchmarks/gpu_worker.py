"""The process that measures for `gpu.py`. It reads which part to measure and until when, and prints results as JSON."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

import gpu_parts
from gpu_parts import FULL, TINY, Result, Sizes


def learner(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields the results of `gpu_learner.learner`.

    It is imported only here because it uses what isn't public: if that changes, only this part fails.
    """
    import gpu_learner

    return gpu_learner.learner(sizes, until)


def mesh(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields the results of `gpu_learner.mesh`, which is imported here for the same reason."""
    import gpu_learner

    return gpu_learner.mesh(sizes, until)


PARTS: dict[str, Callable[[Sizes, float], Iterable[Result]]] = {
    "device": gpu_parts.device,
    "rollouts": gpu_parts.rollouts,
    "replay": gpu_parts.replay,
    "learner": learner,
    "pong": gpu_parts.pong,
    "mesh": mesh,
    "tests": gpu_parts.tests,
    "train-breakout": gpu_parts.train_breakout,
    "train-pong": gpu_parts.train_pong,
}


def main() -> None:
    """Measures parts until no more are requested. An empty result marks the end of a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    sizes = TINY if parser.parse_args().tiny else FULL
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # whatever else prints to stdout goes to stderr, so that it isn't taken for a result
        for line in sys.stdin:
            request = json.loads(line)
            for result in measured(request["part"], sizes, request["until"]):
                print(json.dumps(result), file=results, flush=True)
            print(json.dumps({}), file=results, flush=True)


def measured(part: str, sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields the results of a part, and finally the error that ended it, if there was one."""
    try:
        yield from PARTS[part](sizes, until)
    except Exception as error:
        traceback.print_exc()
        yield {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
