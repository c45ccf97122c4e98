"""Agent steps/s on Pong with the standard network and schedule: the Nature network, one update of 32 per four steps.

    python benchmarks/pong.py [--peers-python PATH] [--cleanrl CHECKOUT] [--repeats N]

- Stable-Baselines3's DQN: eight environments.
- CleanRL's dqn_atari.py: one environment. CleanRL isn't packaged. Without a checkout of it, this pair isn't measured.

Both sides of a pair keep 20,000 steps, and are timed once they learn. They alternate, and medians are shown. The
learner step is also measured alone: milliseconds of one dispatched update on a ready batch, divided by those that its
arithmetic would take at the speed of a large matrix product.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

import qfleet
from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner, update
from qfleet.core.replay import make_replay
from qfleet.core.types import Transition, stored_spec
from qfleet.networks import make_network
from qfleet.runtime.process import peak_rss_bytes
from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory

BATCH_SIZE, NUM_ENVS = 32, 8
UPDATE_GFLOP = 2.19  # two passes of the online network (forward; backward takes twice that), one of the target's
WARMUP, TIMED = 2_400, 4_000  # environment steps


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--cleanrl", help="a checkout of CleanRL")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    def peer(script: str, *words: str) -> Callable[[], float]:
        return lambda: float(common.peer(arguments.peers_python, script, *words)["env_steps_per_second"])

    results = [compare("sb3", peer("sb3_pong.py"), NUM_ENVS, arguments.repeats)]
    if arguments.cleanrl:
        results.append(compare("cleanrl", peer("cleanrl_pong.py", arguments.cleanrl), 1, arguments.repeats))
    common.report("pong", results)
    common.report("pong update", [time_update()])
    common.report("pong replay", [measure_replay()])


def compare(name: str, peer: Callable[[], float], num_envs: int, repeats: int) -> dict[str, Any]:
    """Returns the medians of both sides, and the median ratio of the pairs."""
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(common.env_steps_per_second(config(num_envs), WARMUP))
        theirs.append(peer())
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "peer": name,
        "num_envs": num_envs,
        "peer_env_steps_per_second": statistics.median(theirs),
        "qfleet_env_steps_per_second": statistics.median(ours),
        "ratio": ratio,
    }


def config(num_envs: int) -> qfleet.TrainConfig:
    """Returns the config of the standard schedule."""
    return qfleet.make_config(
        "ale:Pong",
        "atari_dqn",
        num_envs=num_envs,
        replay_capacity=20_000,
        warmup_env_steps=2_000,
        env_steps=WARMUP + TIMED,
        eval_period_env_steps=1_000_000,
    )


def time_update() -> dict[str, float]:
    """Returns milliseconds of a learner step, of its arithmetic at peak speed, and their ratio."""
    reuse_freed_memory()  # as the topology does
    agent_config = config(NUM_ENVS).agent
    env = qfleet.make_env("ale:Pong")
    network = make_network(env.spec, agent_config)
    agent = make_agent(network, agent_config)
    learner = make_learner(agent, agent_config)
    state = jax.jit(lambda key: learner.init(agent.init(key)))(jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = stored_spec(env.spec, network.to_storage_layout).agent_observation_shape
    obs, next_obs = (jnp.asarray(rng.integers(0, 255, (BATCH_SIZE, *shape)), jnp.uint8) for _ in range(2))
    zeros, ones = jnp.zeros(BATCH_SIZE), jnp.ones(BATCH_SIZE)
    batch = Transition(obs, jnp.zeros(BATCH_SIZE, jnp.int32), zeros, ones, next_obs, ones)
    step = jax.jit(lambda state: update(learner, state, batch)[0], donate_argnums=0)
    square = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x)
    update_ms, product_ms = [], []
    for i in range(40):
        state, milliseconds = timed(step, state)
        _, product_milliseconds = timed(product, square)
        if i >= 5:
            update_ms.append(milliseconds)
            product_ms.append(product_milliseconds)
    gflop_per_ms = 2 * 1024**3 / 1e9 / statistics.median(product_ms)
    limit = UPDATE_GFLOP / gflop_per_ms
    median = statistics.median(update_ms)
    return {"update_ms": median, "arithmetic_ms": limit, "ratio": median / limit}


def measure_replay() -> dict[str, float]:
    """Returns gigabytes of a replay of a million frames, and milliseconds to draw a batch of stacks from it."""
    agent_config = dataclasses.replace(config(NUM_ENVS).agent, replay_capacity=1_000_000)
    spec = qfleet.make_env("ale:Pong").spec
    replay = make_replay(stored_spec(spec, make_network(spec, agent_config).to_storage_layout), agent_config, NUM_ENVS)
    before = peak_rss_bytes()
    state = jax.block_until_ready(jax.jit(replay.init)())
    num_rows = state.ring.num_rows
    # The replay only counts as full. What costs time is which rows are read, and not what they hold.
    ring = state.ring._replace(
        size=jnp.int32(num_rows), rows=state.ring.rows._replace(outcome=jnp.zeros((num_rows, NUM_ENVS), jnp.uint8))
    )
    state = state._replace(ring=ring)
    sample = jax.jit(replay.sample)
    milliseconds = [timed(sample, state, jax.random.key(i), jnp.float32(0))[1] for i in range(40)]
    array_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {
        "frames": 1e6,
        "replay_gb": array_bytes / 1e9,
        "resident_gb": (peak_rss_bytes() - before) / 1e9,
        "sample_ms": statistics.median(milliseconds[5:]),
    }


def timed(call: Any, *arguments: Any) -> tuple[Any, float]:
    """Returns what a call returns, and the milliseconds that it took."""
    started = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    return result, 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
