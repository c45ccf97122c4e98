"""Exported policies against `Policy`, on the same random observations: the greatest difference.

    python benchmarks/export.py [--observations N] [--cases NAME ...] [--formats NAME ...]

Each network has random parameters. Its policy is exported in each format and run by another program on batches of
several sizes: safetensors by `qfleet.load`; StableHLO by JAX in a process in which qfleet can't be imported; ONNX by
ONNX Runtime. A network that remembers is run step by step, and its state is passed on and compared too. The exit code
is 1 if a number differs by more than 1e-5, or an action whose Q-value is the best by more than that.
"""

import argparse
import inspect
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import numpy as np

import qfleet
from qfleet.config import AgentConfig, TrainConfig
from qfleet.core.masks import masked, shown
from qfleet.core.types import EnvSpec
from qfleet.envs.recorded import RecordedEnv, record_of
from qfleet.envs.spec import InGraphEnv
from qfleet.exporting.program import Program, make_program, random_input
from qfleet.exporting.record import FILES, Origin
from qfleet.networks import make_network
from qfleet.policy import Policy

TOLERANCE = 1e-5
LANES = 100  # of a network that remembers
BATCH_SIZES = (1, 99, 400)  # in turn


class Case(NamedTuple):
    """One network."""

    shape: tuple[int, ...]
    agent: dict[str, Any]
    dtype: Any = np.float32
    frame_stack: int = 1
    has_action_mask: bool = False


_ATARI: dict[str, Any] = {"shape": (84, 84), "dtype": np.uint8, "frame_stack": 4}

CASES = {
    "mlp": Case((8,), {"layer_norm": True}),
    "minatar": Case((10, 10, 4), {}, dtype=np.bool_),
    "nature": Case(agent={"hidden_sizes": (512,)}, **_ATARI),
    "impala": Case(agent={"torso": "impala", "hidden_sizes": (256,)}, **_ATARI),
    "dueling": Case((8,), {"dueling": True}),
    "c51": Case((8,), {"head": "c51"}),
    "iqn": Case((8,), {"head": "iqn"}),
    "lstm": Case((8,), {"memory": "lstm"}),
    "masked": Case((8,), {}, frame_stack=2, has_action_mask=True),
}


