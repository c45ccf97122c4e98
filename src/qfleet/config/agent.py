"""What is learned: the agent's settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qfleet.config.checks import MAX_COUNT, MAX_SIZE, check, check_count, check_counts, check_positive
from qfleet.config.errors import ConfigError
from qfleet.config.own_parts import is_own_name
from qfleet.config.values import MAX_FLOAT, Config

MIN_ENV_STEPS_PER_LEARNER_STEP = 1e-3
"""A thousand learner steps for each environment step. Plans of the longest run then stay within 64-bit integers."""

_TARGET_UPDATE_PERIOD = 500


SHARES = {
    "exploration_fraction": "exploration_env_steps",
    "learning_rate_fraction": "learning_rate_learner_steps",
    "importance_exponent_fraction": "importance_exponent_env_steps",
}
"""Settings that give the length of a schedule as a share of the run, and those that they replace."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig(Config):
    """What is learned. It knows nothing about processes, devices or queues.

    Options compose: `double`, `dueling`, `n_step` and prioritised `replay` together are the core of Rainbow
    (Hessel et al. 2018, arXiv 1710.02298); `replay="none"` is Q(lambda) without replay or target network
    (PQN, Gallici et al. 2024, arXiv 2407.04811). `PRESETS` names the well-known combinations.
    """

    discount: float = 0.99
    """Discount factor per environment step, in (0, 1]."""
    double: bool = False
    """Let the online network pick the bootstrap action and the target network value it (van Hasselt et al. 2016)."""
    n_step: int = 1
    """Environment steps whose rewards are summed before bootstrapping. Without replay, `trace_decay` does this."""
    loss: Literal["squared", "huber"] = "huber"
    """Loss of the TD error. Huber is squared up to `huber_delta`, and linear beyond (Mnih et al. 2015's clipping)."""
    value_rescaling: bool = False
    """Learn `h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x` of the return in place of the return x, which keeps targets
    of large returns small (Pohlen et al. 2018, arXiv 1805.11593). Q-values are then in these units."""
    huber_delta: float = 1.0
    """TD error at which the Huber loss turns linear, in units of discounted reward; for quantiles, kappa."""

    head: Literal["scalar", "c51", "qr", "iqn", "hl_gauss"] | str = "scalar"
    """What the network learns of the return: its mean by regression, or a distribution.
    `c51` is a probability for each atom (Bellemare et al. 2017, arXiv 1707.06887). `qr` is fixed quantiles (Dabney et
    al. 2018, arXiv 1710.10044), and `iqn` any quantile (Dabney et al. 2018, arXiv 1806.06923). `hl_gauss` is the mean,
    learned by classification (Farebrother et al. 2024, arXiv 2403.03950). MODULE:NAME is a head of your own, with a
    loss of your own: a function of the agent's config that returns a `Head`."""
    num_atoms: int = 51
    """c51 and hl_gauss: number of atoms, evenly spaced from `value_min` to `value_max`."""
    value_min: float = -10.0
    """c51 and hl_gauss: least discounted return that the network can express."""
    value_max: float = 10.0
    """c51 and hl_gauss: greatest discounted return that the network can express."""
    hl_gauss_smoothing: float = 0.75
    """hl_gauss: standard deviation of the target's Gaussian, in widths between two atoms."""
    num_quantiles: int = 64
    """qr: number of quantiles. iqn: number of random fractions in each of the two sides of the loss."""
    num_acting_quantiles: int = 32
    """iqn: number of evenly spaced fractions whose mean is the Q-value when acting and evaluating."""
    num_cosines: int = 64
    """iqn: length of a fraction's embedding."""
    target: str | None = None
    """MODULE:NAME of a target of your own, in place of `double` and `munchausen`: a function of the agent's config that
    returns a `Target`. None takes that of Q-learning."""
    munchausen: bool = False
    """Add the scaled log-probability of the action to the reward, and bootstrap from a softmax policy of the target
    network's values (Vieillard et al. 2020, arXiv 2007.14430)."""
    munchausen_temperature: float = 0.03
    """Temperature (tau) of that policy, in units of discounted reward."""
    munchausen_weight: float = 0.9
    """Weight (alpha) of the log-probability, in [0, 1]."""
    munchausen_clip: float = -1.0
    """Least scaled log-probability (l0)."""

    normalise_observations: bool = False
    """Divide observations, less their running mean, by their running deviation, and clip them at 10 deviations.
    It is for vectors of numbers of different sizes."""
    normalise_rewards: bool = False
    """Divide rewards by the running size of the discounted return, for the learner: settings in units of discounted
    reward (`huber_delta`, `value_min`, `munchausen_temperature` ...) then count in its multiples. Q-values don't."""

    network: str | None = None
    """MODULE:NAME of a network of your own: a function of an `EnvSpec` and the agent's config that returns a `Network`.
    It may take notice of the settings below. None builds one from them."""
    torso: Literal["auto", "mlp", "minatar", "nature", "impala", "hadamax"] = "auto"
    """Convolutions before the dense layers; `auto` goes by the observation's shape (vector, small or Atari-sized).
    `impala` is a residual network (Espeholt et al. 2018, arXiv 1802.01561), and `hadamax` multiplies pairs of
    convolutions (Kooi et al. 2025, arXiv 2505.15345). `auto` takes neither of these."""
    torso_width: int = 1
    """Factor of the number of channels of each convolution of the torso."""
    spectral_norm: bool = False
    """impala: divide the kernels of residual blocks by their spectral norms (Clark et al. 2024, arXiv 2411.03820)."""
    adaptive_pooling: int | None = None
    """impala: height and width, in pixels, of the map that adaptive max pooling leaves to the dense layers
    (Clark et al. 2024, arXiv 2411.03820). None leaves the map as it is."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Units of each dense layer after the torso."""
    layer_norm: bool = False
    """Normalise each hidden layer, before its activation. With torso impala, these are the dense layers only."""
    dueling: bool = False
    """Use separate streams for value and advantage (Wang et al. 2016, arXiv 1511.06581)."""
    noisy: bool = False
    """Add learned noise to the parameters of each dense layer, which explores in place of epsilon
    (Fortunato et al. 2018, arXiv 1706.10295). Evaluations play without noise."""
    noisy_std: float = 0.5
    """Initial size (sigma_0) of that noise, in units of one over the root of a layer's inputs."""
    memory: Literal["none", "lstm", "gru"] = "none"
    """Recurrent cell between the torso's dense layers and the head, which remembers what the agent saw in an episode
    (Hausknecht and Stone 2015, arXiv 1507.06527)."""
    memory_size: int = 128
    """Units of the recurrent cell."""
    convolution: Literal["auto", "patches", "native"] = "auto"
    """How convolutions are computed, with the same results.
    `patches` multiplies image patches by a matrix, and `native` is XLA's convolution.
    `auto` uses patches on CPU, and native convolutions elsewhere."""

    exploration: Literal["epsilon_greedy", "softmax"] | str = "epsilon_greedy"
    """How actions are explored. Softmax is Boltzmann exploration, with probabilities softmax(q / temperature).
    MODULE:NAME is an explorer of your own: a function of the agent's config that returns one like `epsilon_greedy`."""
    exploration_max_duration: int = 1
    """Longest time that a random action is repeated, in environment steps of its lane. Above 1 this is
    epsilon-z-greedy: epsilon is the probability that a repetition begins, and its length has a zeta distribution up to
    this limit (Dabney et al. 2021, arXiv 2006.01782)."""
    exploration_duration_exponent: float = 2.0
    """Exponent (mu) of that distribution: a length of n is as likely as n to the power of minus this."""
    exploration_start: float = 1.0
    """Epsilon (a probability) at the first step; for softmax, the temperature in units of discounted reward."""
    exploration_end: float = 0.05
    """Epsilon, or the temperature, once it has decayed."""
    exploration_schedule: Literal["linear", "exponential"] = "linear"
    """How epsilon, or the temperature, decays from start to end."""
    exploration_env_steps: int = 25_000
    """Environment steps that the decay takes, over all lanes.
    With a replay it begins after `warmup_env_steps`, and exploration stays at its start until then."""
    exploration_fraction: float | None = None
    """Share of the run's environment steps that the decay takes, in place of `exploration_env_steps`."""

    optimiser: str = "adam"
    """Name of any optimiser function in Optax, such as adam, adamw, radam, rmsprop, sgd or lion."""
    optimiser_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the optimiser function, such as `eps` or `nesterov`: numbers, flags or text."""
    learning_rate: float = 1e-3
    """Learning rate at the first learner step."""
    learning_rate_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """How the learning rate changes over `learning_rate_learner_steps`."""
    learning_rate_end_fraction: float = 0.0
    """Final learning rate as a fraction of the first. It must be above 0 with the exponential schedule."""
    learning_rate_learner_steps: int | None = 100_000
    """Learner steps that the learning rate's schedule takes. None means until the end of the run."""
    learning_rate_fraction: float | None = None
    """Share of the run's learner steps that the schedule takes, in place of `learning_rate_learner_steps`."""
    max_gradient_norm: float | None = 10.0
    """Largest global norm of a gradient; larger gradients are scaled down to it. None leaves gradients alone."""

    replay: Literal["uniform", "prioritised", "none"] = "uniform"
    """How transitions are drawn from the replay; `none` is Q(lambda), which has no replay.
    `prioritised` is proportional prioritisation (Schaul et al. 2016, arXiv 1511.05952)."""
    batch_size: int = 128
    """Transitions per learner step, over all replicas. It has no effect without replay."""
    replay_capacity: int = 100_000
    """Environment steps that the replay keeps, over all lanes."""
    warmup_env_steps: int = 1_000
    """Environment steps before the first learner step, over all lanes."""
    env_steps_per_learner_step: float = 10.0
    """Environment steps for each learner step, over all lanes. It means the same with any number of lanes."""
    target_update_period: int = None  # type: ignore[assignment]  # the constructor replaces None
    """Learner steps between updates of the target network: 500, unless `target_update_rate` is below 1.
    Then this must be given too."""
    target_update_rate: float = 1.0
    """Share of the online parameters in each update of the target network.
    With 1 they are copied; less than 1, with a period of 1, is Polyak averaging."""
    priority_exponent: float = 0.6
    """Exponent of priorities (alpha): 0 draws uniformly, 1 fully in proportion to the TD error."""
    importance_exponent_start: float = 0.4
    """Exponent of importance weights (beta) at the first step; 1 corrects the sampling bias in full."""
    importance_exponent_env_steps: int | None = 100_000
    """Environment steps over which the exponent of importance weights grows to 1. None means until the run ends."""
    importance_exponent_fraction: float | None = None
    """Share of the run's environment steps that this takes, in place of `importance_exponent_env_steps`."""
    burn_in: int = 0
    """With memory: rows before each sequence that only bring the memory up to date (Kapturowski et al. 2019)."""
    sequence_length: int = 80
    """With memory: rows of each sequence that are learned from. A batch has `batch_size` sequences."""
    sequence_period: int | None = None
    """With memory: rows of a lane from the start of one sequence to the start of the next. None means half of
    `sequence_length`, so that each row is learned from in two sequences."""
    priority_max_share: float = 0.9
    """With memory: weight of the greatest absolute TD error in the priority of a sequence; the mean has the rest."""
    importance_normalisation: Literal["none", "batch_max"] = "none"
    """Divide importance weights by nothing, or by the greatest one of each batch (Schaul et al. 2016, section 3.4).
    With `batch_max` they only ever make steps smaller, and a transition's weight depends on the rest of its batch."""

    rollout_length: int = 16
    """Q(lambda): environment steps per lane between two rounds of learning."""
    trace_decay: float = 0.65
    """Q(lambda): the value of lambda. 0 bootstraps after one step, 1 after the whole rollout."""
    num_epochs: int = 2
    """Q(lambda): passes over each rollout."""
    num_minibatches: int = 1
    """Q(lambda): learner steps per pass."""

    own_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of your own parts (MODULE:NAME), which read them from the agent's config: numbers, flags or text."""

    def __post_init__(self) -> None:
        has_period = self.target_update_period is not None
        if not has_period:
            object.__setattr__(self, "target_update_period", _TARGET_UPDATE_PERIOD)
        super().__post_init__()
        if not has_period and self.target_update_rate < 1 and self.replay != "none":
            raise ConfigError(
                f"target_update_period must be given too if target_update_rate is below 1, got target_update_rate="
                f"{self.target_update_rate} alone; give target_update_period=1 for Polyak averaging, or another period"
            )
        for name in ("discount", "target_update_rate"):
            check(0.0 < getattr(self, name) <= 1.0, name, "in (0, 1]", getattr(self, name))
        for name in (
            "trace_decay", "priority_exponent", "importance_exponent_start", "learning_rate_end_fraction",
            "munchausen_weight", "priority_max_share",
        ):  # fmt: skip
            check(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]", getattr(self, name))
        check_counts(
            self, "n_step", "batch_size", "replay_capacity", "target_update_period", "rollout_length", "num_epochs",
            "num_minibatches", "num_quantiles", "num_acting_quantiles", "num_cosines", "torso_width", "memory_size",
            "sequence_length", maximum=MAX_SIZE,
        )  # fmt: skip
        self._check_distribution()
        check(self.munchausen_clip <= 0, "munchausen_clip", "0 or below", self.munchausen_clip)
        if self.adaptive_pooling is not None:
            check_counts(self, "adaptive_pooling", maximum=MAX_SIZE)
        if self.learning_rate_learner_steps is not None:
            check_counts(self, "learning_rate_learner_steps", maximum=MAX_SIZE)
        if self.importance_exponent_env_steps is not None:
            check_counts(self, "importance_exponent_env_steps")
        for name in SHARES:
            share = getattr(self, name)
            check(share is None or 0.0 < share <= 1.0, name, "in (0, 1], or None", share)
        check_count("warmup_env_steps", self.warmup_env_steps, minimum=0)
        check_count("burn_in", self.burn_in, minimum=0, maximum=MAX_SIZE)
        if self.sequence_period is not None:
            check_count("sequence_period", self.sequence_period, maximum=self.sequence_length)
        if self.value_rescaling:
            check(not self.munchausen, "munchausen", "False with value_rescaling, which it isn't defined for", True)
        check_positive(
            self, "discount", "target_update_rate", "huber_delta", "learning_rate", "noisy_std",
        )  # fmt: skip
        check(
            self.munchausen_temperature >= 1e-8, "munchausen_temperature", "1e-08 or above", self.munchausen_temperature
        )
        check_positive(self, "max_gradient_norm", or_none=", or None to leave gradients alone")
        check(
            MIN_ENV_STEPS_PER_LEARNER_STEP <= self.env_steps_per_learner_step <= MAX_COUNT,
            "env_steps_per_learner_step", f"{MIN_ENV_STEPS_PER_LEARNER_STEP:g} to {MAX_COUNT}",
            self.env_steps_per_learner_step,
        )  # fmt: skip
        for i, size in enumerate(self.hidden_sizes):
            check_count(f"hidden_sizes[{i}]", size, maximum=MAX_SIZE)
        for name in ("network", "target"):
            value = getattr(self, name)
            check(value is None or is_own_name(value), name, "MODULE:NAME of a function, or None", value)
        self._check_exploration()
        if self.learning_rate_schedule == "exponential":
            check(
                self.learning_rate_end_fraction > 0,
                "learning_rate_end_fraction", "above 0 for an exponential schedule", self.learning_rate_end_fraction,
            )  # fmt: skip

    def _check_distribution(self) -> None:
        check_count("num_atoms", self.num_atoms, minimum=2, maximum=MAX_SIZE)
        check(self.value_min < self.value_max, "value_min and value_max", "in order", (self.value_min, self.value_max))
        spacing = (self.value_max - self.value_min) / (self.num_atoms - 1)
        least = 1e-6 * max(abs(self.value_min), abs(self.value_max))
        check(
            spacing > least, "the distance between two atoms",
            f"above {least:g}, or float32 can't tell them apart, with num_atoms={self.num_atoms}", spacing,
        )  # fmt: skip
        check_positive(self, "hl_gauss_smoothing", maximum=1e6)

    def _check_exploration(self) -> None:
        check_counts(self, "exploration_env_steps")
        check_counts(self, "exploration_max_duration", maximum=1_000_000)
        check_positive(self, "exploration_duration_exponent", maximum=100.0)
        highest = 1.0 if self.exploration == "epsilon_greedy" else MAX_FLOAT
        lowest_end = 0.0 if self.exploration_schedule == "linear" and self.exploration != "softmax" else 1e-8
        check(
            lowest_end <= self.exploration_end <= self.exploration_start <= highest,
            "exploration_end and exploration_start", f"in order within [{lowest_end:g}, {highest:g}]",
            (self.exploration_end, self.exploration_start),
        )  # fmt: skip

    @property
    def learns_sequences(self) -> bool:
        """Whether a batch has sequences in place of transitions: an agent with a memory learns so from a replay."""
        return self.memory != "none" and self.replay != "none"

    @property
    def rows_per_start(self) -> int:
        """Rows of a lane from the start of one transition, or of one sequence, to the start of the next."""
        return (self.sequence_period or max(1, self.sequence_length // 2)) if self.learns_sequences else 1

    @property
    def rows_after_start(self) -> int:
        """Rows that must follow the first one of a transition, or of a sequence, before it can be learned from."""
        return self.burn_in + self.sequence_length + self.n_step - 1 if self.learns_sequences else self.n_step

    @property
    def exploration_begins(self) -> int:
        """Environment steps after which exploration begins to decay: those of the warm-up, as in Mnih et al. 2015."""
        return 0 if self.replay == "none" else self.warmup_env_steps

    @property
    def replay_ratio(self) -> float:
        """Number of times that each environment step is learned from, on average."""
        if self.replay == "none":
            return float(self.num_epochs)
        num_learned = self.sequence_length if self.learns_sequences else 1
        return self.batch_size * num_learned / self.env_steps_per_learner_step
