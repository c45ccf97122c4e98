"""Our prioritised replay against flashbax's, on the same stream.

    python benchmarks/replay.py [--peers-python PATH]

The stream has 64 lanes and observations of four floats, and batches of 512 are drawn.

- sample + update: transitions per second, when a batch is drawn, its transitions are gathered, and its priorities are
  set anew.
- insert: environment steps per second, when one step of all lanes is inserted at a time.
- memory: bytes held, divided by the bytes that the contents of the slots need.

Each is timed in two ways: inside one compiled loop, as in a program that also acts and learns, and as separate donated
calls, as in a process that only has the replay. The calls of both buffers are compiled without XLA's concurrent
scheduler, which on CPU doubles the time of programs as small as these. The repeats of both alternate, so that a noisy
machine affects both alike, and medians are shown.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PEER = pathlib.Path(__file__).parent / "peers" / "flashbax_replay.py"
SLOTS = (10_000, 100_000, 1_000_000)
LANES = 64
BATCH_SIZE = 512
DISCOUNT = 0.99
IMPORTANCE_EXPONENT = 0.4
PRIORITY_EXPONENT = 0.6
BYTES_PER_SLOT = 4 * 4 + 4 + 4 + 1 + 4  # observation, action, reward, outcome, priority
CALLS = 200  # per repeat
REPEATS = 15
CALL_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class Step(NamedTuple):
    """One step of all lanes; leading axis `[LANES]`."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array


class Buffer(NamedTuple):
    """The pure functions that are measured."""

    init: Callable[[], Any]
    insert: Callable[[Any, Step], Any]
    sample: Callable[[Any, jax.Array], Any]
    """`sample(state, key)` returns whatever `set_priorities` and `transition` need."""
    set_priorities: Callable[[Any, Any, jax.Array], Any]
    """`set_priorities(state, sample, td_error [BATCH_SIZE])`."""
    transition: Callable[[Any], tuple[jax.Array, ...]]
    """`transition(sample)` returns what a learner needs: obs, action, reward, discount, next_obs, weight."""


