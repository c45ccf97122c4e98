"""The help of `qfleet train`: all flags in groups, with the defaults of the run that the other arguments describe."""

import ast
import copy
import dataclasses
import functools
import inspect
import sys
from typing import Annotated, Any

import tyro

from qfleet.cli.flag_types import LOG, LOG_HELP
from qfleet.config import TOPOLOGIES, AgentConfig, TrainConfig

GROUPS: dict[str, tuple[str, ...]] = {
    "run": (
        "env_options", "preset", "seed", "num_seeds", "num_seeds_at_once", "env_steps", "stop_return", "run_dir",
        "report", "log", "quiet", "config", "trust", "print_config",
    ),
    "evaluation": (
        "eval_period_env_steps", "eval_episodes", "eval_exploration", "eval_max_episode_steps",
        "video_period_env_steps",
    ),
    "checkpoint": ("checkpoint_period_seconds", "checkpoints_kept", "checkpoint_best", "checkpoint_replay"),
    "learning": (
        "discount", "double", "n_step", "loss", "huber_delta", "value_rescaling", "target_update_period",
        "target_update_rate", "env_steps_per_learner_step", "batch_size", "target", "munchausen",
        "munchausen_temperature", "munchausen_weight", "munchausen_clip", "normalise_observations", "normalise_rewards",
        "own_options",
    ),
    "head": (
        "head", "num_atoms", "value_min", "value_max", "hl_gauss_smoothing", "num_quantiles", "num_acting_quantiles",
        "num_cosines",
    ),
    "exploration": (
        "exploration", "exploration_start", "exploration_end", "exploration_schedule", "exploration_env_steps",
        "exploration_fraction", "exploration_max_duration", "exploration_duration_exponent", "noisy", "noisy_std",
    ),
    "network": ("network", "torso", "hidden_sizes", "layer_norm", "dueling", "memory", "memory_size", "convolution"),
    "optimiser": (
        "optimiser", "optimiser_options", "learning_rate", "learning_rate_schedule", "learning_rate_end_fraction",
        "learning_rate_learner_steps", "learning_rate_fraction", "max_gradient_norm",
    ),
    "replay": (
        "replay", "replay_capacity", "warmup_env_steps", "priority_exponent", "importance_exponent_start",
        "importance_exponent_env_steps", "importance_exponent_fraction", "importance_normalisation", "burn_in",
        "sequence_length", "sequence_period", "priority_max_share",
    ),
    "Q(lambda)": ("rollout_length", "trace_decay", "num_epochs", "num_minibatches"),
}  # fmt: skip
"""Fields of a run's and an agent's config, by the group that the help shows them in."""

_SUMMARY = """\
Trains a deep Q-network, and writes everything about the run to its folder.

The defaults come from the preset, or are chosen for the environment and the topology: name them to see the defaults."""

_TOPOLOGY = (
    "Where the run takes place. The default is the topology that suits the environment. "
    + " ".join(f"{name}: {kind.summary}." for name, kind in TOPOLOGIES.items())
    + " (`decentralised --exchange all-reduce` and `--exchange gossip` are earlier names of two of them.)"
)


FILE_TEXTS = {
    "config": "File of settings in TOML or JSON, such as --print-config prints, or the config.json of a run. ENV may "
    "then be left out. Flags that are given too win. Settings that neither gives are chosen as without a file.",
    "trust": "Import modules (MODULE:NAME, of the environment or the agent's parts) that only the file names, "
    "and join the Ray cluster at an address that only it names. Both run their code.",
    "print_config": "Print the configuration that would run, with what each setting means, as a file for --config, and "
    "train nothing.",
}
"""What the help says about the flags that read and print the config of a run."""


