"""Decentralised training by all-reduce: equal processes that take every learner step together.

Each process runs the fused or the overlapped topology on a mesh over the devices of all processes. There is no server:
every process holds all parameters, and applies the same mean of all gradients. Together the processes learn what one
process with all lanes would learn.

    launcher process                                 process i  (`qfleet.cli.peer`; its devices are part of the mesh)
    training.launched.LaunchedRun
      iterates over progress                           acts          in its own lanes
        |                                              stores        its lanes' part of the replay
    launcher.Launcher                                  computes      the gradient of its part of the batch
      does what machine.LauncherMachine decides:       exchanges     the mean of the gradients  <==>  other processes
      which process is lost, whether all start         applies       that mean to its own copy of the parameters
      again, and how the run ends                      reports       signs of life; process 0 also its progress
        |                                                |
    processes.ProcessGroup  <------- report, a pipe -----+
      local_processes.LocalProcessGroup                reads the pipes of child processes of this host
      ray_processes.RayProcessGroup                    an actor of Ray on each node reads the pipe, and passes it on

What crosses a process border: between the processes, at every learner step, gradients; and with a replay, the sampled
transitions and their TD errors, because the batch is drawn from all lanes and dealt out evenly (`core.replicas`). This
goes through `jax.distributed`, which finds the other processes through a coordinator in process 0, and never through
Ray. To the launcher: reports, which are lines of JSON of a few hundred bytes. From the launcher: SIGTERM, which asks a
process to write a checkpoint and stop.

How a loss is handled. A collective operation that one process has left never returns in the others, so no process can
continue without the others. The group counts as lost when a process dies, when one has reported nothing for
`silence_seconds`, or when all are alive but none makes progress. The launcher then kills all processes of the group and
starts a new group from the newest checkpoint, at most `max_restarts` times.
"""
