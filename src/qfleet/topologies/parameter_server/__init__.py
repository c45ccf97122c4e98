"""The parameter server (Gorila), on Ray: workers act and compute gradients, and a sharded server applies them.

Each worker, each shard of the server and each shard of a replay that the workers share is a process of its own. The
run's process decides what each does next: `machine.ServerMachine` is a state machine, which makes the requests below.
For each request a thread of the run, that of `director.ServerDirector`, calls the remote method of that name
(`remote.py`, `fleet/remote.py`), and that method calls the one below, with arrays in place of references. By default
each worker has its own replay: "own". If `num_replay_shards` is above 0, all workers share one: "shared". The steps, in
the order in which a transition meets them:

    step                        who decides                        function                      file
    --------------------------  ---------------------------------  ----------------------------  -----------------------
    server shard: publishes     Publish: ensure_published          ServerShard.publish           server_shard.py
    worker: pulls parameters    Act: _start_chunks                 Worker.pull                   worker.py
    worker: acts for one chunk  Act                                Worker.act                    worker.py
      makes the chunk                                              Actor.collect                 fleet/actor.py
        one step of all lanes                                      act                           acting.py
          chooses actions                                          Agent.act                     core/agent.py
          steps environments                                       step_lanes                    envs/in_graph.py
    own: the worker stores it   Act                                ReplayShard.insert            fleet/replay_shard.py
    shared: a shard stores it   Insert: _acted                     ReplayShard.insert            fleet/replay_shard.py
      row by row                                                   Replay.insert                 core/replay/replay.py
    own: worker's gradient      ComputeGradient: _start_gradient   Worker.compute_gradient       worker.py
      draws a batch                                                Replay.sample                 core/replay/replay.py
      gradient, in pieces                                          ShardedLearner.gradients      core/sharded_learner.py
        gradient                                                   Learner.gradients             core/learner.py
          of the loss, made by                                     make_loss                     core/batch_loss.py
      sets its priorities                                          Replay.set_priorities         core/replay/replay.py
    shared: shards draw shares  SampleShare: _start_gradients      ReplayShard.sample_share      fleet/replay_shard.py
    shared: worker's gradient   ComputeGradientOf                  Worker.compute_gradient_of    worker.py
    shared: priorities go back  SetPriorities: _gradient_arrived   ReplayShard.set_priorities    fleet/replay_shard.py
    gathers a step's gradients  ServerMachine._gradient_arrived    StepQueue.push                step_queue.py
    asks for a learner step     ApplyGradients: _request_steps     ShardedServer._request_steps  sharded_server.py
    each server shard: a step   ApplyGradients                     ServerShard.apply_gradients   server_shard.py
      on its piece                                                 ShardedLearner.apply          core/sharded_learner.py
        new parameters                                             Learner.apply                 core/learner.py
    finds what a worker lacks   the next request to the worker     PooledWorker.next_pull        machine.py
    worker: pulls it            the next request to the worker     Worker.pull                   worker.py

Indented functions are called by the function above them; those of the core are the same in every topology. "Insert:
_acted" is the request, and the method of `ServerMachine` or `ShardedServer` that decides on it; requests to shards of
the replay are made by `fleet.sharded_replay.ShardedReplay`. Files are in this package, in `topologies/` or in
`qfleet/`. `qfleet.topologies` explains the words. `Agent`, `Replay` and `Learner` are records of functions, which
`make_agent` and so on bind in the same file: the code of `Replay.insert` is `_insert`. In environments that aren't
written in JAX, a worker takes its steps by `_HostLanes.take` of `fleet/actor.py`, which chooses actions by `Agent.act`
and steps the lanes by `runtime.host_acting.HostActing`.

A request carries references to arrays that another process has made, or is about to make. Arrays go directly from
process to process (`fleet/channel.py`, `fleet/ray_calls.py`). If the agent clips gradients and the server has
several shards, each shard needs the norm of the whole gradient. A step then takes two requests instead of
`ApplyGradients`: `AverageGradients` returns the square of its piece's norm, and `ApplyAverages` gets the squares of all
shards.

Three rules follow from the way in which calls are made:

- A process does what it is asked for in order. Every learner step is sent to all shards at once, so all shards take the
  same steps in the same order without any agreement between them. It is the order in which gradients arrive.
- Parameters are passed on as references to what a learner step *will* return. The supervisor makes a call once the
  values of its references are there, so a worker that is asked for a gradient now gets the newest parameters.
- A worker has one request for a gradient at a time, and two for chunks. Parameters that came with a second request for
  a gradient would grow old while the worker is busy with the first.

`sharded_server.ShardedServer` is the half of the machine that decides about the server. It knows the newest parameters,
takes snapshots, and goes back to a snapshot when a shard is lost: gradients of earlier parameters are then refused.
`gradient_filter` drops a gradient if its parameters are too many steps old, or if its loss is far above the usual. A
rate limiter keeps the replay ratio. A worker that dies, raises or falls silent is replaced, and its replay continues
with what the newest checkpoint has of it.

If `gradients_per_learner_step` is the number of workers and `max_staleness` is 0, all workers are in step, and the
parameters are those of one learner on the joined batch.

Source: Nair et al. 2015, arXiv 1507.04296.
"""
