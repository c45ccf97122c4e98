"""The zoo's agents: trains them, and writes them into the package.

    python benchmarks/zoo.py [AGENT ...]

Without names, it trains all of them, in about a quarter of an hour on two cores. Each is trained and exported by the
two commands that its model card ends with.
"""

import argparse
import contextlib
import os
import shlex
import shutil
from pathlib import Path

import common
import numpy as np

import qfleet
from qfleet.cli.main import main as run_qfleet
from qfleet.exporting.hub import CARD, DOWNLOAD, VIDEO, VIDEO_SENTENCE
from qfleet.runtime.zoo import FOLDER

_TEN_MILLION = ("--env-steps", "10000000")
_DENSE = (
    *("--torso", "mlp", "--hidden-sizes", "128", "128", "--learning-rate", "1e-3"),
    *("--exploration-env-steps", "800000", "--eval-period-env-steps", "400000"),
)

AGENTS: dict[str, tuple[str, ...]] = {
    "cartpole": ("CartPole-v1", "--stop-return", "475"),
    "lunarlander": ("LunarLander-v3", "--env-steps", "500000"),
    "breakout-minatar": ("gymnax:Breakout-MinAtar", *_TEN_MILLION),
    "asterix-minatar": ("gymnax:Asterix-MinAtar",),
    "freeway-minatar": ("gymnax:Freeway-MinAtar", *_TEN_MILLION, *_DENSE),
    "spaceinvaders-minatar": ("gymnax:SpaceInvaders-MinAtar", *_TEN_MILLION, *_DENSE),
    "seaquest-minatar": ("pgx:minatar-seaquest", *_TEN_MILLION, *_DENSE, "--env-options", "max_episode_steps", "5000"),
}
"""Arguments of `qfleet train` for each agent."""


def main() -> None:
    """Trains agents, replaces those of the package, and prints how well they play."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agents", nargs="*", metavar="AGENT", help=", ".join(AGENTS))
    names = parser.parse_args().agents or list(AGENTS)
    for name in names:
        if name not in AGENTS:
            parser.error(f"AGENT must be one of {', '.join(AGENTS)}, got {name}")
    rows = []
    for name in names:
        with common.scratch() as folder, contextlib.chdir(folder):
            commands = [
                ["train", *AGENTS[name], "--run-dir", f"runs/{name}"],
                ["export", f"runs/{name}", "--checkpoint", "best", "--hub-folder", "--out", name],
            ]
            for command in commands:
                if run_qfleet(command):
                    raise SystemExit(f"qfleet {shlex.join(command)} failed")
            Path(name, VIDEO).unlink(missing_ok=True)
            card = Path(name, CARD)
            card.write_text(card_of(card.read_text(encoding="utf-8"), name, commands), encoding="utf-8")
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(name, FOLDER / name)
        returns = np.asarray(qfleet.load(f"zoo:{name}").evaluate(100, seed=1000))
        size = sum(os.path.getsize(path) for path in (FOLDER / name).iterdir())
        rows.append({"agent": name, "return_mean": round(returns.mean().item(), 2), "kB": round(size / 1000)})
    common.report("zoo", rows)


def card_of(card: str, name: str, commands: list[list[str]]) -> str:
    """Returns the model card of an agent in the package, made of the one that was written for a hub."""
    for text, replacement in {
        f"{VIDEO_SENTENCE}\n\n": "",
        f"{DOWNLOAD}\n": "",
        "qfleet eval policy": f"qfleet eval zoo:{name}",
        'qfleet.load("policy")': f'qfleet.load("zoo:{name}")',
    }.items():
        if text not in card:
            raise SystemExit(f"the model card must contain {text!r}, got:\n{card}")
        card = card.replace(text, replacement)
    lines = "\n".join(f"qfleet {shlex.join(command)}" for command in commands)
    return f"{card}\nThese commands trained and exported it:\n\n```bash\n{lines}\n```\n"


if __name__ == "__main__":
    main()
