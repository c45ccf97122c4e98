"""Each format computes what the policy does, for every kind of network, as `benchmarks/export.py` measures it."""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

import qfleet
from qfleet.config import ConfigError
from qfleet.core.types import EnvSpec, Network
from qfleet.envs import gymnasium as backend
from qfleet.envs.recorded import record_of
from qfleet.exporting.interface import describe_interface
from qfleet.exporting.program import make_program
from qfleet.policy import Policy

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "export.py"

SMALL: dict[str, dict[str, Any]] = {
    "nature": {"shape": (36, 36), "frame_stack": 2, "agent": {"hidden_sizes": (8,)}},
    "impala": {"shape": (9, 9), "frame_stack": 2, "agent": {"torso": "impala", "hidden_sizes": (8,)}},
}
"""What makes the large networks of the benchmark small."""

BY_ONNX = ("onnx", ("mlp", "nature", "c51", "iqn", "lstm", "masked"))
BY_STABLEHLO = ("stablehlo", ("mlp", "minatar", "nature", "impala", "dueling", "c51", "iqn", "lstm", "masked"))


OBSERVATIONS = (8, 300)
"""Number of observations: one and seven, or three steps of a hundred lanes."""


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The benchmark, under another name than the package has."""
    spec = importlib.util.spec_from_file_location("benchmark_of_exports", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARK.parent)
        sys.modules["benchmark_of_exports"] = module
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def references(benchmark: Any) -> Callable[[str], Any]:
    """What the policies do, by their networks' names. Each is run once."""
    return functools.cache(lambda name: benchmark.run_policy(policy_of(benchmark, name), OBSERVATIONS[name == "lstm"]))


def policy_of(benchmark: Any, name: str) -> Policy:
    return benchmark.make_policy(benchmark.CASES[name]._replace(**SMALL.get(name, {})), num_actions=3)


@pytest.mark.parametrize(
    ("file_format", "name"), [(form, name) for form, names in (BY_STABLEHLO, BY_ONNX) for name in names]
)
def test_a_format_computes_what_the_policy_does(
    benchmark: Any, references: Callable[[str], Any], file_format: str, name: str, tmp_path: Path
) -> None:
    if file_format == "onnx":
        pytest.importorskip("jax2onnx")
    reference = references(name)
    found = benchmark.compare(reference, file_format, tmp_path, in_child=name == "lstm")
    assert found["difference_e-6"] <= 10 and found["wrong_actions"] == 0 and found["q_deviation"] > 0.1
    assert found["observations"] == OBSERVATIONS[name == "lstm"]
    config = json.loads((tmp_path / file_format / "config.json").read_text())
    names = [port["name"] for port in config["policy"]["interface"]["inputs"]]
    extra = {"lstm": ["state", "is_first"], "masked": ["action_mask"]}.get(name, [])
    assert names == ["observation", *extra]
    assert sorted(path.name for path in (tmp_path / file_format).iterdir()) == ["config.json", f"model.{file_format}"]


def test_a_program_holds_no_path_of_this_machine(benchmark: Any, tmp_path: Path) -> None:
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    try:
        policy_of(benchmark, "mlp").export(tmp_path / "out", "stablehlo")
        assert jax.config.jax_traceback_in_locations_limit == 10
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    assert b".py" not in (tmp_path / "out" / "model.stablehlo").read_bytes()


def test_a_program_runs_on_cpus_and_gpus(benchmark: Any, tmp_path: Path) -> None:
    out = policy_of(benchmark, "mlp").export(tmp_path / "out", "stablehlo")
    exported = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda")
    assert [str(value) for value in exported.in_avals] == ["float32[batch,8]"]


