"""The fused topology: acting and learning in one compiled program, for environments written in JAX.

The host plans how much to explore and how many learner steps follow each row, then calls the program once for a chunk.
A chunk is a number of iterations, and an iteration is 16 rows, or one rollout of an agent without a replay. The steps,
in the order in which a transition meets them:

    step                                      who decides       function               file
    ----------------------------------------  ----------------  ---------------------  ---------------------
    takes a chunk of iterations               Fused.advance     Fused.advance          topology.py
      plans exploration, learner steps                          make_plan              schedule.py
      runs the iterations                                       Program.run            program.py
        takes the rows of an iteration                          _replay_iteration      program.py
          acts in all lanes                                     act                    acting.py
            chooses actions                                     Agent.act              core/agent.py
            steps environments                                  step_lanes             envs/in_graph.py
          stores the row                                        Replay.insert          core/replay/replay.py
          takes its learner steps             Plan.num_updates  learn_from_replay      core/updates.py
            draws a batch                                       Replay.sample          core/replay/replay.py
            learns from it                                      update                 core/learner.py
              gradient                                          Learner.gradients      core/learner.py
                of the loss, made by                            make_loss              core/batch_loss.py
              new parameters, target network                    Learner.apply          core/learner.py
            sets its priorities                                 Replay.set_priorities  core/replay/replay.py
          acts in the next row with them                        act                    acting.py

Indented functions are called by the function above them; those of the core are the same in every topology. `Program`,
`Agent`, `Replay` and `Learner` are records of functions, which `make_program` and so on bind in the same file: the code
of `Replay.insert` is `_insert`. Files are in this package, in `topologies/` or in `qfleet/`. `qfleet.topologies`
explains the words.

`_replay_iteration` scans over the rows, so the parameters of one row's learner steps are those with which the next row
acts. An agent without a replay takes a rollout instead of a row, in `_rollout_iteration`, and learns from it by
`core.updates.learn_from_rollout`.

Only the sums in `program.ProgramStats` return to the host, at the end of the chunk. The host keeps the counts that
could overflow on the device, in integers without a limit. One program serves chunks of any length up to
`topology.MAX_ITERATIONS`, so nothing is compiled twice. `program_on_devices` spreads the functions of `program` over a
mesh, or many seeds over the devices.

Trials of a sweep that differ only in numbers are learners of one such program, beside each other like seeds:
`trials_on_devices` makes the numbers inputs of the program, and `trials` shows each trial's run its own share.
"""
