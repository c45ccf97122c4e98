"""The fused topology: acting and learning in one compiled program, for environments written in JAX.

The host plans a chunk of iterations (`schedule.make_plan`: how much to explore, and how many learner steps follow each
row) and calls the program once. Inside the program, in every row:

    lanes      --observations--> act           `topologies.acting.act`, which steps the lanes too
    act        --row-----------> replay        `core.replay`, or a rollout where the agent has no replay
    replay     --batches-------> gradient      `core.updates.learn_from_replay`, `learn_from_rollout`
    gradient   --update--------> parameters    `core.learner.update`; the next row acts by them

Only the sums in `program.ChunkStats` return to the host, at the end of the chunk. The host keeps the counts that could
overflow on the device, in integers without a limit. One program serves chunks of any length up to
`topology.MAX_ITERATIONS`, so nothing is compiled twice.

Modules: `topology` drives a run; `program` holds the pure functions, and `program_on_devices` spreads them over a mesh,
or many seeds over the devices.
"""
