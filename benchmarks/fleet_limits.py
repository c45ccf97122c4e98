"""Limits of a fleet: how actors scale, how much time the learner loses to messages, how much the replay takes in.

python benchmarks/fleet_limits.py scaling     environments that sleep: environment steps/s with 1 to 32 actors
python benchmarks/fleet_limits.py starvation  a fleet's learner against one that has the replay in its own process
python benchmarks/fleet_limits.py chunks      actors that do nothing: chunks/s, and what each chunk costs every process
python benchmarks/fleet_limits.py insert      how many frames of Atari two shards take in
python benchmarks/fleet_limits.py soak        the memory of every process and of the object store, over time
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

import qfleet
from qfleet.config import ActorLearnerConfig, TrainConfig

SLEEP_SECONDS = 0.01


class Sleeper(gymnasium.Env):
    """Sleeps for 10 ms in each step, and computes nothing."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode of 200 steps."""
        super().reset(seed=seed)
        self._steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Sleeps, and returns a random observation."""
        time.sleep(SLEEP_SECONDS)
        self._steps += 1
        return self.np_random.random(4, np.float32), 1.0, False, self._steps == 200, {}


gymnasium.register("Sleeper-v0", "fleet_limits:Sleeper")


def main() -> None:
    """Runs the chosen measurement and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scaling", "starvation", "chunks", "insert", "soak", "in-process"))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--lanes", type=int, default=1, help="lanes of each actor; if several, each is stepped by its own process"
    )
    parser.add_argument("--ratio", type=float, default=16.0, help="environment steps for each learner step")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.part == "scaling":
        common.report(
            "fleet scaling", list(scaling(arguments.actors, arguments.lanes, arguments.ratio, arguments.seconds))
        )
    elif arguments.part == "starvation":
        common.report("fleet starvation", list(starvation(arguments.seconds, arguments.repeats)))
    elif arguments.part == "chunks":
        common.report("fleet chunks", [chunks(count, arguments.seconds) for count in arguments.actors])
    elif arguments.part == "insert":
        common.report("fleet insert", [insert(arguments.seconds)])
    elif arguments.part == "soak":
        common.report("fleet soak", list(soak(arguments.seconds)))
    else:
        print(updates_per_second_in_process(arguments.seconds))


def topology_of(config: TrainConfig) -> Any:
    """Returns the topology of a config, not yet started, without a run around it."""
    from qfleet.training.assembly import make_env_and_network, make_topology

    return make_topology(config, *make_env_and_network(config, None), None)


