"""Environment steps/s of `pqn` on games of octax, beside octax's own PQN with the same network and schedule.

    python benchmarks/octax_pqn.py [--peers-python PATH] [--games pong brix wipe_off] [--lanes 64] [--repeats 1]

Both sides have the settings of octax's repository (conf/config.yaml): rollouts of 32, and 4 epochs of minibatches of
512. Only the number of lanes is smaller, 64 instead of 512, because octax's side would take minutes. Each side runs
alone, in a process of its own, and the sides alternate. A side plays and learns from one rollout untimed, and then from
another one. Compilation and evaluation are not timed. Needs the extra `octax` on our side; `make bench-peers` installs
the other side, whose PQN is in octax's package and needs rejax.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from typing import Any

import common
import jax
import jax.numpy as jnp
from flax import nnx

import qfleet
from qfleet.networks import convolve

ROLLOUT_LENGTH, MINIBATCH_SIZE = 32, 512
SETTINGS: dict[str, Any] = {
    "rollout_length": ROLLOUT_LENGTH,
    "num_epochs": 4,
    "optimiser": "adam",
    "learning_rate": 5e-4,
    "max_gradient_norm": None,
    "trace_decay": 0.9,
    "exploration_end": 0.05,
    "eval_episodes": 1,
    "eval_max_episode_steps": 10,
    "network": "octax_pqn:make_network",
}


class Convolution(nnx.Module):
    """A convolution with padding `SAME`, as Flax has it."""

    def __init__(self, channels: int, features: int, size: tuple[int, int], strides: tuple[int, int], rngs: nnx.Rngs):
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (*size, channels, features))
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros(features))
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[batch, height / stride, width / stride, features]`, rounded up."""
        size = self.kernel[...].shape
        missing = [
            max(0, (math.ceil(side / stride) - 1) * stride + kernel - side)
            for side, stride, kernel in zip(x.shape[1:3], self.strides, size, strict=False)
        ]
        x = jnp.pad(x, ((0, 0), *((each // 2, each - each // 2) for each in missing), (0, 0)))
        return convolve(x, self.kernel[...], self.strides, bias=self.bias[...])


class OctaxNetwork(nnx.Module):
    """The network of octax's PQN, which takes the frames for rows and the columns of the screen for channels."""

    def __init__(self, num_actions: int, rngs: nnx.Rngs):
        self.convolutions = nnx.List(
            [
                Convolution(64, 32, (8, 4), (4, 2), rngs),
                Convolution(32, 64, (1, 4), (1, 2), rngs),
                Convolution(64, 64, (1, 3), (1, 1), rngs),
            ]
        )
        self.hidden = nnx.Linear(512, 256, rngs=rngs)
        self.norm = nnx.LayerNorm(256, rngs=rngs)
        self.out = nnx.Linear(256, num_actions, rngs=rngs)

    def __call__(self, observations: jax.Array) -> jax.Array:
        """Returns Q-values `[batch, num_actions]` of observations `[batch, 32, 64, 4]`."""
        x = observations.astype(jnp.float32).transpose(0, 3, 1, 2)
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        return self.out(nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1)))))


def make_network(spec: qfleet.EnvSpec, config: qfleet.AgentConfig) -> qfleet.Network:
    """Returns the network that `SETTINGS` names."""
    return qfleet.from_nnx(lambda rngs: OctaxNetwork(spec.num_actions, rngs))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--games", nargs="+", default=["pong", "brix", "wipe_off"])
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ours", help="measure only our side of this game, in this process")
    arguments = parser.parse_args()
    if arguments.ours:
        print(json.dumps(ours(arguments.ours, arguments.lanes)))
        return
    rows = [compare(game, arguments.peers_python, arguments.lanes, arguments.repeats) for game in arguments.games]
    common.report("octax_pqn", rows)


def compare(game: str, peers_python: str, num_lanes: int, repeats: int) -> dict[str, Any]:
    """Returns the medians of both sides, and the median ratio of the pairs."""
    mine, theirs = [], []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--ours", game, "--lanes", str(num_lanes)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        mine.append(float(json.loads(output.splitlines()[-1])))
        peer = common.peer(peers_python, "octax_speed.py", game, str(num_lanes))
        theirs.append(float(peer["env_steps_per_second"]))
    return {
        "game": game,
        "octax_env_steps_per_second": statistics.median(theirs),
        "qfleet_env_steps_per_second": statistics.median(mine),
        "ratio": statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
    }


def ours(game: str, num_lanes: int) -> float:
    """Returns our environment steps/s in training."""
    rollout = num_lanes * ROLLOUT_LENGTH
    lengths: dict[str, Any] = dict.fromkeys(
        ("exploration_env_steps", "env_steps", "eval_period_env_steps"), 2 * rollout
    )
    num_minibatches = rollout // MINIBATCH_SIZE
    config = qfleet.make_config(
        f"octax:{game}", "pqn", num_envs=num_lanes, num_minibatches=num_minibatches, **lengths, **SETTINGS
    )
    return common.env_steps_per_second(config, rollout)


if __name__ == "__main__":
    main()
