"""The config.json of an exported policy: what it is, and what `qfleet.load` needs to make it again.

It is the config.json of a run with an entry `policy`. Anybody may have written the one that is read.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.checks import MAX_COUNT, MAX_SEED
from qfleet.config.encoding import SCHEMA_VERSION, decode, encode
from qfleet.config.values import to_plain
from qfleet.envs.recorded import is_record
from qfleet.runtime.evaluation import EvaluationOptions
from qfleet.runtime.run_directory import MAX_NAME_LENGTH, qfleet_version
from qfleet.runtime.run_files import read_json, shortened

CONFIG = "config.json"

FILES = {"safetensors": "model.safetensors", "stablehlo": "model.stablehlo", "onnx": "model.onnx"}
"""The file of each format in the folder of an exported policy."""

_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The run that a policy comes from, and what the run's checkpoint says of the policy."""

    config: TrainConfig
    """Config of the run; if it trained several seeds, that of the one seed."""
    env_steps: int
    """Environment steps that the policy has learned from."""
    trained_seed: int | None
    """Its seed, if the run trained several."""
    environment: dict[str, Any] | None
    """Record of the environment; None if it is one of the rare ones that a record can't hold."""
    has_own_network: bool
    """Whether the network was given as an argument, so that `config` doesn't describe it."""


class ExportedPolicy(NamedTuple):
    """What the folder of an exported policy says."""

    path: Path
    origin: Origin
    options: EvaluationOptions
    """How the policy is evaluated."""

    @property
    def weights_path(self) -> Path:
        """The file with the parameters."""
        return self.path / FILES["safetensors"]


def describe(
    file_format: str, interface: dict[str, Any], origin: Origin | None, options: EvaluationOptions
) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
      file_format: a key of `FILES`.
      interface: what `qfleet.exporting.interface` says of inputs and outputs.
      origin: where the policy comes from. Without it, the policy can't be loaded again.
      options: how it is evaluated.
    """
    policy: dict[str, Any] = {"version": _VERSION, "format": file_format, "file": FILES[file_format]}
    content: dict[str, Any] = {"qfleet_version": qfleet_version(), "policy": policy}
    if origin is not None:
        content |= {"schema_version": SCHEMA_VERSION, "config": encode(origin.config)}
        fields = ("env_steps", "trained_seed", "environment", "has_own_network")
        policy |= {name: getattr(origin, name) for name in fields} | {"evaluation": dataclasses.asdict(options)}
    policy["interface"] = interface
    return content


def read_exported(path: str | os.PathLike[str]) -> ExportedPolicy | None:
    """Returns what the folder of an exported policy says, or None if the folder isn't one.

    Raises:
      ConfigError: if its config.json holds something else than `describe` returns, or the policy was exported in a
        format that can't be loaded again.
    """
    folder = Path(to_plain(str, path, "run_dir"))
    try:
        content = read_json(folder / CONFIG)
    except (OSError, ValueError):  # nothing of ours; whoever looks for a run says what is wrong
        return None
    if not isinstance(content, dict) or "policy" not in content:
        return None
    policy = content["policy"]
    file_format = policy.get("format") if isinstance(policy, dict) else None
    if isinstance(file_format, str) and file_format in FILES and file_format != "safetensors":
        raise ConfigError(
            f"a policy can be loaded if its format is safetensors, got {folder}, whose format is {file_format}; read "
            f"its {FILES[file_format]} with another program, or export the run again with --format safetensors"
        )
    try:
        return _read(folder, content)
    except Exception as error:  # numbers that nobody thought of may raise anything
        raise ConfigError(
            f"an exported policy's config.json must hold what `qfleet export` writes, got {folder / CONFIG} of qfleet "
            f"{shortened(str(content.get('qfleet_version')), 50)}: {shortened(str(error))}; export the run again"
        ) from error


def _read(folder: Path, content: dict[str, Any]) -> ExportedPolicy:
    policy = content["policy"]
    if policy.get("version") != _VERSION:
        raise ValueError(f"policy.version must be {_VERSION}, got {policy.get('version')!r}")
    config = decode(content.get("config"), content.get("schema_version", 0))
    steps, seed, environment = (policy.get(name) for name in ("env_steps", "trained_seed", "environment"))
    for name, holds in {
        "config.env": len(config.env) <= MAX_NAME_LENGTH and config.num_seeds == 1,
        "env_steps": type(steps) is int and 0 <= steps <= MAX_COUNT,
        "trained_seed": seed is None or (type(seed) is int and 0 <= seed <= MAX_SEED),
        "environment": environment is None or is_record(environment),
        "format": policy.get("format") == "safetensors",
        "has_own_network": isinstance(policy.get("has_own_network"), bool),
    }.items():
        if not holds:
            raise ValueError(f"{name} has no value that is ever written")
    origin = Origin(
        config=config,
        env_steps=steps,
        trained_seed=seed,
        environment=environment,
        has_own_network=policy["has_own_network"],
    )
    return ExportedPolicy(folder, origin, EvaluationOptions(**policy["evaluation"]))
