"""Writes a policy in one of the formats, with the config.json that says what it is."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qfleet.config import ConfigError
from qfleet.config.checks import check
from qfleet.core.masks import masked
from qfleet.core.types import EnvSpec, Network, Params
from qfleet.exporting import onnx
from qfleet.exporting.folders import check_new_folder, new_folder
from qfleet.exporting.interface import describe_interface
from qfleet.exporting.program import make_program
from qfleet.exporting.record import CONFIG, FILES, Origin, describe
from qfleet.exporting.stablehlo import write_stablehlo
from qfleet.exporting.weights import write_weights
from qfleet.networks import make_network
from qfleet.runtime.evaluation import EvaluationOptions
from qfleet.runtime.run_directory import strict_json


class PolicyParts(NamedTuple):
    """What is exported of a policy."""

    network: Network
    """It takes observations joined with masks if the environment has masks."""
    params: Params
    spec: EnvSpec
    options: EvaluationOptions
    origin: Origin | None


def export_policy(policy: PolicyParts, path: str | os.PathLike[str], file_format: str) -> Path:
    """Writes a policy into a new folder, and returns the folder's absolute path.

    Args:
      policy: the policy.
      path: the folder, which must be absent or empty.
      file_format: a key of `FILES`.

    Raises:
      ConfigError: if the format is unknown or wants an extra that is missing, the folder is there already, or the
        policy can't be expressed in the format.
      RunFailed: if the folder can't be written.
    """
    check_format(file_format)
    folder = check_new_folder(path)
    if file_format == "safetensors":
        check_origin(policy.origin)
    with new_folder(folder) as temporary:
        write_policy(policy, temporary, file_format)
    return folder


def check_format(file_format: Any) -> None:
    """Raises ConfigError if there is no such format, or a package that it needs is missing."""
    check(file_format in FILES, "format", f"one of {', '.join(FILES)}", file_format)
    if file_format == "onnx":
        onnx.check_extra()


def write_policy(policy: PolicyParts, folder: Path, file_format: str) -> dict[str, Any]:
    """Writes the files of a policy into a folder, and returns the content of its config.json."""
    origin, spec = policy.origin, policy.spec
    network = _with_plain_convolutions(policy) if file_format == "onnx" else policy.network
    params = jax.device_get(policy.params)  # a program must know nothing of the devices here
    program = make_program(network, params, spec)
    environment, config = (None, None) if origin is None else (origin.environment, origin.config)
    content = describe(file_format, describe_interface(program, spec, environment, config), origin, policy.options)
    text, path = strict_json(content, indent=2) + "\n", folder / FILES[file_format]
    match file_format:
        case "safetensors":
            write_weights(params, path)
        case "stablehlo":
            write_stablehlo(program, path)
        case "onnx":
            onnx.write_onnx(program, path, text)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return content


def _with_plain_convolutions(policy: PolicyParts) -> Network:
    """Returns the policy's network with plain convolutions, because an ONNX model can't choose by platform.

    The parameters are the same. A network that was given as an argument is returned as it is.
    """
    origin = policy.origin
    if origin is None or origin.has_own_network:
        return policy.network
    agent = dataclasses.replace(origin.config.agent, convolution="native")
    return masked(make_network(policy.spec, agent), policy.spec)


def check_origin(origin: Origin | None) -> Origin:
    """Returns where a policy comes from.

    Raises:
      ConfigError: if that isn't known, because `qfleet.load` didn't make the policy.
    """
    if origin is None:
        raise ConfigError(
            "a policy that is exported as safetensors must come from qfleet.load, so that its config is known, got one "
            "made by hand; load it, or give format='stablehlo' or 'onnx'"
        )
    return origin
