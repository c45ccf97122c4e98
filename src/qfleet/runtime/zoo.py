"""The zoo: trained agents that come with the package, in `qfleet/zoo`.

Each is the folder of an exported policy, with a model card that says how it was trained and how well it plays.
"""

import os
from pathlib import Path

from qfleet.config import ConfigError, suggest

FOLDER = Path(__file__).parents[1] / "zoo"

_PREFIX = "zoo:"


def agents() -> list[str]:
    """Returns the names of the agents."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def resolve_zoo(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Returns the folder of the agent that `path` names, as in zoo:cartpole, or `path` itself if it names none.

    Raises:
      ConfigError: if the zoo has no such agent.
    """
    text = str(path) if isinstance(path, (str, os.PathLike)) else ""  # whoever reads the path refuses anything else
    if not text.startswith(_PREFIX):
        return path
    name = text.removeprefix(_PREFIX)
    if name not in agents():
        raise ConfigError(
            f"an agent of the zoo must be one of {', '.join(agents())}, got {text[:200]!r}.{suggest(name, agents())}"
        )
    return FOLDER / name


def folder_for_outputs(policy_folder: Path) -> Path:
    """Returns the folder for what is made of a policy: its own; for an agent of the zoo, one in the current folder."""
    return Path("zoo", policy_folder.name) if policy_folder.parent == FOLDER else policy_folder
