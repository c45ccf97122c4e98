"""The calls by which the parts of a gossip run are measured: the chunks of a peer."""

import dataclasses
import time

from qfleet.config import GossipConfig, TrainConfig
from qfleet.planning.costs import Cost
from qfleet.planning.gossip import GossipModel, own_config
from qfleet.planning.measuring.calls import Caller, ServedProcess, caller
from qfleet.planning.simulated_run import decisions, endless
from qfleet.runtime.child_process import visible_gpus
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import ON_CPU
from qfleet.topologies.gossip.averaging import Leaves
from qfleet.topologies.gossip.peer import StartingPoint
from qfleet.topologies.gossip.remote import RemotePeer
from qfleet.topologies.gossip.topology import env_steps_per_chunk
from qfleet.training.assembly import make_own_learner

_MOST_ROUNDS = 30
_FEWEST_ROUNDS = 5
_SECONDS = 2.0
"""Time after which there are no more rounds than the fewest."""

_LONGEST_WARMUP = 5_000
"""Environment steps after which the peer that is measured begins to learn, at the latest."""


def measure_gossip(config: TrainConfig) -> dict[str, Cost]:
    """Returns the costs of a peer's chunks, without and with an averaging step, and of the director's own part."""
    topology, own = config.topology_as(GossipConfig), own_config(endless(config))
    warmup = min(own.agent.warmup_env_steps, _LONGEST_WARMUP)
    own = dataclasses.replace(own, agent=dataclasses.replace(own.agent, warmup_env_steps=warmup))
    num_env_steps = env_steps_per_chunk(own, topology.gossip_period_learner_steps)
    with caller(config) as calls:
        variables = {} if visible_gpus() else dict(ON_CPU)
        peer = calls.start("peer", RemotePeer, (own, make_own_learner), variables)
        _begin(calls, peer)
        calls.call(peer, "warm-up", RemotePeer.take_chunk, warmup + num_env_steps, results=[Reference()])
        wake = calls.wake_cost(peer)

        def chunk() -> None:
            calls.call(peer, "chunk", RemotePeer.take_chunk, num_env_steps, results=[Reference()])

        def chunks() -> None:
            snapshot = Reference[Leaves]()
            calls.call(peer, "chunk", RemotePeer.take_chunk, num_env_steps, results=[snapshot])
            method = RemotePeer.average_and_take_chunk
            calls.call(
                peer, "chunk after averaging", method, num_env_steps, 0, snapshot, snapshot, results=[Reference()]
            )

        def rounds() -> None:
            began = time.perf_counter()
            for number in range(_MOST_ROUNDS):
                if number < _FEWEST_ROUNDS or time.perf_counter() - began < _SECONDS:
                    chunks()

        calls.measure(rounds, 1 + topology.num_processes)
        found = calls.costs()
        decide = decisions(GossipModel(endless(config), found), found)
        return {**found, **calls.direct(peer, chunk, decide), "wake": wake}


def _begin(calls: Caller, peer: ServedProcess) -> None:
    calls.call(peer, "prepare", RemotePeer.prepare)
    learner = Reference[Leaves]()
    calls.call(peer, "copy learner", RemotePeer.copy_learner, results=[learner])
    calls.call(peer, "begin", RemotePeer.begin, StartingPoint(0, 0, 0), learner, Reference(None))
