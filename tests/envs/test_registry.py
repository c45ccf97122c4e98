"""Names of environments, registrations by users, and the errors for wrong ones."""

import dataclasses
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import counters
import gymnasium as gymnasium_itself
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.config import ConfigError
from qfleet.envs import cartpole, factory, gymnasium, registry
from qfleet.envs.factory import name_of_factory, remember_factory
from qfleet.envs.host import HostEnv
from qfleet.envs.registry import (
    backend_of,
    check_can_travel,
    check_env,
    default_topology,
    list_envs,
    make_env,
    register_env,
)
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(factory, "_factories", {})


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"])
def test_ours_keep_the_contract_and_their_names(name: str) -> None:
    env = make_env(name)
    check_env(env, name)
    assert env.spec.name == name


@pytest.mark.parametrize("probe", probes.ALL, ids=lambda probe: probe.__name__)
def test_probes_keep_the_contract(probe: Callable[[], InGraphEnv]) -> None:
    check_env(probe(), probe.__name__)


def test_listing_names_imports_neither_jax_nor_gymnax() -> None:
    code = (
        "import sys; from qfleet.envs.registry import list_envs; names = dict(list_envs());"
        "assert 'CartPole-v1' in names and 'gymnax:Breakout-MinAtar' in names;"
        "sys.exit(bool({'jax', 'gymnax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_registered_environment_is_made_and_listed_by_its_name() -> None:
    register_env("Mine", cartpole.make)
    assert make_env("Mine").spec.num_actions == 2
    assert "Mine" in dict(list_envs())


def test_registering_again_replaces() -> None:
    register_env("Mine", cartpole.make)
    register_env("Mine", probes.time_limit)
    assert make_env("Mine").spec.name == "time-limit"


@pytest.mark.parametrize("name", ["", "a:b", "CartPole-v1"])
def test_names_that_would_hide_others_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be new and contain no colon"):
        register_env(name, cartpole.make)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cartpole-v1", r"no environment is named 'Cartpole-v1'\. Did you mean CartPole-v1"),
        ("Breakout-MinAtar", r"Did you mean gymnax:Breakout-MinAtar"),
        ("Maze-7", r"as in MODULE:Maze-7\. `qfleet envs` lists all others"),
        ("gymnaxx:Breakout-MinAtar", r"got 'gymnaxx' \(ModuleNotFoundError.*Did you mean gymnax"),
        (":CartPole-v1", r"got ''"),
        ("LunarLandr-v3", r"no environment is named 'LunarLandr-v3'\. Did you mean LunarLander-v3"),
        ("gym:FrozenLak-v1", r"Gymnasium has no environment 'FrozenLak-v1'\. Did you mean FrozenLake-v1"),
        ("counters:Count-v0", r"module counters must register 'Count-v0'.*Did you mean Counter-v0"),
    ],
)
def test_an_unknown_name_says_what_is_near(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_env(name)


def test_an_id_that_a_package_registers_on_import_is_told_with_its_module(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mazes").mkdir()
    (tmp_path / "mazes" / "__init__.py").write_text("raise SystemExit('imported'); register(id='Maze-v3')\n")
    info = tmp_path / "mazes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: mazes\nVersion: 1.0\nRequires-Dist: gymnasium>=1.0\n")
    (info / "RECORD").write_text("mazes/__init__.py,,\n")
    with pytest.raises(ConfigError, match="until the package that registers it is imported; .* mazes:Maze-v3$"):
        make_env("Maze-v3")


@pytest.mark.parametrize(
    ("options", "kind", "topology"),
    [({"in_jax": True}, InGraphEnv, "fused"), ({"in_jax": False}, HostEnv, "overlapped")],
)
def test_a_maker_gets_the_options_and_may_return_any_kind(options: dict, kind: type, topology: str) -> None:
    def make(in_jax: bool) -> Any:
        return probes.time_limit() if in_jax else counters.Counter()

    register_env("Mine", make)
    assert isinstance(make_env("Mine", **options), kind)
    assert default_topology("Mine", **options) == topology


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (probes.time_limit, {"size": 3}, r"options that the maker of Mine takes, got \{'size': 3\}"),
        (lambda size: None, {}, r"options that the maker of Mine takes, got \{\}.*'size'"),
        (lambda: 1 / 0, {}, r"Mine: its maker must return an environment, got ZeroDivisionError.*test_registry.py:\d+"),
    ],
)
def test_a_maker_that_fails_is_one_clear_error(make: Any, options: dict[str, Any], message: str) -> None:
    register_env("Mine", make)
    for function in (lambda: make_env("Mine", **options), lambda: default_topology("Mine", **options)):
        with pytest.raises(ConfigError, match=message):
            function()


