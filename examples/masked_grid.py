"""Learns the way through a maze whose walls are action masks: the agent never tries to walk into one.

    python examples/masked_grid.py [--env-steps N] [--run-dir DIR] [--without-masks]

The same maze is there twice: as an environment of Gymnasium, `MaskedGrid-v0`, which gives masks in `info`, and as one
in JAX, `MaskedGrid-jax`, which computes them from its state. With masks, an invalid action is an error: the first one
raises, the second one pays NaN, which ends a run too.
"""

import argparse
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

import qfleet
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult

SIDE = 6
NUM_CELLS = SIDE * SIDE
GOAL = NUM_CELLS - 1
MOVES = np.array([-SIDE, 1, SIDE, -1])  # up, right, down, left
TIME_LIMIT = 100


def make_maze(seed: int = 0) -> np.ndarray:
    """Returns the open sides of each cell, `[cells, 4]` bool, in the order of `MOVES`. One way leads to each cell."""
    random, is_open = np.random.default_rng(seed), np.zeros((NUM_CELLS, 4), bool)
    path, seen = [0], {0}
    while path:
        cell = path[-1]
        row, column = divmod(cell, SIDE)
        inside = np.array([row > 0, column < SIDE - 1, row < SIDE - 1, column > 0])
        ways = [way for way in np.flatnonzero(inside) if cell + MOVES[way] not in seen]
        if not ways:
            path.pop()
            continue
        way = random.choice(ways)
        following = int(cell + MOVES[way])
        is_open[cell, way] = is_open[following, (way + 2) % 4] = True
        path.append(following)
        seen.add(following)
    return is_open


MAZE = make_maze()


class MaskedGrid(gymnasium.Env):
    """Each step costs 1 until the goal is reached. Observed is the number of the cell."""

    observation_space = gymnasium.spaces.Discrete(NUM_CELLS)
    action_space = gymnasium.spaces.Discrete(4)

    def __init__(self, has_masks: bool = True) -> None:
        self._has_masks = has_masks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        """Starts in any cell but the goal."""
        super().reset(seed=seed)
        self._cell = int(self.np_random.integers(GOAL))
        return self._cell, self._info()

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        """Takes a step if there is no wall. With masks, a wall is an error."""
        if MAZE[self._cell, action]:
            self._cell += int(MOVES[action])
        elif self._has_masks:
            raise ValueError(f"action {action} is invalid in cell {self._cell}")
        return self._cell, -1.0, self._cell == GOAL, False, self._info()

    def _info(self) -> dict[str, Any]:
        return {"action_mask": MAZE[self._cell].astype(np.int8)} if self._has_masks else {}


def make_grid_in_jax(has_masks: bool = True) -> InGraphEnv:
    """Returns the same environment in JAX. Its state is the cell."""
    maze, moves = jnp.asarray(MAZE), jnp.asarray(MOVES, jnp.int32)
    spec = EnvSpec(
        name="MaskedGrid-jax",
        observation_shape=(NUM_CELLS,),
        observation_dtype=np.dtype(bool),
        num_actions=4,
        time_limit=TIME_LIMIT,
    )

    def observe(cell: jax.Array) -> jax.Array:
        return jnp.arange(NUM_CELLS) == cell

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        cell = jax.random.randint(key, (), 0, GOAL, jnp.int32)
        return cell, observe(cell)

    def step(cell: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        is_open = maze[cell, action]
        following = jnp.where(is_open, cell + moves[action], cell)
        reward = jnp.where(is_open | (not has_masks), -1.0, jnp.nan)
        return StepResult(following, observe(following), reward, following == GOAL, jnp.bool_(False))

    return InGraphEnv(spec, reset, step, action_mask=(lambda cell: maze[cell]) if has_masks else None)


gymnasium.register("MaskedGrid-v0", MaskedGrid, max_episode_steps=TIME_LIMIT)
qfleet.register_env("MaskedGrid-jax", make_grid_in_jax)


def main() -> None:
    """Trains, and shows the values of a few cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-steps", type=int, default=100_000)
    parser.add_argument("--run-dir")
    parser.add_argument("--without-masks", action="store_true")
    arguments = parser.parse_args()

    config = qfleet.make_config(
        "MaskedGrid-jax",
        "double_dqn",
        env_options={"has_masks": not arguments.without_masks},
        hidden_sizes=(),
        learning_rate=0.01,
        num_envs=16,
        discount=0.98,
        warmup_env_steps=min(1_000, arguments.env_steps // 2),
        exploration_env_steps=20_000,
        env_steps=arguments.env_steps,
        eval_period_env_steps=min(10_000, arguments.env_steps),
        run_dir=arguments.run_dir,
    )
    run = qfleet.iterate(config)
    for progress in run:
        if progress.eval_return_mean is not None:
            print(f"{progress.env_steps:>8,} steps: the goal is {-progress.eval_return_mean:.1f} steps away")
    policy = qfleet.load(run.directory.path)
    for cell in (0, GOAL - 1):
        seen = np.arange(NUM_CELLS) == cell
        mask = None if arguments.without_masks else MAZE[cell]
        print(f"cell {cell}: values {policy.q_values(seen, mask=mask).round(1)}")


if __name__ == "__main__":
    main()
