"""Memory: agents that remember against one that sees a single observation, on longer and longer chains.

    python benchmarks/paper/memory.py [--seeds 5] [--again]

The environment is bsuite's `memory_len` (Osband et al. 2020), which gymnax calls MemoryChain: the first observation
names the action that pays 1 at the end, and any other action pays -1. `pqn`, without a memory, is the negative control:
no policy that sees one observation has a mean return other than 0. It takes about half an hour on one core.
"""

import functools

import table

LENGTHS = (5, 10, 20, 40, 100)


def main() -> None:
    """Prints the table."""
    arguments = table.parser(__doc__, num_seeds=5).parse_args()
    rows = []
    for length in LENGTHS:
        ours = functools.partial(table.ours, "gymnax:MemoryChain-bsuite", env_options={"memory_length": length})
        measures = {
            "pqn": ours("pqn", 200_000),
            "pqn_rnn": ours("pqn_rnn", max(60_000, 3_000 * length)),
            # A sequence holds a whole chain.
            "r2d2": ours("r2d2", max(30_000, 1_000 * length), sequence_length=max(40, length + 1)),
        }
        rows += [table.Row(f"length {length}", preset, measure, together=True) for preset, measure in measures.items()]
    table.run("memory", rows, arguments)


if __name__ == "__main__":
    main()