def test_a_function_is_recorded_by_a_name_that_means_it_in_this_process() -> None:
    name = name_of_factory(counters.Counter)
    assert name == name_of_factory(counters.Counter) == "factory:Counter"
    assert isinstance(make_env(name), HostEnv) and backend_of(name) == "factory"
    assert default_topology(name_of_factory(probes.time_limit)) == "fused"
    others = [name_of_factory(lambda: counters.Counter()) for _ in range(2)]
    assert others == ["factory:lambda", "factory:lambda-2"]
    with pytest.raises(ConfigError, match="factory:Unknown is a function that another process was given"):
        make_env("factory:Unknown")


@pytest.mark.parametrize("given", [counters.Counter(), cartpole.make(), 3])
def test_an_environment_itself_is_no_function_that_makes_one(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"a function that makes a new environment each time, got .*lambda"):
        name_of_factory(given)


def test_only_a_run_that_began_with_a_function_takes_one() -> None:
    with pytest.raises(ConfigError, match="must be left out .* got one for a run in CartPole-v1"):
        remember_factory("CartPole-v1", counters.Counter)


@pytest.mark.parametrize(
    "name",
    ["CartPole-v1", "gym:CartPole-v1", "gymnax:Breakout-MinAtar", "counters:Counter-v0", "gym:counters:Counter-v0"],
)
def test_what_any_process_finds_by_name_can_travel(name: str) -> None:
    check_can_travel(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Mine", "is registered by this program only"),
        ("ScriptOnly-v0", "is registered with Gymnasium by this program only"),
        ("gym:ScriptOnly-v0", "is registered with Gymnasium by this program only"),
        ("factory:Counter", "is a function of this program"),
        ("__main__:Mine", "is in the script that is run"),
    ],
)
def test_what_only_this_process_knows_cannot_travel(name: str, why: str) -> None:
    register_env("Mine", probes.time_limit)
    if "ScriptOnly-v0" not in gymnasium_itself.registry:
        gymnasium_itself.register("ScriptOnly-v0", entry_point=counters.Counter)
    with pytest.raises(ConfigError, match=f"got {name}, which {why}; register it in a module .* MODULE:NAME"):
        check_can_travel(name)


def test_a_module_before_the_colon_is_imported_and_registers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_mazes.py").write_text(
        "import qfleet.envs.registry as registry, qfleet.envs.cartpole as cartpole\n"
        "registry.register_env('Maze', cartpole.make)\n"
    )
    assert make_env("my_mazes:Maze").spec.num_actions == 2
    assert make_env("my_mazes:Maze").spec.num_actions == 2  # imported once, still registered
    with pytest.raises(ConfigError, match=r"module my_mazes must register 'Maxe'.*Did you mean Maze"):
        make_env("my_mazes:Maxe")


def test_a_module_that_fails_is_named_with_its_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_mazes.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"got 'broken_mazes' \(ZeroDivisionError: division by zero\)"):
        make_env("broken_mazes:Maze")


def test_missing_gymnax_names_the_command_that_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ConfigError, match=r"pip install 'qfleet\[gymnax\]'"):
        make_env("gymnax:Breakout-MinAtar")


def spec_of(**changes: Any) -> EnvSpec:
    return EnvSpec(**{**vars(cartpole.make().spec), **changes})


def result_with(**changes: Any) -> Callable[..., StepResult]:
    return lambda state, action, key: cartpole.step(state, action, key)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": spec_of(observation_shape=[4])}, "observation_shape must be a tuple of whole numbers, got [4]"),
        ({"spec": spec_of(observation_shape=(5,))}, "observation of reset must be float32[5], got float32[4]"),
        ({"spec": spec_of(observation_dtype=np.float32)}, "such as np.dtype('float32'), got <class"),
        ({"spec": spec_of(observation_dtype=np.dtype("uint8"))}, "reset must be uint8[4], got float32[4]"),
        ({"spec": spec_of(num_actions=0)}, "num_actions must be a whole number, at least 1, got 0"),
        ({"spec": spec_of(frame_stack=0)}, "frame_stack must be a whole number, at least 1, got 0"),
        ({"spec": spec_of(time_limit=0)}, "time_limit must be a whole number, at least 1, or None, got 0"),
        ({"reset": lambda key: jnp.zeros(4)}, "what reset returns must be (state, observation), got float32[4]"),
        ({"reset": lambda: None}, "reset(key) must be traceable by JAX, got TypeError"),
        (
            {"step": lambda state, action, key: (state, 0.0)},
            "what step returns must be a StepResult, got ('float32[4]'",
        ),
        ({"step": lambda state, action, key: bool(state[0])}, "must be traceable by JAX, got TracerBool"),
        ({"step": result_with(observation=jnp.zeros(3))}, "observation of step must be float32[4], got float32[3]"),
        ({"step": result_with(reward=jnp.int32(1))}, "the reward must be float32[], got int32[]"),
        ({"step": result_with(reward=jnp.ones(1))}, "the reward must be float32[], got float32[1]"),
        ({"step": result_with(terminated=jnp.float32(0))}, "terminated must be bool[], got float32[]"),
        ({"step": result_with(truncated=jnp.int32(0))}, "truncated must be bool[], got int32[]"),
        ({"step": result_with(state=jnp.zeros(3))}, "the state after step must be float32[4], got float32[3]"),
    ],
)
def test_a_breach_of_the_contract_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    register_env("Mine", lambda: cartpole.make()._replace(**changes))
    with pytest.raises(ConfigError, match="environment Mine: .*" + re.escape(message)):
        make_env("Mine")


