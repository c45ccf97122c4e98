"""Times the parts of a run on this machine, each on its own, in processes like those of the run.

parts             which parts a run consists of, and how they are measured
children          processes that measure, and what they report
timing            times one part again and again
in_step_process   the process of a run whose processes take every step together
in_graph          its parts if the environment is written in JAX
host              its parts if it isn't
served_process    a process of a run on Ray, which times the calls of its methods
calls             calls these processes one after the other, as a director does
actor_learner, parameter_server, gossip
                  the sequence of calls for each of these topologies
"""
