"""Shared by all topologies whose processes run on Ray; names none of them.

    topology.py          OnRay: what a run sees. It owns a director, and reads and writes checkpoints.
    director.py          Director: a thread in the run's process. It submits requests and handles replies.
    actors_director.py   ActorsDirector: a director of a pool of actors, which asks them for chunks in turn.
    sharded_replay.py    ShardedReplay: the director's view of a replay in shards.
    rate_limiter.py      RateLimiter: which learner steps are due, and whether the actors must wait.
    supervisor.py        Supervisor: starts, watches and replaces processes. The only file that calls methods in them.
    references.py        Reference: an array that stays where it was made until a process needs it.
    calls.py             Call, Reply, Inbox: what is sent to a process, and what is heard of it.
    channel.py           Switchboard: carries calls within one machine, by sockets and shared memory.
    shared_memory.py     Arena: that memory, in blocks that the director leases.
    ray_calls.py         RayCarrier: carries calls in a cluster, by Ray.
    cluster.py           connected: the connection to Ray.
    ray_internals.py     Everything that qfleet uses of Ray's private modules.

In remote processes:

    remote.py            RemoteReplayShard: a shard as a process, whose methods take references.
    actor.py             Actor: steps lanes with a copy of the parameters, and returns chunks of rows.
    replay_shard.py      ReplayShard: stores chunks, draws transitions, sets priorities.
    replay_shares.py     How a replay is shared out over its shards, and joined again.
    env_and_agent.py     Environment, network and agent, which each process builds once.

How a chunk travels; every arrow from or to a remote process crosses a process border:

    ActorsDirector._issue_chunks --call--> Actor.collect
    Actor.collect --ChunkStats, by value--> ActorsDirector._count
                  --Chunk, by reference--> ShardedReplay.store --reference--> ReplayShard.insert
    ReplayShard.insert --ShardStats, by value--> ShardedReplay

How a batch travels:

    ShardedReplay.draw --DrawShare for each shard--> ReplayShard.sample --transitions--> the process that learns
    the process that learns --priorities-> ShardedReplay.return_priorities --reference--> ReplayShard.set_priorities

Chunks, transitions and TD errors go directly between the remote processes: through memory that the processes of one
machine share, or through Ray's object store in a cluster. Where they are learned from is up to each topology.

How a call travels, within one machine:

    Supervisor.submit --Call--> ChannelConnection --socket--> channel.serve --> the method of the process
    the method --value of each Reference--> its block of the Arena
               --record--> socket --> Inbox --Reply--> Supervisor.process_replies --> on_reply
"""
