"""Where a run takes place. There is one algorithm, in `qfleet.core`; a topology decides which process does what.

The map: each cell is a name in `qfleet`, and a test resolves all of them. Open the package of a topology for its data
flow, and `topologies.fleet` for what all topologies on Ray share.

| topology | who acts | who stores | who computes gradients | who applies them |
|---|---|---|---|---|
| fused | topologies.acting.act | core.replay.ring.insert_row | core.learner.update | core.learner.update |
| overlapped | runtime.host_acting.HostActing | core.replay.ring.insert_row | core.learner.update | \
core.learner.update |
| all_reduce | training.peer.run_peer | core.replay.ring.insert_row | core.learner.update | core.replicas.Replicas |
| gossip | topologies.gossip.peer.GossipPeer | core.replay.ring.insert_row | core.learner.update | core.learner.update |
| actor_learner | topologies.fleet.actor.Actor | topologies.fleet.replay_shard.ReplayShard | \
topologies.actor_learner.learner.GlobalLearner | topologies.actor_learner.learner.GlobalLearner |
| parameter_server | topologies.parameter_server.worker.Worker | topologies.fleet.replay_shard.ReplayShard | \
topologies.parameter_server.worker.Worker | topologies.parameter_server.server_shard.ServerShard |

What crosses the border between two processes, and the name of what is sent or of what sends it:

| topology | crosses a border |
|---|---|
| fused | |
| overlapped | envs.worker_lanes.WorkerLanes |
| all_reduce | core.replicas.Replicas, runtime.peers.Reporter |
| gossip | topologies.gossip.peer.PeerChunkStats, topologies.gossip.averaging.average_step |
| actor_learner | topologies.fleet.actor.Chunk, core.types.Transition, topologies.actor_learner.learner.UpdateResult |
| parameter_server | topologies.fleet.actor.Chunk, topologies.parameter_server.requests.GradientAnswer, \
topologies.parameter_server.server_shard.PublishedParameters |

On Ray, pure code decides what each process does next: topologies.actor_learner.machine.ActorLearnerMachine,
topologies.parameter_server.machine.ServerMachine, topologies.gossip.machine.GossipMachine. A director carries it out.

Every topology has a config in `config.TOPOLOGIES`, and a class that is a `topologies.base.Topology`.
`training.assembly` makes it, and `training.run.Run` drives it: it advances, evaluates, saves and stops.
"""
