"""What the literature says about a run's settings. Only what follows from the given settings is said."""

from qfleet.config import TrainConfig
from qfleet.planning.prediction import Advice

_FU = "Fu et al. 2025, arXiv 2508.14881"
_DORO = "D'Oro et al. 2023, 'Sample-efficient reinforcement learning by breaking the replay ratio barrier', ICLR"
_GALLICI = "Gallici et al. 2024, arXiv 2407.04811"
_STOOKE = "Stooke and Abbeel 2018, arXiv 1803.02811"

_SMALL_PARAMS = 50_000
_LARGE_BATCH = 1024


def advice_for(config: TrainConfig, num_params: int) -> tuple[Advice, ...]:
    """Returns what the literature says about a run's settings.

    Args:
      config: of the run.
      num_params: number of parameters of its network.
    """
    agent, num_lanes = config.agent, config.topology.num_envs
    found = []
    if agent.replay != "none" and agent.batch_size >= _LARGE_BATCH and num_params <= _SMALL_PARAMS:
        found.append(
            Advice(
                text=f"batch_size {agent.batch_size} is large for a network of {num_params:,} parameters: small "
                f"networks' values become less accurate with large batches. Try a wider network or a smaller batch",
                source=_FU,
            )
        )
    if agent.replay != "none" and agent.env_steps_per_learner_step < 1:
        found.append(
            Advice(
                text=f"{1 / agent.env_steps_per_learner_step:g} learner steps for each environment step: standard "
                f"agents gain little from more than one, unless parameters are reset now and then",
                source=_DORO,
            )
        )
    if agent.replay == "none" and agent.rollout_length > 4 * num_lanes:
        found.append(
            Advice(
                text=f"rollouts of {agent.rollout_length} steps in {num_lanes} lanes: without a replay, it is samples "
                f"of many lanes at once that keep learning stable. Try more lanes and shorter rollouts",
                source=_GALLICI,
            )
        )
    if agent.replay != "none" and num_lanes > agent.batch_size * 8:
        found.append(
            Advice(
                text=f"{num_lanes} lanes with a batch_size of {agent.batch_size}: batches considerably larger than "
                f"usual have cost agents with many lanes neither samples nor returns. Try a larger one",
                source=_STOOKE,
            )
        )
    return tuple(found)
