"""Shared by all topologies whose processes run on Ray; names none of them.

    topology.py          OnRay: what a run sees. It owns a director, and reads and writes checkpoints.
    director.py          Director: an object with a thread in the run's process, which submits calls and hears replies.
    machine_director.py  MachineDirector: a director that carries out what a state machine decides. FleetDirector: one
                         that has actors.
    supervisor.py        Supervisor: starts, watches and replaces processes. The only file that calls methods in them.
    remote_process.py    RemoteProcess: a place in the run, and ProcessHost: what Ray runs there.
    references.py        Reference: an array that stays where it was made until a process needs it.
    calls.py             Call, Reply, Inbox: what is sent to a process, and what is heard of it.
    channel.py           Switchboard: carries calls within one machine, by sockets and shared memory.
    shared_memory.py     Arena: that memory, in blocks that the director leases.
    ray_calls.py         RayCarrier: carries calls in a cluster, by Ray.
    cluster.py           connected: the connection to Ray.
    ray_internals.py     Everything that qfleet uses of Ray's private modules.

What decides, without Ray, clock, thread or file:

    messages.py          The events that a state machine hears, and the requests that it makes.
    machine.py           Machine: base class of the machines, each in its topology's package. FleetMachine: of actors.
    pooled_actors.py     PooledActors: which actor acts next.
    rate_limiter.py      RateLimiter: which learner steps are due, and whether the actors must wait.
    sharded_replay.py    ShardedReplay: which shard stores what, and how much of a batch each draws.
    stats.py             What has happened since the last record.

In remote processes:

    remote.py            RemoteReplayShard: a shard as a process, whose methods take references.
    actor.py             Actor: steps lanes with a copy of the parameters, and returns chunks of rows.
    replay_shard.py      ReplayShard: stores chunks, draws transitions, sets priorities.
    replay_shares.py     How a replay is shared out over its shards, and joined again.
    env_and_agent.py     Environment, network and agent, which each process builds once.

How a decision becomes a call, and its reply the next event. The director's thread sends the machine a `Turn` whenever
it has heard all replies, unless the run pauses; then the machine requests all that may begin. Request, remote method
and plain method have one name:

    Machine.handle(Turn) --SampleShare--> MachineDirector._call --> RemoteReplayShard.sample_share, in its process;
                                                                    it calls ReplayShard.sample_share
    Machine.handle(Replied(SampleShare, reply)) <-- MachineDirector._tell <-- its reply

How a chunk travels; each line is a request of the machine, and crosses a process border:

    request to act      Actor.collect returns ChunkStats by value, and a Chunk by reference
    Insert              ReplayShard.insert gets the reference, and returns an InsertReply

How a batch travels:

    SampleShare         ReplayShard.sample_share draws one share, and returns a reference to its transitions
    request to learn    the process that learns gets the references of all shares, and returns priorities by reference
    SetPriorities       ReplayShard.set_priorities gets those of its own share

Chunks, transitions and priorities go directly between the remote processes: through memory that the processes of one
machine share, or through Ray's object store in a cluster. Where they are learned from is up to each topology, whose
package says who asks for what. `qfleet.topologies` explains the words.

How a call travels, within one machine:

    Supervisor.submit --Call--> ChannelConnection --socket--> channel.serve --> the method of the process
    the method --value of each Reference--> its block of the Arena
               --record--> socket --> Inbox --Reply--> Supervisor.process_replies --> on_reply
"""
