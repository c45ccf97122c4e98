"""What is learned: the agent's settings."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Literal

from qfleet.config.checks import check, check_choices, check_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What is learned. Knows nothing of processes, devices or queues.

    Options compose: `double`, `dueling`, `n_step` and prioritised `replay` together are the core of Rainbow
    (Hessel et al. 2018, arXiv 1710.02298); `replay="none"` is Q(lambda) without replay or target network
    (PQN, Gallici et al. 2024, arXiv 2407.04811). `PRESETS` names the well-known combinations.
    """

    discount: float = 0.99
    """Per environment step, in (0, 1]."""
    double: bool = False
    """The online network picks the bootstrap action, the target network values it (van Hasselt et al. 2016)."""
    n_step: int = 1
    """Rewards summed before bootstrapping, in environment steps. Without replay, `trace_decay` does this."""
    loss: Literal["squared", "huber"] = "huber"
    """Of the TD error. Huber is squared up to `huber_delta` and linear beyond (Mnih et al. 2015's clipping)."""
    huber_delta: float = 1.0
    """Where Huber turns linear, in units of discounted reward."""

    torso: Literal["auto", "mlp", "minatar", "nature"] = "auto"
    """Convolutions before the dense layers; `auto`: by the observation's shape (vector, small or Atari-sized)."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Units of each dense layer after the torso."""
    layer_norm: bool = False
    """Layer normalisation after each hidden layer, before its activation."""
    dueling: bool = False
    """Value and advantage streams (Wang et al. 2016, arXiv 1511.06581)."""
    convolution: Literal["auto", "patches", "native"] = "auto"
    """How convolutions are lowered; `auto` is patches times a matrix on CPU, native elsewhere. Same numbers."""

    exploration: Literal["epsilon_greedy", "softmax"] = "epsilon_greedy"
    """Softmax is Boltzmann exploration: probabilities softmax(q / temperature)."""
    exploration_start: float = 1.0
    """Epsilon (a probability), or the temperature in units of discounted reward, at the first step."""
    exploration_end: float = 0.05
    """The same, once it has decayed."""
    exploration_schedule: Literal["linear", "exponential"] = "linear"
    """How it decays from start to end."""
    exploration_env_steps: int = 25_000
    """Environment steps (of all lanes together) the decay takes."""

    optimiser: str = "adam"
    """Any optimiser of Optax by its function's name: adam, adamw, radam, rmsprop, sgd, lion ..."""
    optimiser_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Further arguments of that function, such as `eps`."""
    learning_rate: float = 1e-3
    """At the first learner step."""
    learning_rate_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """How it changes over `learning_rate_learner_steps`."""
    learning_rate_end_fraction: float = 0.0
    """Final learning rate as a fraction of the first; above 0 for the exponential schedule."""
    learning_rate_learner_steps: int = 100_000
    """Learner steps that the schedule takes."""
    max_gradient_norm: float | None = 10.0
    """Gradients are scaled down to this global norm; None leaves them alone."""

    replay: Literal["uniform", "prioritised", "none"] = "uniform"
    """`prioritised` is proportional (Schaul et al. 2016, arXiv 1511.05952); `none` is Q(lambda)."""
    batch_size: int = 128
    """Transitions per learner step, over all replicas. Unused without replay."""
    replay_capacity: int = 100_000
    """Environment steps kept, over all lanes."""
    warmup_env_steps: int = 1_000
    """Environment steps, over all lanes, before the first learner step."""
    env_steps_per_learner_step: float = 10.0
    """Environment steps, over all lanes, for each learner step. Changing the number of lanes changes nothing."""
    target_update_period: int = 500
    """Learner steps between updates of the target network."""
    target_update_rate: float = 1.0
    """Share of the online parameters in each such update: 1 copies, less is Polyak averaging (period 1)."""
    priority_exponent: float = 0.6
    """Alpha: 0 is uniform, 1 fully proportional to the TD error."""
    importance_exponent_start: float = 0.4
    """Beta at the first step; 1 corrects the sampling bias in full."""
    importance_exponent_env_steps: int = 100_000
    """Environment steps over which beta grows to 1."""

    rollout_length: int = 16
    """Q(lambda): environment steps per lane between two rounds of learning."""
    trace_decay: float = 0.65
    """Q(lambda): lambda; 0 bootstraps after one step, 1 after the whole rollout."""
    num_epochs: int = 2
    """Q(lambda): passes over each rollout."""
    num_minibatches: int = 1
    """Q(lambda): learner steps per pass."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("discount", "target_update_rate"):
            check(0.0 < getattr(self, name) <= 1.0, name, "in (0, 1]", getattr(self, name))
        for name in ("trace_decay", "priority_exponent", "importance_exponent_start", "learning_rate_end_fraction"):
            check(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]", getattr(self, name))
        for name in (
            "n_step", "batch_size", "replay_capacity", "target_update_period", "rollout_length", "num_epochs",
            "num_minibatches", "exploration_env_steps", "learning_rate_learner_steps",
            "importance_exponent_env_steps",
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        for name in ("huber_delta", "learning_rate", "env_steps_per_learner_step"):
            check(0.0 < getattr(self, name) < math.inf, name, "positive and finite", getattr(self, name))
        check_count("warmup_env_steps", self.warmup_env_steps, minimum=0)
        check(
            self.max_gradient_norm is None or self.max_gradient_norm > 0,
            "max_gradient_norm", "positive, or None to leave gradients alone", self.max_gradient_norm,
        )  # fmt: skip
        check(all(size >= 1 for size in self.hidden_sizes), "hidden_sizes", "all at least 1", self.hidden_sizes)
        highest = 1.0 if self.exploration == "epsilon_greedy" else sys.float_info.max
        lowest_end = 0.0 if self.exploration_schedule == "linear" and self.exploration == "epsilon_greedy" else 1e-8
        check(
            lowest_end <= self.exploration_end <= self.exploration_start <= highest,
            "exploration_end and exploration_start", f"in order within [{lowest_end:g}, {highest:g}]",
            (self.exploration_end, self.exploration_start),
        )  # fmt: skip
        if self.learning_rate_schedule == "exponential":
            check(
                self.learning_rate_end_fraction > 0,
                "learning_rate_end_fraction", "above 0 for an exponential schedule", self.learning_rate_end_fraction,
            )  # fmt: skip

    @property
    def replay_ratio(self) -> float:
        """Times each environment step is learned from, on average."""
        if self.replay == "none":
            return float(self.num_epochs)
        return self.batch_size / self.env_steps_per_learner_step
