"""The overlapped topology: environments outside the compiled program step while the learner learns.

Everything runs in one process, which drives the environments and the programs on its devices. The steps, in order:

    step                                    who decides                   function                file
    --------------------------------------  ----------------------------  ----------------------  ----------------------
    plans exploration and learner steps     Overlapped.advance            make_plan               schedule.py
    acts in all lanes                       Overlapped._act_and_learn     Programs.act            programs.py
      chooses actions                                                     Agent.act               core/agent.py
    begins a step of the environments       Overlapped._act_and_learn     HostActing.send         runtime/host_acting.py
    meanwhile, for the row before           Overlapped._act_and_learn     Learning.learn_pending  learning.py
      stores it and learns, one program                                   Programs.learn          programs.py
        stores the row                                                    Replay.insert           core/replay/replay.py
        takes its learner steps             Plan.num_updates              learn_from_replay       core/updates.py
          draws a batch                                                   Replay.sample           core/replay/replay.py
          learns from it                                                  update                  core/learner.py
            gradient                                                      Learner.gradients       core/learner.py
              of the loss, made by                                        make_loss               core/batch_loss.py
            new parameters, target network                                Learner.apply           core/learner.py
          sets its priorities                                             Replay.set_priorities   core/replay/replay.py
    waits for the environments              Overlapped._act_and_learn     HostActing.receive      runtime/host_acting.py
    keeps this row for the next time        Overlapped._rows_with_replay  Learning.add_row        learning.py
    acts with the new parameters            Overlapped._act_and_learn     Programs.act            programs.py

Indented functions are called by the function above them; those of the core are the same in every topology. Files are in
this package, in `topologies/` or in `qfleet/`. `qfleet.topologies` explains the words.

So the learner stores a row and learns from it while the environments take the next step. With `lock_step` the
environments wait for the learner instead, and the run is deterministic if the environments are. An agent without a
replay takes a rollout, in `Overlapped._rollout`, then learns from it, and nothing overlaps.

`profile` is `lock_step` divided into parts, each of which is timed. `programs_on_mesh` compiles the functions of
`programs` for the devices of a mesh.
"""