def main() -> int:
    """Prints the table, then one line of JSON per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=10_000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--formats", nargs="+", choices=FILES, default=list(FILES))
    arguments = parser.parse_args()
    results = []
    for name in arguments.cases:
        with common.scratch() as folder:
            reference = run_policy(make_policy(CASES[name]), arguments.observations)
            for file_format in arguments.formats:
                compared = compare(reference, file_format, Path(folder))
                results.append({"network": name, "format": file_format, **compared})
    common.report("export", results)
    return int(any(result["difference_e-6"] > 1e6 * TOLERANCE or result["wrong_actions"] for result in results))


def make_policy(case: Case, num_actions: int = 6) -> Policy:
    """Returns a policy with random parameters, as `qfleet.load` would return it."""
    spec = EnvSpec(
        name="Random-v0",
        observation_shape=case.shape,
        observation_dtype=np.dtype(case.dtype),
        num_actions=num_actions,
        frame_stack=case.frame_stack,
        has_action_mask=case.has_action_mask,
    )
    config = TrainConfig(env=spec.name, agent=AgentConfig(**case.agent))
    record = record_of(InGraphEnv(spec, *(2 * [_never])))
    assert record is not None
    network = make_network(spec, config.agent)
    params = jax.jit(network.init)(jax.random.key(0))
    params = jax.tree.map(_with_noise, params)
    origin = Origin(config=config, env_steps=0, trained_seed=None, environment=record, has_own_network=False)
    return Policy(RecordedEnv(spec.name, record, _never), masked(network, spec), params, "step0", origin=origin)


def _with_noise(x: jax.Array) -> jax.Array:
    """Returns biases, which start at 0, with noise, because 0 would hide one that is left out; all else as it is."""
    return x if x.ndim > 1 else x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)


def _never(*arguments: Any) -> Any:
    raise AssertionError("nobody plays here")


class Reference(NamedTuple):
    """A policy, what it was given, and what it made of it."""

    policy: Policy
    program: Program
    batches: list[list[np.ndarray]]
    found: list[tuple[np.ndarray, ...]]
    """Q-values, and the state if there is one, of each batch."""


def run_policy(policy: Policy, num_observations: int) -> Reference:
    """Runs a policy on random observations."""
    program = make_program(policy._network, policy.params, policy.spec)
    batches = list(_batches(program, num_observations))
    return Reference(policy, program, batches, _of_policy(policy, batches))


def compare(reference: Reference, file_format: Any, folder: Path, *, in_child: bool = True) -> dict[str, Any]:
    """Exports a policy, runs it on the same observations, and returns how far it is from the policy.

    Args:
      reference: what the policy does.
      file_format: the format.
      folder: folder for the files.
      in_child: whether StableHLO is run in a process without qfleet.
    """
    policy, program, batches, ours = reference
    start = time.perf_counter()
    out = policy.export(folder / file_format, file_format)
    seconds = time.perf_counter() - start
    match file_format:
        case "safetensors":
            found = [(q.argmax(-1), q, *more) for q, *more in _of_policy(qfleet.load(out), batches)]
        case "stablehlo":
            found = _of_stablehlo(out / FILES["stablehlo"], program, batches, folder, in_child)
        case _:
            found = _of_onnx(out / FILES["onnx"], program, batches)
    difference, wrong = 0.0, 0
    for values, (actions, *others) in zip(ours, found, strict=True):
        for value, other in zip(values, others, strict=True):
            finite = np.isfinite(value)
            assert np.array_equal(value[~finite], other[~finite])
            difference = max(difference, float(np.max(np.abs(value[finite] - other[finite]))))
        best = np.sort(values[0], axis=-1)
        wrong += int(np.sum((values[0].argmax(-1) != actions) & (best[:, -1] - best[:, -2] > TOLERANCE)))
    return {
        "observations": sum(len(batch[0]) for batch in batches),
        "difference_e-6": 1e6 * difference,
        "wrong_actions": wrong,
        "q_deviation": float(np.std(np.concatenate([q[np.isfinite(q)] for q, *_ in ours]))),
        "file_megabytes": (out / FILES[file_format]).stat().st_size / 1e6,
        "export_seconds": seconds,
    }


def _batches(program: Program, num_observations: int) -> Any:
    """Yields the inputs of each batch. For a network that remembers, all batches are steps of the same lanes."""
    random, done = np.random.default_rng(0), 0
    remembers = len(program.inputs) > 2 and program.inputs[-1].name == "is_first"
    sizes = (min(LANES, num_observations),) if remembers else BATCH_SIZES
    for number in range(num_observations):
        size = min(sizes[min(number, len(sizes) - 1)], num_observations - done)
        if size <= 0 or (remembers and size < sizes[0]):
            return
        done += size
        batch = [random_input(port, size, random) for port in program.inputs]
        if remembers:
            batch[-2][:] = 0
            batch[-1] &= random.random(size) < 0.2
        yield batch


def _of_policy(policy: Policy, batches: list[list[np.ndarray]]) -> list[tuple[np.ndarray, ...]]:
    """Returns Q-values, and the state if there is one, of each batch."""
    if policy._network.recurrence is None:
        return [(policy.q_values(*batch),) for batch in batches]
    found: list[tuple[np.ndarray, ...]] = []
    state, player = None, policy.player
    for obs, *_, is_first in map(jax.device_put, batches):  # as `Policy.step` does, which doesn't return Q-values
        state = player.begin(obs) if state is None else player.observe(state, obs, is_first)
        q, state, _ = player.values(policy.params, state)
        found.append((shown(np.asarray(q)), np.asarray(state.carry)))
    return found


def _of_stablehlo(
    path: Path, program: Program, batches: list[list[np.ndarray]], folder: Path, in_child: bool
) -> list[tuple[np.ndarray, ...]]:
    inputs, outputs = folder / "inputs.npz", folder / "outputs.npz"
    remembers = program.inputs[-1].name == "is_first"
    given: dict[str, Any] = {f"{n}.{i}": array for n, batch in enumerate(batches) for i, array in enumerate(batch)}
    np.savez(inputs, batches=len(batches), inputs=len(program.inputs), remembers=remembers, **given)
    names = (str(path), str(inputs), str(outputs))
    if in_child:
        without = "import sys\nsys.modules['qfleet'] = None  # so that it can't be imported\n"
        code = f"{without}{inspect.getsource(run_stablehlo)}\nrun_stablehlo(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", code, *names], check=True)
    else:
        run_stablehlo(*names)
    with np.load(outputs) as found:
        return [tuple(found[f"{n}.{i}"] for i in range(len(program.outputs))) for n in range(len(batches))]


def run_stablehlo(program: str, inputs: str, outputs: str) -> None:
    """Runs a program on the arrays in a file, and writes its results into another. It imports nothing of qfleet."""
    import jax
    import numpy as np

    with open(program, "rb") as file:
        call = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
    found, state = {}, None
    with np.load(inputs) as given:
        for batch in range(int(given["batches"])):
            arrays = [given[f"{batch}.{i}"] for i in range(int(given["inputs"]))]
            if state is not None:
                arrays[-2] = state
            results = jax.device_get(call(*arrays))
            state = results[-1] if given["remembers"] else None
            found.update({f"{batch}.{i}": result for i, result in enumerate(results)})
    np.savez(outputs, **found)


def _of_onnx(path: Path, program: Program, batches: list[list[np.ndarray]]) -> list[tuple[np.ndarray, ...]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [port.name for port in program.inputs]
    found: list[tuple[np.ndarray, ...]] = []
    for batch in batches:
        given = dict(zip(names, batch, strict=True))
        if "state" in given and found:
            given["state"] = found[-1][-1]
        found.append(tuple(session.run(None, given)))
    return found


if __name__ == "__main__":
    sys.exit(main())
