"""What the parts of Ape-X are worth in MinAtar's Breakout: epsilons, first priorities, and the number of actors.

    python benchmarks/paper/ape_x.py [--seeds 3] [--again]

All rows take the same environment steps and learner steps, so that each transition is learned from equally often. A
change is made to the first row, which is the paper's: four actors with an epsilon each, who compute the first
priorities (Horgan et al. 2018). "one epsilon" is the mean of the four. With fewer actors there are fewer epsilons: two
actors have the first and the last of the four, and a single one has the first, 0.4. The negative control is a learner
that learns nothing. It takes about half an hour on two cores.
"""

from typing import Any

import table

from qfleet.config import ActorLearnerConfig

FOUR = ActorLearnerConfig(num_actors=4)
ONE_EPSILON = sum(map(FOUR.epsilon, range(4))) / 4
ROWS: dict[str, dict[str, Any]] = {
    "4 actors": {},
    "one epsilon": {"actor_epsilon_base": ONE_EPSILON, "actor_epsilon_exponent": 0.0},
    "greatest first": {"initial_priorities": "greatest"},
    "2 actors": {"num_actors": 2, "lanes_per_actor": 4},
    "1 actor": {"num_actors": 1, "lanes_per_actor": 8},
    "untrained": {"learning_rate": 1e-12, "env_steps": 10_000},
}


def main() -> None:
    """Prints the table."""
    arguments = table.parser(__doc__, num_seeds=3).parse_args()
    fleet: dict[str, Any] = {"num_actors": 4, "lanes_per_actor": 2, "torso": "mlp", "env_steps": 200_000}
    rows = [
        table.Row("Breakout", name, table.ours("gymnax:Breakout-MinAtar", "ape_x", **{**fleet, **changes}))
        for name, changes in ROWS.items()
    ]
    table.run("ape_x", rows, arguments)


if __name__ == "__main__":
    main()