def test_a_make_that_returns_something_else_is_refused() -> None:
    register_env("Mine", lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(
        ConfigError,
        match=r"what its make\(\) returns must be a gymnasium.Env, an InGraphEnv or a HostEnv, got builtins",
    ):
        make_env("Mine")


@pytest.mark.parametrize(
    ("name", "spec_name"),
    [
        ("gym:CartPole-v1", "gym:CartPole-v1"),
        ("FrozenLake-v1", "gym:FrozenLake-v1"),
        ("gym:counters:Counter-v0", "gym:counters:Counter-v0"),
        ("counters:Counter-v0", "gym:counters:Counter-v0"),
    ],
)
def test_gymnasium_is_found_with_its_prefix_and_without(name: str, spec_name: str) -> None:
    env = make_env(name)
    assert isinstance(env, HostEnv) and env.spec.name == spec_name
    check_env(env, name)


@pytest.mark.parametrize(
    ("name", "backend", "needs"),
    [
        ("CartPole-v1", "in-graph", "gymnasium"),
        ("gym:CartPole-v1", "gymnasium", "gymnasium"),
        ("FrozenLake8x8-v1", "gymnasium", "gymnasium"),
        ("counters:Counter-v0", "gymnasium", "gymnasium"),
        ("Registered-v0", "registered", "gymnasium"),
        ("gymnax:Breakout-MinAtar", "gymnax", "gymnax"),
        ("ale:Pong", "ale", "ale_py"),
    ],
)
def test_the_backend_of_a_name_is_told(name: str, backend: str, needs: str) -> None:
    pytest.importorskip(needs)
    register_env("Registered-v0", probes.time_limit)
    assert backend_of(name) == backend


def test_our_own_version_comes_before_gymnasiums() -> None:
    assert isinstance(make_env("CartPole-v1"), InGraphEnv)
    register_env("FrozenLake-v1", probes.time_limit)
    assert make_env("FrozenLake-v1").spec.name == "time-limit"


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("ale:Pong", "ale_py", r"ale:Pong needs ALE .*; pip install 'qfleet\[atari\]'"),
        ("envpool:Pong-v5", "envpool", r"envpool:Pong-v5 needs EnvPool .*; pip install 'qfleet\[envpool\]'"),
        ("gymnax:Breakout-MinAtar", "gymnax", r"need the package gymnax .*; pip install 'qfleet\[gymnax\]'"),
        ("LunarLander-v3", "Box2D", r"gym:LunarLander-v3 needs .*; pip install 'qfleet\[box2d\]'"),
    ],
)
def test_a_missing_extra_is_named(name: str, package: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("gymnasium.envs.box2d", "gymnasium.envs.box2d.lunar_lander"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigError, match=message):
        make_env(name)


def test_a_registered_environment_may_live_outside_the_program() -> None:
    env = gymnasium.make("FrozenLake-v1")
    register_env("Mine", lambda: env)
    assert make_env("Mine") is env
    register_env("Mine", lambda: env._replace(spec=dataclasses.replace(env.spec, num_actions=0)))
    with pytest.raises(ConfigError, match="environment Mine: num_actions must be a whole number, at least 1, got 0"):
        make_env("Mine")


@pytest.mark.parametrize("make", [None, "CartPole-v1", counters.Counter()])
def test_what_makes_no_environment_cannot_be_registered(make: Any) -> None:
    with pytest.raises(ConfigError, match="registered with a function that makes a new environment each time, got a "):
        register_env("Mine", make)
    with pytest.raises(ConfigError, match="must be new and contain no colon, got 3; try 'My3'"):
        register_env(3, cartpole.make)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int64", "float64", "uint64"])
def test_observations_wider_than_the_computation_are_refused(dtype: str) -> None:
    env = gymnasium.make("FrozenLake-v1")
    spec = dataclasses.replace(env.spec, observation_dtype=np.dtype(dtype))
    register_env("Mine", lambda: env._replace(spec=spec))
    with pytest.raises(ConfigError, match="observation_dtype must be .* of at most 32 bits, such as"):
        make_env("Mine")


@pytest.mark.parametrize("option", ["name", "label", "make", "options"])
def test_an_option_may_have_any_name(option: str) -> None:
    asked = []

    def make(**options: Any) -> Any:
        asked.append(options)
        return counters.Counter()

    register_env("Mine", make)
    gymnasium_itself.register("Named-v0", make)
    try:
        for name in ("Mine", name_of_factory(make), "Named-v0", "gym:Named-v0"):
            assert isinstance(make_env(name, **{option: "x"}), HostEnv)
            assert default_topology(name, **{option: "x"}) == "overlapped"
    finally:
        del gymnasium_itself.registry["Named-v0"]
    assert all(options == {option: "x"} for options in asked)
