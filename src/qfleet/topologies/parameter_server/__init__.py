"""The parameter server (Gorila): workers compute gradients, and a sharded server applies them. Processes on Ray.

The way of a gradient, and of the parameters that it makes:

      worker process                                             server shard process (one of several)
      --------------                                             -------------------------------------
      Worker.act                 acts in its lanes
         | a chunk of steps
      ReplayShard.insert         the worker's own replay, or a
         | a batch               replay shard in its own process
      Worker.compute_gradient
         | one piece for each server shard
         +------------------ a reference to it --------------->  ServerShard.apply_gradients
                                                                    | a learner step on its piece
         +<----------------- references to them ---------------  ServerShard returns PublishedParameters
      Worker.pull
         | acts and learns with them from now on

The process that started the run coordinates the others, in a thread of its own. It never touches an array:

- `machine.ServerMachine` decides, as a pure state machine: it asks workers for chunks (at most two at a time each) and
  for gradients (one at a time each).
- `sharded_server.ShardedServer` is the half of it for the server: it makes learner steps of gradients, knows the newest
  parameters, takes snapshots, and goes back to a snapshot when a shard is lost. Parts of it are `step_queue` and
  `gradient_filter`.
- `requests` has what the machine requests of workers and shards.
- `director.ServerDirector` calls the methods of `remote` that belong to the requests, and tells the machine of replies
  and losses.

What crosses the border between two processes. Arrays go directly from one to the other, by references: through memory
that the processes of one machine share (`fleet/channel.py`), or through Ray's object store (`fleet/ray_calls.py`).

| what | from | to |
|---|---|---|
| gradient, one piece per shard | worker | server shards |
| parameters, one piece per shard | server shards | workers |
| chunk, if the workers share a replay | worker | replay shard |
| shares of a batch, if the workers share a replay | replay shards | worker |
| TD errors, if the workers share a replay | worker | replay shards |
| calls, losses, times | director | all, and back |

If the agent clips gradients and the server has several shards, each shard needs the norm of the whole gradient. A step
then takes two calls: `ServerShard.average_gradients`, which returns the square of its piece's norm, and
`ServerShard.apply_averages`, which gets the squares of all shards.

Three rules follow from the way in which calls are made:

- A process does what it is asked for in order. Every learner step is sent to all shards at once, so all shards take the
  same steps in the same order without any agreement between them. It is the order in which gradients arrive.
- Parameters are passed on as references to what a learner step *will* return. The supervisor makes a call once the
  values of its references are there, so a worker that is asked for a gradient now gets the newest parameters.
- A worker has one request for a gradient at a time. Parameters that came with a second request would grow old while the
  worker is busy with the first.

A gradient is dropped if its parameters are too many steps old, or if its loss is far above the usual. A rate limiter
keeps the replay ratio. A worker that dies, raises or falls silent is replaced, and its replay continues with what the
newest checkpoint has of it. If a shard of the server is lost, all shards go back to their newest snapshot. Gradients
of earlier parameters are then refused. `qfleet.core.sharded_learner` has the mathematics.

If `gradients_per_learner_step` is the number of workers and `max_staleness` is 0, all workers are in step, and the
parameters are those of one learner on the joined batch.

Source: Nair et al. 2015, arXiv 1507.04296.
"""