def scaling(num_actors: list[int], lanes: int, ratio: float, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields the speed of fleets with more and more actors, whose environments sleep, against one environment."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    alone = 1 / speed_alone(seconds)
    for count in num_actors:
        config = qfleet.make_config(
            "fleet_limits:Sleeper-v0", "rainbow_lite", "actor-learner", num_actors=count, lanes_per_actor=lanes,
            num_env_workers=0 if lanes == 1 else lanes,
            rows_per_chunk=32, env_steps=10**9, warmup_env_steps=500, env_steps_per_learner_step=ratio, batch_size=64,
            hidden_sizes=(64, 64),
        )  # fmt: skip
        fleet = topology_of(config)
        try:
            started = fleet.start()
            while fleet.advance(10**9).fleet["actor_env_steps_per_second_min"] == 0:  # until all have begun
                pass
            run_for(fleet, 5.0)
            env_steps, learner_steps, took = run_for(fleet, seconds)
        finally:
            fleet.close()
        yield {
            "actors": count,
            "env_steps_per_second": env_steps / took,
            "learner_steps_per_second": learner_steps / took,
            "lanes_per_actor": lanes,
            "share_of_linear": env_steps / took / count / lanes * alone,
            "start_seconds": started,
        }


def speed_alone(seconds: float) -> float:
    """Returns the steps per second of one sleeping environment alone."""
    env = Sleeper()
    env.reset(seed=0)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < min(seconds, 5.0):
        env.step(0)
        count += 1
    return count / (time.perf_counter() - started)


def run_for(fleet: Any, seconds: float) -> tuple[int, int, float]:
    """Returns environment steps, learner steps, and the seconds that they took."""
    env_steps = learner_steps = 0
    took = 0.0
    while took < seconds:
        progress = fleet.advance(10**9)
        env_steps += progress.new_env_steps
        learner_steps += progress.new_learner_steps
        took += progress.train_seconds
    return env_steps, learner_steps, took


def atari_config(**settings: Any) -> TrainConfig:
    """Returns the config of a learner that never waits for actors: the Nature network, batches of 64."""
    return qfleet.make_config(
        "ale:Pong", "atari_dqn", "actor-learner", num_actors=2, lanes_per_actor=4, replay="prioritised", batch_size=64,
        replay_capacity=40_000, warmup_env_steps=1_000, env_steps_per_learner_step=0.001, env_steps=10**9, **settings,
    )  # fmt: skip


def full_replay(config: TrainConfig) -> Any:
    """Returns a replay full of random numbers, in the form that a checkpoint holds."""
    from qfleet.core.replay import SavedReplay
    from qfleet.core.replay.ring import Ring, Row
    from qfleet.topologies.fleet.env_and_agent import make_env_and_agent

    spec, topology = make_env_and_agent(config).stored_spec, config.topology
    random = np.random.default_rng(0)
    shape = (config.agent.replay_capacity // topology.num_envs, topology.num_envs)
    obs = random.integers(0, 256, (*shape, *spec.observation_shape), np.uint8)
    zeros = np.zeros(shape, np.float32)
    rows = Row(obs, zeros.astype(np.int32), zeros, zeros.astype(np.uint8))  # type: ignore[arg-type]
    leaves = random.random(shape, np.float32)
    leaves[-1] = leaves[:4] = 0.0
    num_segments = config.topology_as(ActorLearnerConfig).num_actors
    heads = np.zeros(num_segments, np.int32)
    ring = Ring(rows, heads, np.full(num_segments, shape[0]), np.full(num_segments, shape[0], np.uint32))  # type: ignore[arg-type]
    return SavedReplay(ring, leaves, np.float32(1.0))  # type: ignore[arg-type]


def starvation(seconds: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields the updates/s of a fleet's learner and of one that samples in its own process, measured by turns."""
    for shards in (1, 2):
        ratios = []
        for _ in range(repeats):
            command = [sys.executable, __file__, "in-process", "--seconds", str(seconds)]
            alone = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            config = atari_config(num_replay_shards=shards)
            fleet = topology_of(config)
            try:
                fleet.start()
                learner = jax.tree.unflatten(jax.tree.structure(fleet._shapes), fleet._director.learner_state()[1])
                state = {"learner": learner, "replay": full_replay(config)}
                fleet.restore(state, {"env_steps": 10**6, "learner_steps": 0, "replay_starts_at": 0})
                run_for(fleet, 10.0)
                _, learner_steps, took = run_for(fleet, seconds)
                waiting = fleet.advance(10**9).fleet
            finally:
                fleet.close()
            ratios.append(learner_steps / took / alone)
            yield {
                "shards": shards,
                "in_process_updates_per_second": alone,
                "fleet_updates_per_second": learner_steps / took,
                "ratio": ratios[-1],
                "median_ratio": statistics.median(ratios),
                "learner_waiting": waiting["learner_waiting"],
                "shards_waiting": waiting["shards_waiting"],
            }


def updates_per_second_in_process(seconds: float) -> float:
    """Returns the updates/s of the same learner with the same replay in one process, as in `overlapped`."""
    from qfleet.core.learner import make_learner
    from qfleet.core.replay import make_replay
    from qfleet.core.updates import learn_from_replay, no_losses
    from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory
    from qfleet.topologies.fleet.env_and_agent import make_env_and_agent

    config = atari_config()
    reuse_freed_memory()
    built = make_env_and_agent(config)
    agent, learner = built.agent, make_learner(built.agent, config.agent)
    replay = make_replay(built.stored_spec, config.agent, config.topology.num_envs)
    saved = full_replay(config)
    one = saved.ring._replace(**{name: getattr(saved.ring, name)[:1] for name in ("cursor", "size", "insertions")})
    state = (
        jax.jit(lambda: learner.init(agent.init(jax.random.key(0))))(),
        jax.jit(replay.restore)(jax.tree.map(jnp.asarray, saved._replace(ring=one))),
        no_losses(),
    )
    learn = jax.jit(
        lambda state, key: learn_from_replay(learner, replay, state, key, jnp.float32(0.5), jnp.int32(4)),
        donate_argnums=0,
    )
    state = jax.block_until_ready(learn(state, jax.random.key(0)))
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        state = jax.block_until_ready(learn(state, jax.random.key(count)))
        count += 4
    return count / (time.perf_counter() - started)


def chunks(num_actors: int, seconds: float) -> dict[str, Any]:
    """Returns how many chunks of a fleet are stored per second, if its actors return the same chunk again and again."""
    from qfleet.topologies.actor_learner import director as director_module
    from qfleet.topologies.actor_learner.remote import RemoteActor

    class Stub(RemoteActor):
        """An actor that acts once, and returns its first chunk again and again."""

        def __init__(self, variables: dict[str, str], config: qfleet.TrainConfig, number: int) -> None:
            """Has the actor remember its chunk, which depends on its epsilon only."""
            super().__init__(variables, config, number)
            setattr(self._actor, "collect", functools.cache(self._actor.collect))  # noqa: B010, mypy knows a method

    setattr(director_module, "RemoteActor", Stub)  # noqa: B010, the module imports this name from another
    config = qfleet.make_config(
        "CartPole-v1", "rainbow_lite", "actor-learner", num_actors=num_actors, num_replay_shards=1, lanes_per_actor=4,
        rows_per_chunk=4, env_steps=10**9, warmup_env_steps=500, env_steps_per_learner_step=1e6,
    )  # fmt: skip
    fleet = topology_of(config)
    try:
        fleet.start()
        run_for(fleet, 5.0)
        groups = {
            "director": [os.getpid()],
            "shard": [process.place[0] for process in fleet._director._shards],
            "actor": [actor.place[0] for actor in fleet._director._actors],
        }
        before = {name: cpu_seconds(pids) for name, pids in groups.items()}
        env_steps, _, took = run_for(fleet, seconds)
        costs = {name: cpu_seconds(pids) - before[name] for name, pids in groups.items()}
    finally:
        fleet.close()
    count = env_steps / 16
    microseconds = {f"{name}_us_per_chunk": 1e6 * cost / count for name, cost in costs.items()}
    return {"actors": num_actors, "chunks_per_second": count / took, **microseconds}


def cpu_seconds(pids: list[int]) -> float:
    """Returns the CPU time that processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def insert(seconds: float) -> dict[str, Any]:
    """Returns how many transitions of single 84x84 frames two shards take in from two processes that produce them."""
    import ray

    from qfleet.topologies.fleet.actor import Chunk
    from qfleet.topologies.fleet.calls import Inbox
    from qfleet.topologies.fleet.cluster import connected, is_local
    from qfleet.topologies.fleet.references import Reference
    from qfleet.topologies.fleet.remote import RemoteReplayShard
    from qfleet.topologies.fleet.remote_process import InRemoteProcess, RemoteProcess
    from qfleet.topologies.fleet.replay_shard import Writer
    from qfleet.topologies.fleet.supervisor import Supervisor, carrier_of

    class Producer(InRemoteProcess):
        """Stands for an actor whose environments and network cost nothing."""

        def __init__(self, variables: dict[str, str], chunk: Chunk) -> None:
            """Keeps a copy of the chunk, which `produce` returns."""
            super().__init__(variables)
            self._chunk = jax.tree.map(np.array, chunk)

        def produce(self) -> Reference[Chunk]:
            """Returns the chunk."""
            return Reference(self._chunk)

    config = atari_config(num_replay_shards=2, rows_per_chunk=50)
    replay = full_replay(config)
    rows = jax.tree.map(lambda x: x[:50, :4], replay.ring.rows)
    chunk = Chunk(rows, np.full((50, 4), 0.5, np.float32))
    cpu = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1"}
    with connected("local", 8, "ray_address"):
        supervisor = Supervisor(60.0, 0)
        inbox = Inbox()
        supervisor.open(inbox, carrier_of(inbox, is_one_machine=is_local()))
        producers = [
            supervisor.add(RemoteProcess(f"producer {i}", Producer, (chunk,), {"CPU": 1}, cpu, lambda: None))
            for i in range(2)
        ]
        shards = [
            supervisor.add(RemoteProcess(f"shard {i}", RemoteReplayShard, (config, i), {"CPU": 1}, cpu, lambda: None))
            for i in range(2)
        ]
        counts, stored = [0, 0], [0]

        def produce(i: int) -> None:
            def produced(made: Reference[Chunk]) -> None:
                writer = Writer(0, counts[i])
                counts[i] += 1
                insert = RemoteReplayShard.insert
                supervisor.submit(shards[i], insert, 0, writer, made, on_reply=lambda answer: inserted(i))

            supervisor.submit(producers[i], Producer.produce, on_reply=produced, results=[Reference()])

        def inserted(i: int) -> None:
            stored[0] += chunk.td_error.size
            produce(i)

        for i in range(2):
            for _ in range(3):
                produce(i)
        started = before = 0.0
        while not started or time.perf_counter() - started < seconds:
            supervisor.wait(0.1)
            supervisor.process_replies()
            if not started and stored[0] > 20_000:
                started, before = time.perf_counter(), stored[0]
        rate = (stored[0] - before) / (time.perf_counter() - started)
        supervisor.terminate()
        moved = len(ray.cloudpickle.dumps(chunk))
    return {"transitions_per_second": rate, "bytes_per_frame_byte": moved / chunk.rows.obs.nbytes}


def private_bytes(process: int) -> int:
    """Returns the memory that only this process uses, according to Linux."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private"))


def object_store_bytes(worker: int) -> int:
    """Returns the memory of this machine's object store that was ever used.

    The parent of a worker process keeps the object store.
    """
    keeper = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]
    lines = Path(f"/proc/{keeper}/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssShmem"))


