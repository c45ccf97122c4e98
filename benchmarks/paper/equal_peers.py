"""Equal peers in CartPole: gradients averaged at each step, parameters averaged now and then, and one process alone.

    python benchmarks/paper/equal_peers.py [--seeds 10] [--again]

All rows take the same environment steps, over all peers. `all-reduce` averages the gradients of all peers at each
learner step, and is one learner in several processes. With `gossip`, each peer learns on its own, takes the learner
steps that its share of the environment steps allows, and averages its parameters with those of another one after each
period. The negative control learns nothing. It takes a quarter of an hour on two cores.
"""

from typing import Any

import table

ROWS: dict[str, dict[str, Any]] = {
    "one process": {"topology": "fused"},
    "all-reduce, 2": {"topology": "all-reduce", "num_processes": 2},
    "gossip, 2": {"topology": "gossip", "num_processes": 2},
    "gossip, 4": {"topology": "gossip", "num_processes": 4},
    "gossip, 4, rare": {"topology": "gossip", "num_processes": 4, "gossip_period_learner_steps": 1000},
    "untrained": {"topology": "fused", "learning_rate": 1e-12},
}


def main() -> None:
    """Prints the table."""
    arguments = table.parser(__doc__, num_seeds=10).parse_args()
    rows = [
        table.Row("CartPole", name, table.ours("CartPole-v1", "rainbow_lite", **{"env_steps": 60_000, **settings}))
        for name, settings in ROWS.items()
    ]
    table.run("equal_peers", rows, arguments)


if __name__ == "__main__":
    main()
