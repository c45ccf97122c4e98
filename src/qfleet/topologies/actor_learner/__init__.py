"""The actor-learner topology (Ape-X), on Ray: many actors fill a replay, from which one learner learns.

Each actor, each shard of the replay and the learner is a process of its own. The run's process decides what each does
next: `machine.ActorLearnerMachine` is a state machine, which makes the requests below. For each request a thread of the
run, that of `director.ActorLearnerDirector`, calls the remote method of that name (`remote.py`, `fleet/remote.py`), and
that method calls the one below, with arrays in place of references. The steps, in the order in which a transition meets
them:

    step                                 who decides                 function                    file
    -----------------------------------  --------------------------  --------------------------  -----------------------
    learner: publishes its parameters    Publish: _publish           GlobalLearner.publish       learner.py
    actor: receives them                 Collect: _start_chunks      Actor.receive               fleet/actor.py
    actor: acts, computes TD errors      Collect                     Actor.collect               fleet/actor.py
      one step of all lanes                                          act                         acting.py
        chooses actions                                              Agent.act                   core/agent.py
        steps environments                                           step_lanes                  envs/in_graph.py
    which shard stores the chunk         Insert: _collected          ShardedReplay.store         fleet/sharded_replay.py
    shard: stores it                     Insert                      ReplayShard.insert          fleet/replay_shard.py
      row by row                                                     Replay.insert               core/replay/replay.py
    how much each shard draws            SampleShare: _start_rounds  ShardedReplay.draw          fleet/sharded_replay.py
    shard: draws its share of the round  SampleShare                 ReplayShard.sample_share    fleet/replay_shard.py
      from ring and sum tree                                         Replay.sample_share         core/replay/replay.py
    learner: learns from the round       Learn: _start_rounds        GlobalLearner.learn         learner.py
      from each of its batches                                       update                      core/learner.py
        gradient                                                     Learner.gradients           core/learner.py
          of the loss, made by                                       make_loss                   core/batch_loss.py
        new parameters, target network                               Learner.apply               core/learner.py
    shard: sets priorities of its share  SetPriorities: _learned     ReplayShard.set_priorities  fleet/replay_shard.py
      in the sum tree                                                Replay.set_priorities       core/replay/replay.py
    learner: publishes new parameters    Publish: _publish           GlobalLearner.publish       learner.py

Indented functions are called by the function above them; those of the core are the same in every topology. "Insert:
_collected" is the request, and the method of the machine that makes it. Files are in this package, in `topologies/` or
in `qfleet/`. `qfleet.topologies` explains the words. `Agent`, `Replay` and `Learner` are records of functions, which
`make_agent` and so on bind in the same file: the code of `Replay.insert` is `_insert`. In environments that aren't
written in JAX, an actor takes its steps by `_HostLanes.take` of `fleet/actor.py`, which chooses actions by `Agent.act`
and steps the lanes by `runtime.host_acting.HostActing`.

A request carries references to arrays that another process has made, or is about to make: `Learn` is requested together
with its `SampleShare`s, and begins once all have been answered. Arrays go directly from process to process
(`fleet/channel.py`, `fleet/ray_calls.py`).

A round is a few batches, drawn over all shards as if from one replay. A rate limiter (`fleet/rate_limiter.py`) keeps
the learner from taking more steps than the replay ratio allows, and the actors from running far ahead of the learner.
The work under way is bounded: chunks for each actor, rounds for the learner.

A process that dies, raises an error or falls silent is replaced. An actor comes back with its epsilon, and its segment
of the replay is cut where the chunks of its predecessor end. A shard comes back with its share of the newest
checkpoint, the learner with the learner state of that checkpoint.

Source: Horgan et al. 2018, arXiv 1803.00933.
"""
