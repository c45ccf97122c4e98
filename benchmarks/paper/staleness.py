"""How old the gradients of a parameter server may be: CartPole by the number of workers and the bound on staleness.

    python benchmarks/paper/staleness.py [--seeds 3] [--again]

All rows apply the same number of gradients, and take the same environment steps. A bound of b drops gradients whose
parameters are more than b learner steps old. "in step" averages one gradient of each worker for each learner step, so
it takes fewer steps, each of a batch that is as many times as large; "large batch" is one learner that does the same,
and the control for it. The negative control learns nothing. It takes about three quarters of an hour on two cores.
"""

from typing import Any

import table

WORKERS = (1, 2, 4)
BOUNDS = {"0": 0, "1": 1, "4": 4, "16": 16, "none": 10**6}
ENV_STEPS, NUM_LANES, BATCH = 40_000, 8, 32
ENV_STEPS_PER_GRADIENT = 4.0
TARGET_PERIOD = 400
"""Gradients between updates of the target network."""


def main() -> None:
    """Prints the table."""
    arguments = table.parser(__doc__, num_seeds=3).parse_args()
    rows = []
    for num_workers in WORKERS:
        shared: dict[str, Any] = {"env_steps": ENV_STEPS, "batch_size": BATCH}
        server = {**shared, "topology": "parameter-server", "num_workers": num_workers}
        server |= {"lanes_per_worker": NUM_LANES // num_workers}
        each = {"env_steps_per_learner_step": ENV_STEPS_PER_GRADIENT, "target_update_period": TARGET_PERIOD}
        whole = {
            "env_steps_per_learner_step": num_workers * ENV_STEPS_PER_GRADIENT,
            "target_update_period": TARGET_PERIOD // num_workers,
        }
        settings: dict[str, dict[str, Any]] = {
            f"bound {name}": {**server, **each, "max_staleness": bound} for name, bound in BOUNDS.items()
        }
        settings["in step"] = {**server, **whole, "max_staleness": 0, "gradients_per_learner_step": num_workers}
        settings["large batch"] = {**shared, **whole, "num_envs": NUM_LANES, "batch_size": BATCH * num_workers}
        settings["untrained"] = {**settings["large batch"], "learning_rate": 1e-12}
        rows += [
            table.Row(f"workers: {num_workers}", name, table.ours("CartPole-v1", "double_dqn", **row))
            for name, row in settings.items()
        ]
    table.run("staleness", rows, arguments)


if __name__ == "__main__":
    main()
