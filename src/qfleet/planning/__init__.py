"""Predicts a run before it starts: its speed, its memory, its bytes on the wire, and what limits it.

    measuring/     times the parts of a run on this machine, each on its own: acting, storing, learning, calls
    costs          what a part costs, and the file that keeps it beside the compilation cache
    cluster        the nodes of the run: this machine, or those that a file describes
    cores          simulated time, CPU cores that tasks share, and links between nodes
    fleet          simulates the processes of a run on Ray, directed by the state machine that directs the run
    actor_learner, parameter_server, gossip
                   what the processes of each of these topologies reply, and which part each reply costs
    in_step        the speed of runs whose processes take every step together: fused, overlapped, all-reduce
    one_more_device
                   what each device would do if there were one more, and what the devices would send each other
    prediction     the records that a plan consists of
    planner        makes the plan of a run
    advice         what the literature says about the run's settings

No run is started, and no folder of a run is made.
"""
