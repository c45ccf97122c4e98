"""Decentralised training by gossip: peers learn on their own, and pairs of them average their parameters now and then.

Each peer is a whole run (`fused`, or `overlapped` for environments outside the program) in a process of its own on
Ray. No peer waits for another. The process that started the run directs the peers and learns nothing itself.

    process of the run                                      processes on Ray, one for each peer
    topology.Gossip                                         remote.RemotePeer, a peer.GossipPeer
      advance, state, evaluate                                acts, stores, computes gradients, applies them
        |                                                     (all inside its own run)
    director.GossipDirector  (a thread)                          ^        |
      machine.GossipMachine decides, and peer_records            |        |
        chunks_to_request: which peers to ask next               |        |
        draw_pairs: which peers exchange parameters              |        |
      TakeChunk: GossipPeer.take_chunk(steps, own, other) -------+        |
        answered by PeerChunkStats, and a reference to a snapshot <-------+
      Prepare, CopyLearner, BeginFrom: for new peers

    peer i --- snapshot of its parameters, by reference ---> peer j
      averaging.average_step, in both: parameters += (the other's snapshot - its own snapshot) / 2

What crosses a process border: statistics of each chunk (to the director); snapshots of parameters (between the two
peers of an exchange, and to `topology.Gossip`, which evaluates their mean); the whole learner (from a donor to a new
peer); learner and replay (to and from checkpoints). Gradients and transitions never leave the peer that made them.

The order of events. The director keeps up to two chunks of each peer in flight, each about half a period of learner
steps long. Every chunk ends with a snapshot of the peer's parameters. A peer that has exchanged with nobody for a
whole period exchanges with another one at random. Both sides then apply `average_step` at the start of the next chunk
that is requested of them. A peer exchanges again only after a snapshot has come back that contains its last exchange:
a second step from the same snapshot would move it twice as far.

A peer that dies, raises or falls silent is replaced while the others continue. Its replacement copies the learner of a
donor, and reads its share of the replay from the newest checkpoint. What the run has learned is the mean over the
peers. That mean is evaluated and saved, in the format of every other topology; the saved replay is that of all peers.

Source: Lian et al. 2018, arXiv 1710.06952 (AD-PSGD). Deviations:
- Both sides average snapshots that are about a chunk old, instead of locking each other.
- Each peer's optimiser may have moments. They stay with the peer, and only parameters are averaged.
- Schedules in environment steps are divided among the peers (`peer.peer_config`), because each peer takes only its
  share of those steps. With a replay this holds for learner steps too, so `learning_rate_learner_steps` is divided.
  Without replay each peer takes as many learner steps as one process would. `target_update_period` is each peer's own.
"""