def test_a_model_says_what_goes_in_and_logs_nothing(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jax2onnx")
    import logging

    import onnx

    handlers = logging.getLogger().handlers[:]
    out = policy_of(benchmark, "minatar").export(tmp_path / "out", "onnx")
    assert capsys.readouterr() == ("", "") and logging.getLogger().handlers == handlers
    model = onnx.load(out / "model.onnx")
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == ["observation"]
    assert [value.name for value in model.graph.output] == ["action", "q_values"]
    (described,) = [entry.value for entry in model.metadata_props if entry.key == "qfleet"]
    assert json.loads(described) == json.loads((out / "config.json").read_text())


def test_preprocessing_and_actions_are_described(benchmark: Any, tmp_path: Path) -> None:
    out = policy_of(benchmark, "nature").export(tmp_path / "out")
    interface = json.loads((out / "config.json").read_text())["policy"]["interface"]
    assert interface["inputs"][0]["shape"] == ["batch", 36, 36, 2] and interface["inputs"][0]["dtype"] == "uint8"
    first, second = interface["preprocessing"]
    assert first.startswith("Stack the newest 2 frames on a last axis, oldest first")
    assert second == "Leave pixels from 0 to 255: the policy divides them itself."
    assert interface["actions"] == {"start": 0, "meaning": "the environment takes the policy's action"}


@pytest.mark.parametrize(
    ("env", "sentences", "actions"),
    [
        ("FrozenLake-v1", ["Make the observation one-hot"], {"start": 0}),
        ("Blackjack-v1", ["Flatten the parts of the observation, and join them in the order"], {"start": 0}),
        ("counters:Offset-v0", ["Make the observation one-hot"], {"start": 5}),
    ],
)
def test_encodings_and_offsets_of_an_environment_are_described(
    env: str, sentences: list[str], actions: dict[str, int]
) -> None:
    made = backend.make(env)
    program = make_program(Network(lambda key: {}, lambda params, obs: obs), {}, made.spec)
    found = describe_interface(program, made.spec, record_of(made), None)
    assert [line[: len(start)] for line, start in zip(found["preprocessing"], sentences, strict=True)] == sentences
    assert {name: found["actions"][name] for name in actions} == actions
    assert found["raw_observation"] is not None


def by_hand(apply: Any, params: Any = None) -> Policy:
    return Policy(probes.time_limit(), Network(lambda key: params, apply), params, "mine")


def test_a_policy_made_by_hand_is_exported_as_a_program_and_not_as_weights(tmp_path: Path) -> None:
    policy = by_hand(lambda params, obs: obs * params, jnp.ones((1, 2)))
    with pytest.raises(ConfigError, match=r"must come from qfleet.load, .* give format='stablehlo' or 'onnx'"):
        policy.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    out = policy.export(tmp_path / "out", "stablehlo")
    call = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes())).call
    obs = np.full((3, 1), 2.0, np.float32)
    assert np.array_equal(call(obs)[1], policy.q_values(obs))
    with pytest.raises(ConfigError, match=r"its model.stablehlo with another program, or export .* safetensors"):
        qfleet.load(out)


def test_a_network_that_wants_the_size_of_its_batch_is_told_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    policy = by_hand(lambda params, obs: jnp.zeros((len(obs), 2)))
    with pytest.raises(ConfigError, match=r"must take a batch of any size .* use x.shape\[0\] in place of len\(x\)"):
        policy.export(tmp_path / "out", "stablehlo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["c51", "impala", "lstm", "masked"])
def test_weights_make_the_same_policy_again(
    benchmark: Any, references: Callable[[str], Any], name: str, tmp_path: Path
) -> None:
    found = benchmark.compare(references(name), "safetensors", tmp_path)
    assert (found["difference_e-6"], found["wrong_actions"]) == (0, 0)


def test_observations_of_a_policy_are_those_of_its_program() -> None:
    """The shapes in the description are what `policy(obs)` takes."""
    spec = EnvSpec(
        name="X", observation_shape=(2, 3), observation_dtype=np.dtype(np.float32), num_actions=2, frame_stack=4
    )
    program = make_program(Network(lambda key: {}, lambda params, obs: obs.sum((1, 2))), {}, spec)
    assert program.inputs[0].shape == spec.agent_observation_shape == (2, 3, 4)