def show_help(config: TrainConfig, prog: str, **more: Any) -> None:
    """Prints the help, and ends the process with exit code 0.

    Args:
      config: the run whose settings are shown as defaults.
      prog: name of the command.
      **more: further arguments of `tyro.cli`.

    Raises:
      SystemExit: always.
    """
    texts = field_texts(TrainConfig) | field_texts(AgentConfig)
    texts["preset"] = (
        "Preset that the defaults of the other settings come from, as listed by `qfleet presets`. "
        "By default, preset and settings are chosen for the environment and the topology."
    )
    texts |= {"log": LOG_HELP, "quiet": "Print nothing but errors."}
    texts["num_seeds_at_once"] = (
        "Number of seeds trained at the same time, if each has a process of its own. "
        "By default as many as the cores, the memory and the GPUs of this machine allow."
    )
    texts |= FILE_TEXTS
    values: dict[str, Any] = {"log": (LOG, ()), "quiet": (bool, False), "num_seeds_at_once": (int | None, None)}
    values |= {"config": (str | None, None), "trust": (bool, False), "print_config": (bool, False)}
    for owner in (config.agent, config):
        values |= {field.name: (field.type, getattr(owner, field.name)) for field in dataclasses.fields(owner)}
    env = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV", help=texts["env"])]
    boxes: list[Any] = [("env", env, tyro.MISSING)]
    for title, names in groups().items():
        boxes.append(_box(title, [(name, *values[name], texts[name]) for name in names]))
    boxes += _topology_boxes(config)
    kind = dataclasses.make_dataclass("Help", boxes, kw_only=True)
    kind.__doc__ = _SUMMARY
    tyro.cli(kind, prog=prog, args=["--help"], **more)


def field_texts(config: type) -> dict[str, str]:
    """Returns what the source code of a config class and its bases says about each field, below the field."""
    texts: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):
        # The source code of a class alone takes twice the time, because `inspect` parses all of its module to find it.
        module = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
        tree = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                texts[field.target.id] = " ".join(text.value.value.split())  # type: ignore[attr-defined]
    return texts


def groups() -> dict[str, list[str]]:
    """Returns `GROUPS`, where a field that it lacks joins the group of the field before it in the config."""
    found = {title: list(names) for title, names in GROUPS.items()}
    grouped = {name: title for title, names in GROUPS.items() for name in names}
    for config in (TrainConfig, AgentConfig):
        title = next(iter(GROUPS))
        for field in dataclasses.fields(config):
            title = grouped.get(field.name, title)
            if field.name not in {*found[title], "env", "agent", "topology"}:
                found[title].append(field.name)
    return found


def _topology_boxes(config: TrainConfig) -> list[Any]:
    topology, texts = config.topology, field_texts(type(config.topology))
    fields = [
        (field.name, field.type, getattr(topology, field.name), texts[field.name])
        for field in dataclasses.fields(topology)
        if field.name != "mesh"
    ]
    boxes = [_box("topology", [("topology", str, topology.name, _TOPOLOGY), *fields])]
    if any(field.name == "mesh" for field in dataclasses.fields(topology)):
        boxes.append(("mesh", type(topology.mesh), dataclasses.field(default=topology.mesh)))
    return boxes


def _box(title: str, fields: list[tuple[str, Any, Any, str]]) -> tuple[str, Any, Any]:
    """Returns a field of the help whose flags stand in a box of their own, without the title before their names.

    Args:
      title: title of the box.
      fields: name, type, default and text of each flag.
    """
    flags = [
        (
            name,
            Annotated[kind, tyro.conf.arg(prefix_name=False, help=text)],
            dataclasses.field(default_factory=functools.partial(copy.copy, default)),
        )
        for name, kind, default, text in fields
    ]
    kind = dataclasses.make_dataclass(title.title().replace("(", "").replace(")", ""), flags, kw_only=True)
    kind.__doc__ = ""
    field = "box_" + "".join(filter(str.isalpha, title))
    # Without a text, tyro looks for one in the source code, which takes a while.
    box = tyro.conf.arg(name=title, help="")
    return field, Annotated[kind, box], dataclasses.field(default_factory=kind)
