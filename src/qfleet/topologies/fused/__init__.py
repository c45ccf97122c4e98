"""The fused topology: acting and learning in one compiled program, for environments written in JAX.

The host plans how much to explore and how many learner steps follow each row, then calls the program once for a chunk
of many rows. The steps, in the order in which a transition meets them:

    step                                  who decides       function               file
    ------------------------------------  ----------------  ---------------------  ---------------------
    plans exploration and learner steps   Fused.advance     make_plan              schedule.py
    runs some iterations of 16 rows each  Fused.advance     Program.run            program.py
    takes the rows of one iteration       Program.run       _replay_iteration      program.py
    acts in all lanes                     every row         act                    acting.py
      chooses actions                                       Agent.act              core/agent.py
      steps environments                                    step_lanes             envs/in_graph.py
    stores the row                        every row         Replay.insert          core/replay/replay.py
    takes the learner steps of the row    Plan.num_updates  learn_from_replay      core/updates.py
      draws a batch                                         Replay.sample          core/replay/replay.py
      targets and loss                                      make_loss              core/batch_loss.py
      gradient                                              Learner.gradients      core/learner.py
      new parameters, target network                        Learner.apply          core/learner.py
      new priorities of the batch                           Replay.set_priorities  core/replay/replay.py
    acts with the new parameters          the next row      act                    acting.py

Indented functions are called by the function above them. Those of the core are the same in every topology: open their
files only to see how they do it. Files are in this package, in `topologies/` or in `qfleet/`. `qfleet.topologies`
explains the words.

`_replay_iteration` scans over the rows, so the parameters of one row's learner steps are those with which the next row
acts. An agent without a replay takes a rollout instead of a row, in `_rollout_iteration`, and learns from it by
`core.updates.learn_from_rollout`.

Only the sums in `program.ProgramStats` return to the host, at the end of the chunk. The host keeps the counts that
could overflow on the device, in integers without a limit. One program serves chunks of any length up to
`topology.MAX_ITERATIONS`, so nothing is compiled twice. `program_on_devices` spreads the functions of `program` over a
mesh, or many seeds over the devices.
"""