def soak(seconds: float) -> Iterator[dict[str, Any]]:
    """Yields the growth of the memory of every process after the warm-up, in percent per 10 minutes."""
    config = qfleet.make_config(
        "CartPole-v1", "rainbow_lite", "actor-learner", num_actors=4, num_replay_shards=2, env_steps=10**9
    )
    return growth(topology_of(config), seconds)


def growth(fleet: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields the growth of the memory of every process of a topology on Ray, as `soak` does."""
    samples: dict[str, list[tuple[float, float]]] = {}
    started = time.monotonic()
    try:
        fleet.start()
        while (now := time.monotonic() - started) < seconds:
            run_for(fleet, 5.0)
            processes = {process.name: process.place[0] for process in fleet._director._supervisor._processes}
            worker = next(iter(processes.values()))
            sizes = {"object store": object_store_bytes(worker), "director": private_bytes(os.getpid())}
            sizes |= {name: private_bytes(process) for name, process in processes.items()}
            for name, size in sizes.items():
                samples.setdefault(name, []).append((now, size))
    finally:
        fleet.close()
    for name, values in samples.items():
        times, sizes = np.array([each for each in values if each[0] > seconds / 4]).T
        slope = np.polyfit(times, sizes, 1)[0] * 600
        yield {
            "process": name,
            "megabytes": float(np.mean(sizes)) / 1e6,
            "percent_per_10_minutes": 100 * slope / max(np.mean(sizes), 1.0),
        }


if __name__ == "__main__":
    main()
