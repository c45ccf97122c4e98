"""Where a run takes place. There is one algorithm, in `qfleet.core`; a topology decides which process does what.

The map: each cell is a name in `qfleet`, and a test resolves all of them. Open the package of a topology for each step
from the environment to new parameters, and `topologies.fleet` for what all topologies on Ray share.

| topology | who acts | who stores | who computes gradients | who applies them |
|---|---|---|---|---|
| fused | topologies.acting.act | core.replay.ring.insert_row | core.learner.update | core.learner.update |
| overlapped | runtime.host_acting.HostActing | core.replay.ring.insert_row | core.learner.update | \
core.learner.update |
| all_reduce | training.peer.run_peer | core.replay.ring.insert_row | core.learner.update | core.learner.update |
| gossip | topologies.gossip.peer.GossipPeer | core.replay.ring.insert_row | core.learner.update | core.learner.update |
| actor_learner | topologies.fleet.actor.Actor | topologies.fleet.replay_shard.ReplayShard | \
topologies.actor_learner.learner.GlobalLearner | topologies.actor_learner.learner.GlobalLearner |
| parameter_server | topologies.parameter_server.worker.Worker | topologies.fleet.replay_shard.ReplayShard | \
topologies.parameter_server.worker.Worker | topologies.parameter_server.server_shard.ServerShard |

What crosses the border between two processes, and the name of what is sent or of what sends it:

| topology | crosses a border |
|---|---|
| fused | nothing |
| overlapped | envs.worker_lanes.WorkerLanes |
| all_reduce | core.replicas.Replicas, runtime.peers.Reporter |
| gossip | topologies.gossip.peer.PeerChunkStats, topologies.gossip.averaging.average_step |
| actor_learner | to actors: topologies.actor_learner.machine.Broadcast. To shards: topologies.fleet.actor.Chunk, and \
priorities from topologies.actor_learner.learner.GlobalLearner. To the learner: core.types.Transition |
| parameter_server | to the server: topologies.parameter_server.requests.GradientAnswer. To workers: \
topologies.parameter_server.requests.Pull. With a shared replay also topologies.fleet.actor.Chunk and \
core.types.Transition, and priorities from topologies.parameter_server.worker.Worker |

On Ray, pure code decides what each process does next: topologies.actor_learner.machine.ActorLearnerMachine,
topologies.parameter_server.machine.ServerMachine, topologies.gossip.machine.GossipMachine. A director carries it out.

Words, of which the glossary in `docs/` has more:

    lane      one environment of the batch that is stepped at once
    row       one step of all lanes. A lane whose episode has ended holds its final observation in the next row, and no
              step: the outcome there is `NO_STEP`
    slot      one lane of one row in the replay's ring, where a transition may start
    segment   lanes that step together, such as those of one actor. The ring has one write head for each segment
    chunk     the rows that a process takes before anything else is asked of it
    round     the batches that the learner learns from in one call
    share     the part of a batch, or of a round, that one shard of the replay draws

Every topology has a config in `config.TOPOLOGIES`, and a class that is a `topologies.base.Topology`.
`training.assembly` makes it, and `training.run.Run` drives it: it advances, evaluates, saves and stops.
"""
