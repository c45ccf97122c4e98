"""Random settings of every kind, made from the type hints of the configs' fields."""

import collections.abc
import dataclasses
import pathlib
import random
import types
import typing
from typing import Any, Literal

import numpy as np

from qfleet.config import TOPOLOGIES, AgentConfig, ConfigError, MeshConfig, TrainConfig

WORDS = (
    "",
    "cartpole",
    "8x8",
    "true",
    "None",
    "1e3",
    "nan",
    "-1",
    "ünï",
    "a b",
    "--seed",
    "50",
    "host:1",
    "auto",
    "\x00",
)


class Draw:
    """Draws values for fields: mostly fitting ones, in all the forms that users have them in, and now and then not."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, kind: Any, default: Any) -> Any:
        """Returns a value for a field of this kind."""
        way = self.random.random()
        if way < 0.35 and default is not dataclasses.MISSING:
            return self.near(default)
        return self.of_kind(kind) if way < 0.9 else self.anything(3)

    def near(self, default: Any) -> Any:
        """Returns a value like the default, as another type where that is the same value."""
        if isinstance(default, bool):
            return self.random.choice([default, not default, np.bool_(default)])
        if isinstance(default, int):
            number = default * self.random.choice([1, 1, 2, 4])
            return self.random.choice([number, float(number), np.int64(number), np.float64(number), np.array(number)])
        if isinstance(default, float):
            return self.random.choice([default, default / 2, np.float32(default), np.float64(default)])
        if isinstance(default, tuple):
            return self.random.choice([default, list(default), np.array(default)])
        return default

    def of_kind(self, kind: Any) -> Any:
        """Returns a value of this kind; it may break the field's rule."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self.of_kind(self.random.choice(arguments))
        if origin is Literal:
            return self.random.choice([*arguments, np.str_(arguments[0])])
        if origin is tuple:
            items = [self.of_kind(arguments[0]) for _ in range(self.random.randrange(4))]
            return self.random.choice([tuple(items), items])
        if origin is collections.abc.Mapping:
            return {name: self.of_kind(arguments[1]) for name in self.random.sample(WORDS, self.random.randrange(4))}
        if kind is int:
            return self.random.choice([1, 2, 7, np.uint8(3), 1e5, 2**31, 2**53 + 1, 10**15, 10**400, 0, -1, 2.5])
        if kind is float:
            return self.random.choice([0.5, 1, 3, np.float16(0.1), 1e-9, 1e30, 1e300, 5e-324, 0.0, -1.5, float("inf")])
        if kind is bool:
            return self.random.choice([True, False, np.True_])
        if kind is str:
            return self.random.choice([*WORDS, pathlib.Path("a/b"), np.str_("x")])
        return None if kind is types.NoneType else self.anything(3)

    def anything(self, depth: int) -> Any:
        """Returns a value of any kind."""
        plain = [
            None,
            True,
            0,
            -3,
            2.5,
            1e22,
            -0.0,
            2**70,
            float("nan"),
            1j,
            b"x",
            object,
            np.float32(0.1),
            {1: 2},
            {3},
        ]
        way = self.random.random()
        if depth and way < 0.2:
            return [self.anything(depth - 1) for _ in range(self.random.randrange(3))]
        if depth and way < 0.4:
            return {name: self.anything(depth - 1) for name in self.random.sample(WORDS, self.random.randrange(3))}
        return self.random.choice([*plain, *WORDS, np.arange(4.0).reshape(2, 2), ("a", 1), float("-inf"), "1" * 5000])


def make(kind: type, draw: Draw, **others: Any) -> Any:
    """Returns a config with some random fields, all valid; each field that is refused is left out."""
    hints = typing.get_type_hints(kind)
    settings, defaults = dict(others), kind(**others)
    for field in dataclasses.fields(kind):
        if field.name in others or dataclasses.is_dataclass(hints[field.name]) or draw.random.random() < 0.5:
            continue
        value = draw.value(hints[field.name], getattr(defaults, field.name))
        try:
            config = kind(**settings, **{field.name: value})
        except ConfigError:
            continue
        settings[field.name] = getattr(config, field.name)
    return kind(**settings)


def random_config(seed: int) -> TrainConfig:
    """Returns a config with random fields of its agent, topology and run."""
    draw = Draw(seed)
    agent, kind = make(AgentConfig, draw), draw.random.choice(list(TOPOLOGIES.values()))
    mesh = {"mesh": make(MeshConfig, draw)} if "mesh" in {f.name for f in dataclasses.fields(kind)} else {}
    topology = make(kind, draw, **mesh)
    try:
        return make(TrainConfig, draw, env="E", agent=agent, topology=topology)
    except ConfigError:  # the agent doesn't go with the topology, so try it with the default one
        return make(TrainConfig, draw, env="E", topology=kind())
