"""The overlapped topology: environments outside the compiled program step while the learner learns.

Everything runs in one process, which drives the environments and the programs on its devices:

    environments --observations--> act            `runtime.host_acting.HostActing`, `programs.act`
    act          --actions-------> environments   they begin the next step
    act          --row-----------> replay         `learning.Learning`, `programs.insert`
    replay       --batches-------> gradient       `programs.learn`: as many learner steps as `schedule.Plan` says
    gradient     --update--------> parameters     which the next call of `act` reads

With a replay, the learner stores a row and learns from it while the environments take the next step. With `lock_step`
the environments wait for the learner instead, and the run is deterministic if the environments are. Without a replay,
the run takes a rollout, then learns from it, and nothing overlaps. `profile` is `lock_step` divided into parts, each of
which is timed.

Modules: `topology` drives a run; `programs` holds the pure functions, and `programs_on_mesh` compiles them for the
devices of a mesh; `learning` holds the learner's state and the row that it learns from next; `profile` times the parts.
"""
