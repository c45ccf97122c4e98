"""What is learned (`AgentConfig`), where it runs (one config per topology), and one run (`TrainConfig`).

Nothing here imports JAX, so that the command line can explain itself at once. Every config is checked when
it is constructed and never changed afterwards; `dataclasses.replace` makes another.
"""

from qfleet.config.train import (
    EXPLORATION_SCHEDULE,
    TOPOLOGIES,
    ActorLearnerConfig,
    ActorPool,
    AgentConfig,
    ConfigError,
    DecentralisedConfig,
    FusedConfig,
    MeshConfig,
    OverlappedConfig,
    ParameterServerConfig,
    RunFailed,
    TopologyConfig,
    TrainConfig,
    actor_pool_of,
    check_lane_options,
    check_suits,
    is_launched,
    suggest,
    suits,
    topology_name,
)

__all__ = [
    "EXPLORATION_SCHEDULE",
    "TOPOLOGIES",
    "ActorLearnerConfig",
    "ActorPool",
    "AgentConfig",
    "ConfigError",
    "DecentralisedConfig",
    "FusedConfig",
    "MeshConfig",
    "OverlappedConfig",
    "ParameterServerConfig",
    "RunFailed",
    "TopologyConfig",
    "TrainConfig",
    "actor_pool_of",
    "check_lane_options",
    "check_suits",
    "is_launched",
    "suggest",
    "suits",
    "topology_name",
]
