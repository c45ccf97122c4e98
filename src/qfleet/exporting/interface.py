"""What whoever runs an exported policy must know of its inputs, outputs and actions, as plain values for JSON."""

from collections.abc import Iterator
from typing import Any

from qfleet.config import TrainConfig
from qfleet.core.types import EnvSpec
from qfleet.envs.ale import FRAME_SKIP, NOOP_MAX, SCREEN
from qfleet.exporting.program import Port, Program


def describe_interface(
    program: Program, spec: EnvSpec, environment: dict[str, Any] | None, config: TrainConfig | None
) -> dict[str, Any]:
    """Returns what is needed to run a policy: its inputs and outputs, and how they come from the environment.

    Args:
      program: the policy.
      spec: of its environment.
      environment: record of the environment, if there is one.
      config: config of the run that the policy comes from, if there is one.
    """
    raw = environment or {}
    return {
        "inputs": [_port(port) for port in program.inputs],
        "outputs": [_port(port) for port in program.outputs],
        "preprocessing": list(_preprocessing(spec, raw.get("raw_observation"), config)),
        "env": spec.name,
        "env_options": {} if config is None else dict(config.env_options),
        "frame_stack": spec.frame_stack,
        "raw_observation": raw.get("raw_observation"),
        "actions": _actions(raw.get("raw_actions"), spec),
    }


def _port(port: Port) -> dict[str, Any]:
    shape = ["batch", *port.shape]
    return {"name": port.name, "shape": shape, "dtype": port.dtype.name, "meaning": port.meaning}


def _preprocessing(spec: EnvSpec, raw: dict[str, Any] | None, config: TrainConfig | None) -> Iterator[str]:
    """Yields what must be done to what the environment returns, before the policy sees it."""
    backend = spec.name.partition(":")[0]
    if backend in ("ale", "envpool") and spec.observation_shape == SCREEN:
        yield (
            f"Play each action for {FRAME_SKIP} frames, take the greatest value of the last two for each pixel, and "
            f"scale the grey picture to {SCREEN[0]} x {SCREEN[1]} pixels; episodes begin with up to {NOOP_MAX} no-ops "
            f"(Mnih et al. 2015)."
        )
    if raw is not None and "parts" in raw:
        yield (
            "Flatten the parts of the observation, and join them in the order of `raw_observation`; a part with "
            "`choices` becomes one-hot, each choice by its least value and its number of values."
        )
    elif raw is not None and raw["choices"] is not None:
        yield "Make the observation one-hot; `raw_observation` has the least value and the number of values."
    if spec.frame_stack > 1:
        yield (
            f"Stack the newest {spec.frame_stack} frames on a last axis, oldest first; before the first frame of an "
            f"episode they are zeros."
        )
    if spec.observation_dtype.name == "uint8":
        yield "Leave pixels from 0 to 255: the policy divides them itself."
    elif spec.pixel_limit is not None:
        yield f"Leave pixels from 0 to {spec.pixel_limit:g}: the policy divides them itself."
    if config is not None and config.agent.normalise_observations:
        yield "Don't normalise the observation: the policy does, by the statistics of training."
    if config is not None and config.agent.value_rescaling:
        yield "Q-values are of rescaled returns, h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x."


def _actions(raw: dict[str, Any] | None, spec: EnvSpec) -> dict[str, Any]:
    """Returns how the policy's action becomes the environment's."""
    if raw is None:
        is_ale = spec.name.startswith("ale:")
        which = ", a number in ALE's minimal set, or in its full one with `full_action_space`" if is_ale else ""
        return {"start": 0, "meaning": f"the environment takes the policy's action{which}"}
    if "start" in raw:
        return {**raw, "meaning": "the environment takes the policy's action plus `start`"}
    return {**raw, "meaning": "the environment takes entry `action` of `table`"}
