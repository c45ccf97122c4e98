"""The actor-learner topology (Ape-X), on Ray: many actors fill a replay, from which one learner learns.

    who acts                 Actor.collect                                     fleet/actor.py
    who stores               ReplayShard.insert                                fleet/replay_shard.py
    who draws                ReplayShard.sample                                the same
    who computes gradients   GlobalLearner.learn                               learner.py
    who applies them         GlobalLearner.learn, in the same compiled step    learner.py
    who takes parameters     RemoteActor.fetch_and_collect: those that         remote.py
                             GlobalLearner.params returned last                learner.py
    who decides              ActorLearnerMachine, a pure state machine, with   machine.py
                             ShardedReplay, which divides a batch              fleet/sharded_replay.py
    who carries it out       ActorLearnerDirector, in a thread of the run      director.py
    who checks and records   ActorLearner, in the run's process                topology.py

Each actor, each shard and the learner is a process of its own (`remote.py`, `fleet/remote.py`). Every arrow crosses a
process border: arrays go directly from process to process (`fleet/channel.py`, `fleet/ray_calls.py`), and the director
only hands on references.

                            chunk: rows, with the actor's own TD errors
          +-------------+ ------------------------------------------> +--------------+
          | RemoteActor |                                             | Replay shard |
          +-------------+                                             +--------------+
                 ^                                                       |        ^
                 | parameters, fetched                    each shard's   |        | TD errors of
                 | when a chunk begins                    share of a     |        | that share
                 |                                        round          v        |
                 |                                                    +---------------+
                 +--------------------------------------------------- | RemoteLearner |
                                                                      +---------------+

The requests of the machine, in the order in which a transition meets them. Each is answered before the next is made,
except for `Learn`, which is made together with its `Sample`s:

    Publish -> Collect -> Insert -> Sample + Learn -> SetPriorities

A round is a few batches, drawn over all shards as if from one replay. A rate limiter (`fleet/rate_limiter.py`) keeps
the learner from taking more steps than the replay ratio allows, and the actors from running far ahead of the learner.
The work under way is bounded: chunks for each actor, rounds for the learner.

A process that dies, raises an error or falls silent is replaced. An actor comes back with its epsilon, and its segment
of the replay is cut where the chunks of its predecessor end. A shard comes back with its share of the newest
checkpoint, the learner with the learner state of that checkpoint.

Source: Horgan et al. 2018, arXiv 1803.00933.
"""
