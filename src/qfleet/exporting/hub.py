"""The model card of a policy, as Hugging Face's hub reads it: facts in YAML, then text in Markdown."""

import json
import math
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from qfleet.envs.names import SUITES, module_in
from qfleet.exporting.record import Origin
from qfleet.runtime.evaluation import Episodes, EvaluationOptions
from qfleet.runtime.run_directory import qfleet_version

CARD = "README.md"
VIDEO = "replay.mp4"
"""Name under which the hub looks for a video."""

VIDEO_SENTENCE = f"The video, `{VIDEO}`, is one episode."

DOWNLOAD = "hf download USER/REPOSITORY --local-dir policy"
"""The command that gets the folder from the hub."""

_NORMAL_95 = 1.96

_EXTRAS = {name: name for name in (*SUITES, "envpool")} | {"ale": "atari", "ale_py": "atari", "highway_env": "driving"}
"""Extra of each backend, and of each package of Gymnasium environments, that has one."""


class Result(NamedTuple):
    """What an evaluation has found."""

    num_episodes: int
    num_different: int
    """Number of episodes that differ from each other."""
    mean: float
    deviation: float
    half_width: float
    """Half of the width of the 95 % interval of the mean; 0 if all episodes are the same, so that the mean is exact."""


def extra_of(env: str) -> str:
    """Returns the extra of qfleet that an environment needs, by the environment's name; empty if it needs none."""
    name = env.removeprefix("gym:")
    entry_point = getattr(gymnasium.registry.get(name), "entry_point", None)
    is_box2d = isinstance(entry_point, str) and entry_point.startswith("gymnasium.envs.box2d")
    return "box2d" if is_box2d else _EXTRAS.get(name.partition(":")[0], "")


def result_of(episodes: Episodes) -> Result:
    """Returns the mean return of episodes, of which there must be one, and how far it can be trusted.

    Equal episodes say no more than one of them, so the interval counts the different ones.
    """
    returns, num_different = episodes.returns, int(episodes.num_different())
    deviation = float(np.std(returns, ddof=1)) if num_different > 1 else 0.0
    half_width = _NORMAL_95 * deviation / math.sqrt(num_different)
    return Result(len(returns), num_different, float(np.mean(returns)), deviation, half_width)


def model_card(
    origin: Origin, interface: dict[str, Any], result: Result, options: EvaluationOptions, *, has_video: bool
) -> str:
    """Returns the content of README.md.

    Args:
      origin: where the policy comes from.
      interface: what `describe_interface` says.
      result: of an evaluation.
      options: how its episodes were played.
      has_video: whether there is a video beside it.
    """
    config = origin.config
    name = f"{config.preset}-{config.env}"
    seed = config.seed if origin.trained_seed is None else origin.trained_seed
    extra = extra_of(config.env)
    install = f"pip install 'qfleet[{extra}]'" if extra else "pip install qfleet"
    parts = [
        _front_matter(name, origin, result),
        f"# `{config.preset}` in `{config.env}`",
        f"A deep Q-network, trained with qfleet {qfleet_version()} for {origin.env_steps:,} environment steps.",
        _results(result, options),
        *([VIDEO_SENTENCE] if has_video else []),
        "## How to use it",
        f"```bash\n{install}\n{DOWNLOAD}\nqfleet eval policy\n```",
        f"```python\n{_python(origin)}\n```",
        *_own_code(origin),
        "`model.safetensors` has the parameters. `config.json` has all settings of the run and, below `interface`, "
        "what goes in and comes out. Loading runs no code of this repository.",
        "## What goes in and comes out",
        _table([("", "name", "shape", "type", "meaning"), *_ports("in", interface), *_ports("out", interface)]),
        "\n".join(f"- {line}" for line in interface["preprocessing"]),
        f"The action: {interface['actions']['meaning']}.",
        "## How it was trained",
        _table([("setting", "value"), *((key, f"`{value}`") for key, value in _settings(origin, seed).items())]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(name: str, origin: Origin, result: Result) -> str:
    """Returns the facts for programs. Each value is JSON, which YAML contains, so any text may stand in it."""
    task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
    metric = {
        "type": "mean_reward",
        "name": "mean return, 95 % interval",
        "value": f"{result.mean:.2f} +/- {result.half_width:.2f}",
        "verified": False,
    }
    env = origin.config.env
    results = [{"task": task, "dataset": {"name": env, "type": env}, "metrics": [metric]}]
    facts = {
        "library_name": "qfleet",
        "pipeline_tag": "reinforcement-learning",
        "tags": [env, "reinforcement-learning", "deep-reinforcement-learning", "qfleet", origin.config.preset],
        "model-index": [{"name": name, "results": results}],
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in facts.items()), "---"])


def _results(result: Result, options: EvaluationOptions) -> str:
    chance = f", with {100 * options.exploration:.4g} % random actions" if options.exploration else ""
    different = "all different" if result.num_different == result.num_episodes else f"{result.num_different} different"
    interval = (
        f"{result.mean:.2f} ± {result.half_width:.2f} (95 % interval of the mean; standard deviation "
        f"{result.deviation:.2f})"
        if result.num_different > 1
        else f"{result.mean:.2f}"
    )
    return f"Mean return: {interval} over {result.num_episodes} episodes, {different}{chance}."


def _python(origin: Origin) -> str:
    lines = ["import qfleet", "", f"policy = qfleet.load({', '.join(_arguments(origin))})"]
    if origin.config.agent.memory != "none":
        lines += ["memory = policy.start()  # of one episode", "action, memory = policy.step(memory, observation)"]
    else:
        lines += ["action = policy(observation)  # or a batch of them", "q_values = policy.q_values(observation)"]
    return "\n".join([*lines, "returns = policy.evaluate(100)"])


def _arguments(origin: Origin) -> list[str]:
    return ['"policy"', *(["network=network"] if origin.has_own_network else [])]


def _own_code(origin: Origin) -> list[str]:
    """Returns sentences about code that the policy needs and the folder doesn't hold."""
    env = origin.config.env
    found = []
    if origin.has_own_network:
        found.append("`network` is the author's own `qfleet.Network`, which isn't part of this repository.")
    if module := module_in(env):
        found.append(f"To evaluate it, you need the module `{module}` of the environment, and `--trust`.")
    elif env.startswith("factory:"):
        found.append("To evaluate it, give the function that makes the environment: `qfleet.load(..., env=...)`.")
    return found


def _ports(kind: str, interface: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (kind, f"`{port['name']}`", f"`{port['shape']}`".replace("'", ""), port["dtype"], port["meaning"])
        for port in interface["inputs" if kind == "in" else "outputs"]
    ]


def _settings(origin: Origin, seed: int) -> dict[str, Any]:
    config = origin.config
    settings = {"preset": config.preset, "topology": config.topology.name, "seed": seed, "env_steps": origin.env_steps}
    names = ("head", "double", "dueling", "n_step", "replay", "torso", "hidden_sizes", "memory", "discount")
    return settings | {name: getattr(config.agent, name) for name in (*names, "learning_rate", "optimiser")}


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
