"""Deep Q-networks, trained fast by parallel and distributed computing.

    import qfleet
    config = qfleet.make_config("CartPole-v1", preset="pqn", stop_return=475)
    summary = qfleet.train(config)

The names here are the whole public API. They are imported on first use, so that `import qfleet` doesn't wait for JAX.
"""

TYPE_CHECKING = False
"""The same as `typing.TYPE_CHECKING`. Nothing is imported before `__main__` takes the current folder off the path."""

if TYPE_CHECKING:
    from typing import Any

    from qfleet.api import iterate, load, resume, train, watch
    from qfleet.config import AgentConfig, ConfigError, FusedConfig, OverlappedConfig, RunFailed, TrainConfig
    from qfleet.core.types import EnvSpec, Network, Recurrence
    from qfleet.envs.host import HostEnv, HostLanes, HostStep, LaneOptions, RenderedLanes
    from qfleet.envs.registry import list_envs, make_env, register_env
    from qfleet.envs.spec import InGraphEnv, StepResult
    from qfleet.networks import from_nnx
    from qfleet.policy import Policy
    from qfleet.presets import PRESETS, make_config
    from qfleet.runs import compare, diagnose, open_run, read_metrics
    from qfleet.runtime.comparison import Comparison
    from qfleet.runtime.diagnosis import Finding
    from qfleet.runtime.loggers import LoggedRun, Logger
    from qfleet.runtime.metrics_reading import Metrics
    from qfleet.runtime.records import Progress
    from qfleet.runtime.saved_run import SavedRun
    from qfleet.runtime.video import Video
    from qfleet.sweeps.records import TrialRecord
    from qfleet.sweeps.sweep import SweepResult, sweep
    from qfleet.training.callbacks import RunControl, SavedCheckpoint
    from qfleet.training.run import Run

_HOMES = {
    "qfleet.api": ("iterate", "load", "resume", "train", "watch"),
    "qfleet.config": ("AgentConfig", "ConfigError", "FusedConfig", "OverlappedConfig", "RunFailed", "TrainConfig"),
    "qfleet.core.types": ("EnvSpec", "Network", "Recurrence"),
    "qfleet.envs.host": ("HostEnv", "HostLanes", "HostStep", "LaneOptions", "RenderedLanes"),
    "qfleet.envs.registry": ("list_envs", "make_env", "register_env"),
    "qfleet.envs.spec": ("InGraphEnv", "StepResult"),
    "qfleet.networks": ("from_nnx",),
    "qfleet.policy": ("Policy",),
    "qfleet.presets": ("PRESETS", "make_config"),
    "qfleet.runs": ("compare", "diagnose", "open_run", "read_metrics"),
    "qfleet.sweeps.records": ("TrialRecord",),
    "qfleet.sweeps.sweep": ("SweepResult", "sweep"),
    "qfleet.training.callbacks": ("RunControl", "SavedCheckpoint"),
    "qfleet.training.run": ("Run",),
    "qfleet.runtime.comparison": ("Comparison",),
    "qfleet.runtime.diagnosis": ("Finding",),
    "qfleet.runtime.loggers": ("LoggedRun", "Logger"),
    "qfleet.runtime.metrics_reading": ("Metrics",),
    "qfleet.runtime.records": ("Progress",),
    "qfleet.runtime.saved_run": ("SavedRun",),
    "qfleet.runtime.video": ("Video",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "AgentConfig",
    "Comparison",
    "ConfigError",
    "EnvSpec",
    "Finding",
    "FusedConfig",
    "HostEnv",
    "HostLanes",
    "HostStep",
    "InGraphEnv",
    "LaneOptions",
    "LoggedRun",
    "Logger",
    "Metrics",
    "Network",
    "OverlappedConfig",
    "Policy",
    "Progress",
    "Recurrence",
    "RenderedLanes",
    "Run",
    "RunControl",
    "RunFailed",
    "SavedCheckpoint",
    "SavedRun",
    "StepResult",
    "SweepResult",
    "TrainConfig",
    "TrialRecord",
    "Video",
    "compare",
    "diagnose",
    "from_nnx",
    "iterate",
    "list_envs",
    "load",
    "make_config",
    "make_env",
    "open_run",
    "read_metrics",
    "register_env",
    "resume",
    "sweep",
    "train",
    "watch",
]


def __getattr__(name: str) -> "Any":
    import importlib

    if name not in _HOME_OF:
        raise AttributeError(f"module 'qfleet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
