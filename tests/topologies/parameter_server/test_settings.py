"""Settings of the parameter server that are refused."""

import dataclasses

import pytest
from small_servers import config_of, learner_of

import qfleet
from qfleet.config import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": "none"}, "replay must be uniform or prioritised with topology parameter-server.*got none"),
        ({"num_replay_shards": 5}, "num_replay_shards must be at most num_workers=4, got 5"),
        ({"gradient_dtype": "float16"}, "gradient_dtype must be one of float32, bfloat16, got 'float16'"),
        ({"max_staleness": -1}, "max_staleness must be a whole number, at least 0, got -1"),
        ({"max_loss_deviations": 0.0}, "max_loss_deviations must be positive, or None, got 0.0"),
        (
            {"replay": "prioritised", "importance_normalisation": "batch_max", "gradients_per_learner_step": 2},
            "importance_normalisation must be none with gradients_per_learner_step=2, .* got batch_max",
        ),
        ({"num_envs": 8}, "num_envs must come with topology fused.*got topology parameter-server"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


def test_an_optimiser_that_needs_the_whole_network_is_refused_in_pieces(tmp_path):
    config = config_of(optimiser="lamb", num_server_shards=2, run_dir=str(tmp_path / "run"))
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="num_server_shards must be 1 with .*got num_server_shards=2 and .*lamb"):
        qfleet.iterate(config)
    assert not (tmp_path / "run").exists()
    learner_of(dataclasses.replace(config, topology=dataclasses.replace(config.topology, num_server_shards=1)))
