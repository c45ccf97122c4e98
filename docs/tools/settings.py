"""What the reference says about settings besides their docstrings: units, and where defaults come from."""

_UNITS = {
    "discount": "per environment step",
    "n_step": "environment steps of one lane",
    "huber_delta": "discounted reward",
    "exploration_start": "probability, or discounted reward",
    "exploration_end": "probability, or discounted reward",
    "exploration_max_duration": "environment steps of one lane",
    "eval_exploration": "probability",
    "batch_size": "transitions",
    "replay_capacity": "environment steps",
    "env_steps_per_learner_step": "environment steps",
    "target_update_period": "learner steps",
    "rollout_length": "rows",
    "num_epochs": "passes",
    "num_minibatches": "learner steps",
    "stop_return": "undiscounted reward",
    "eval_episodes": "episodes",
    "eval_max_episode_steps": "environment steps of one lane",
    "checkpoints_kept": "checkpoints",
    "hidden_sizes": "units",
    "max_gradient_norm": "norm",
    "learning_rate_end_fraction": "share",
    "target_update_rate": "share",
    "num_envs": "lanes",
    "lanes_per_actor": "lanes",
    "lanes_per_worker": "lanes",
    "rows_per_chunk": "rows",
    "max_staleness": "learner steps",
    "gradients_per_learner_step": "gradients",
    "max_loss_deviations": "standard deviations",
    "max_failures": "failures",
    "max_restarts": "restarts",
    "actor_epsilon_base": "probability",
    "actor_resources": "Ray resources",
    "learner_resources": "Ray resources",
    "worker_resources": "Ray resources",
    "devices_per_process": "devices",
    "mesh.data": "devices",
    "mesh.model": "devices",
    "num_actors": "processes",
    "num_workers": "processes",
    "num_env_workers": "processes",
    "num_processes": "processes",
    "num_replay_shards": "processes",
    "num_server_shards": "processes",
    "num_seeds": "learners",
}

TEXTS = {
    "preset": "Name of the [preset](presets.md) that the defaults of the other settings come from. Without one, preset "
    "and settings are chosen for the environment and the topology.",
}
"""What the reference says about settings in place of their docstrings, which describe them as fields of a config."""

DEFAULTS = {"preset": "chosen", "target_update_period": "`500`"}
"""Defaults that a run has, where those of the class are something else."""

DEFAULT_SOURCES = {
    "discount": "Mnih et al. 2015",
    "huber_delta": "Mnih et al. 2015, whose error is clipped there",
    "exploration_start": "Mnih et al. 2015",
    "max_gradient_norm": "Wang et al. 2016",
    "priority_exponent": "Schaul et al. 2016",
    "importance_exponent_start": "Schaul et al. 2016",
    "trace_decay": "Gallici et al. 2024",
    "num_epochs": "Gallici et al. 2024",
    "actor_epsilon_base": "Horgan et al. 2018",
    "actor_epsilon_exponent": "Horgan et al. 2018",
}
"""Where the default of a setting comes from, if it isn't ours and the docstring doesn't say so."""


def unit_of(name: str) -> str:
    """Returns the unit of a setting; empty if its value has none."""
    if name in _UNITS:
        return _UNITS[name]
    for ending, unit in (
        ("node_labels", "labels"),
        ("env_steps", "environment steps"),
        ("learner_steps", "learner steps"),
        ("seconds", "seconds"),
    ):
        if name.endswith(ending):
            return unit
    return ""
