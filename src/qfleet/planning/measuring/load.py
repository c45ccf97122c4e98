"""A process that keeps a core and its caches busy, as `python -m` this module, while parts are measured.

A run with more processes than cores has its caches cold after every switch. Without such a neighbour, a part that is
measured would find its caches as it left them.
"""

import numpy as np


def main() -> None:
    """Reads and writes memory, in arrays and in Python's objects, until the process is killed."""
    array, words = np.ones(400_000), {i: str(i) for i in range(20_000)}
    while True:
        array *= 1.0000001
        for i in range(0, len(words), 7):
            words[i] = words[i][:1] + words[i][1:]


if __name__ == "__main__":
    main()
