"""What is learned (`AgentConfig`), where it runs (one config per topology), and one run (`TrainConfig`).

Nothing here imports JAX, so that the command line can show its help at once. Every config is checked when
it is constructed and never changes afterwards; `dataclasses.replace` makes a changed copy.
"""

from qfleet.config.agent import AgentConfig
from qfleet.config.errors import ConfigError, RunFailed, suggest
from qfleet.config.lane_options import LaneOptions
from qfleet.config.ray_topologies import (
    ActorLearnerConfig,
    ActorPool,
    GossipConfig,
    ParameterServerConfig,
    RayTopologyConfig,
)
from qfleet.config.topologies import TOPOLOGIES, AllReduceConfig, FusedConfig, OverlappedConfig
from qfleet.config.topology import MeshConfig, TopologyConfig
from qfleet.config.train import TrainConfig

__all__ = [
    "TOPOLOGIES",
    "ActorLearnerConfig",
    "ActorPool",
    "AgentConfig",
    "AllReduceConfig",
    "ConfigError",
    "FusedConfig",
    "GossipConfig",
    "LaneOptions",
    "MeshConfig",
    "OverlappedConfig",
    "ParameterServerConfig",
    "RayTopologyConfig",
    "RunFailed",
    "TopologyConfig",
    "TrainConfig",
    "suggest",
]