def main() -> None:
    """Prints the table, then one line of JSON per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default="benchmarks/.peers/bin/python", help="interpreter that has flashbax")
    arguments = parser.parse_args()

    repeats: dict[tuple[str, str, int], list[float]] = {}
    for buffer, measured, slots, value in in_turns(arguments.peers_python):
        repeats.setdefault((buffer, measured, slots), []).append(value)
    results = {key: statistics.median(values) for key, values in repeats.items()}

    print(f"{'buffer':<10} {'measure':<28}" + "".join(f"{slots:>14,}" for slots in SLOTS) + "  slots")
    for measured in dict.fromkeys(measured for _, measured, _ in results):
        for buffer in ("flashbax", "qfleet"):
            values = [results[buffer, measured, slots] for slots in SLOTS]
            print(f"{buffer:<10} {measured:<28}" + "".join(f"{v:>14,.{2 if v < 100 else 0}f}" for v in values))
    for (buffer, measured, slots), value in results.items():
        print(
            json.dumps({"benchmark": "replay", "buffer": buffer, "measure": measured, "slots": slots, "value": value})
        )


def in_turns(peers_python: str) -> Iterator[tuple[str, str, int, float]]:
    """Yields buffer, measure, slots and value of each repeat: first flashbax's, from its own interpreter, then ours."""
    path = os.pathsep.join([str(PEER.parent.parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [peers_python, PEER],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        for line, ours in zip(iter(peer.stdout.readline, ""), measure(make_qfleet_buffer), strict=False):
            yield "flashbax", *json.loads(line)
            yield "qfleet", *ours
            peer.stdin.write("\n")  # the peer waits for this, so that the two never run at once
            peer.stdin.flush()
    if peer.returncode:
        raise SystemExit(f"{PEER} needs an interpreter with flashbax, see --peers-python; it failed as shown above")


def make_qfleet_buffer(slots: int) -> Buffer:
    """Returns our prioritised replay."""
    import numpy as np

    from qfleet.config import AgentConfig
    from qfleet.core.replay import Row, make_replay, outcome_of
    from qfleet.core.types import EnvSpec

    spec = EnvSpec(name="stream", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2)
    config = AgentConfig(
        replay="prioritised",
        replay_capacity=slots,
        batch_size=BATCH_SIZE,
        discount=DISCOUNT,
        priority_exponent=PRIORITY_EXPONENT,
        importance_exponent_start=IMPORTANCE_EXPONENT,
    )
    replay = make_replay(spec, config, LANES)

    def insert(state: Any, step: Step) -> Any:
        never = jnp.zeros(LANES, bool)
        return replay.insert(state, Row(step.obs, step.action, step.reward, outcome_of(step.terminated, never, never)))

    return Buffer(
        init=replay.init,
        insert=insert,
        sample=lambda state, key: replay.sample(state, key, jnp.float32(IMPORTANCE_EXPONENT)),
        set_priorities=replay.set_priorities,
        transition=lambda sample: tuple(sample.transition),
    )


def measure(make_buffer: Callable[[int], Buffer]) -> Iterator[tuple[str, int, float]]:
    """Yields measure, slots and value of every repeat."""
    for slots in SLOTS:
        for measured, value in measure_buffer(make_buffer(slots), slots):
            yield measured, slots, value


def measure_buffer(buffer: Buffer, slots: int) -> Iterator[tuple[str, float]]:
    """Yields measure and value of every repeat with one buffer, once it is full and its priorities differ."""

    def learn(state: Any, key: jax.Array) -> tuple[Any, None]:
        sample = buffer.sample(state, key)
        obs, action, reward, discount, next_obs, weight = buffer.transition(sample)
        td_error = weight * (reward + discount * next_obs.sum(axis=1) - obs.sum(axis=1) - action)
        return buffer.set_priorities(state, sample, td_error), None

    def insert(state: Any, key: jax.Array) -> tuple[Any, None]:
        return buffer.insert(state, random_step(key)), None

    def insert_ready(state: Any, step: Step) -> tuple[Any, None]:
        return buffer.insert(state, step), None

    keys = jax.random.split(jax.random.key(1), CALLS)
    steps = jax.vmap(random_step)(keys)
    td_error = jax.random.normal(jax.random.key(2), (BATCH_SIZE,))
    fill = jax.jit(lambda state, keys: jax.lax.scan(insert, state, keys)[0], donate_argnums=0)
    learn_loop = jax.jit(lambda state, keys: jax.lax.scan(learn, state, keys)[0], donate_argnums=0)
    insert_loop = jax.jit(lambda state, steps: jax.lax.scan(insert_ready, state, steps)[0], donate_argnums=0)
    sample_call = jax.jit(buffer.sample, compiler_options=CALL_OPTIONS)
    set_call = jax.jit(buffer.set_priorities, donate_argnums=0, compiler_options=CALL_OPTIONS)
    insert_call = jax.jit(buffer.insert, donate_argnums=0, compiler_options=CALL_OPTIONS)
    separate_keys = list(keys)
    separate_steps = [jax.tree.map(lambda x, i=i: x[i], steps) for i in range(CALLS)]

    def learn_by_calls(state: Any) -> Any:
        for key in separate_keys:
            state = set_call(state, sample_call(state, key), td_error)
        return state

    def insert_by_calls(state: Any) -> Any:
        for step in separate_steps:
            state = insert_call(state, step)
        return state

    state = fill(jax.jit(buffer.init)(), jax.random.split(jax.random.key(0), slots // LANES + 1))
    state = learn_loop(state, keys)
    yield "memory", sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / (slots * BYTES_PER_SLOT)
    measures = {
        "sample + update, in a loop": (BATCH_SIZE, lambda state: learn_loop(state, keys)),
        "sample + update, by calls": (BATCH_SIZE, learn_by_calls),
        "insert, in a loop": (LANES, lambda state: insert_loop(state, steps)),
        "insert, by calls": (LANES, insert_by_calls),
    }
    for measured, (items, run) in measures.items():
        state = jax.block_until_ready(run(state))  # compiles
        for _ in range(REPEATS):
            started = time.perf_counter()
            state = jax.block_until_ready(run(state))
            yield measured, items * CALLS / (time.perf_counter() - started)


def random_step(key: jax.Array) -> Step:
    """Returns one random step of all lanes; about every hundredth terminates."""
    obs_key, reward_key, end_key = jax.random.split(key, 3)
    return Step(
        obs=jax.random.normal(obs_key, (LANES, 4)),
        action=jnp.ones(LANES, jnp.int32),
        reward=jax.random.normal(reward_key, (LANES,)),
        terminated=jax.random.uniform(end_key, (LANES,)) < 0.01,
    )


if __name__ == "__main__":
    main()
