"""The choice of preset and settings where the user names no preset."""

import dataclasses

import gymnasium
import numpy as np
import pytest

import qfleet
from qfleet import defaults
from qfleet.cli.train_command import parse
from qfleet.config import TOPOLOGIES, ConfigError
from qfleet.core.types import EnvSpec
from qfleet.envs.host import HostEnv, HostStep, LaneOptions
from qfleet.presets import ON_ATARI, PRESETS, TUNED, make_config, make_explained_config


def spec_of(shape: tuple[int, ...], dtype: str, frame_stack: int = 1) -> EnvSpec:
    return EnvSpec(
        name="any", observation_shape=shape, observation_dtype=np.dtype(dtype), num_actions=2, frame_stack=frame_stack
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "family"),
    [
        ((4,), "float32", "vectors"),
        ((128,), "uint8", "vectors"),
        ((10, 5), "float32", "vectors"),
        ((5, 5), "float32", "vectors"),
        ((16,), "bool", "states"),
        ((10, 10, 4), "bool", "small images"),
        ((7, 7, 3), "uint8", "small images"),
        ((16, 16, 3), "uint8", "small images"),
        ((16, 17, 3), "uint8", "medium images"),
        ((32, 64, 4), "bool", "medium images"),
        ((2, 2, 2), "float32", "vectors"),
        ((84, 84), "uint8", "pixels"),
        ((96, 96, 3), "uint8", "pixels"),
        ((4, 84, 84), "uint8", "pixels"),
        ((210, 160, 3), "uint8", "pixels"),
    ],
    ids=str,
)
def test_what_an_environment_shows_decides_its_family(shape, dtype, family):
    assert defaults.family_of(spec_of(shape, dtype)) == family


def test_stacked_frames_make_an_image():
    assert defaults.family_of(spec_of((84, 84), "uint8", frame_stack=4)) == "pixels"


ENVS = [
    "CartPole-v1",
    "MountainCar-v0",
    "gym:CartPole-v1",
    "gym:MountainCar-v0",
    "FrozenLake-v1",
    "gymnax:Asterix-MinAtar",
    "gymnax:DeepSea-bsuite",
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("env", ENVS)
def test_every_topology_accepts_the_default(env, topology):
    config, reason = make_explained_config(env, None, topology)
    config.topology.check_agent(config.agent)
    assert config.topology.name == topology and config.preset in PRESETS and reason


def test_a_topology_that_learns_while_others_act_gets_a_replay_and_says_why():
    config, reason = make_explained_config("gymnax:Asterix-MinAtar", None, "actor-learner")
    assert config.agent.replay != "none" and "actor-learner needs a replay" in reason
    assert make_config("gymnax:Asterix-MinAtar").agent.replay == "none"
    assert make_config("CartPole-v1", topology="parameter-server").agent.replay != "none"


def test_settings_tuned_for_the_environment_win():
    config, reason = make_explained_config("CartPole-v1")
    assert (
        config == make_config("CartPole-v1", "pqn") and reason == "chosen because this preset is tuned for CartPole-v1"
    )
    for env in ("Acrobot-v1", "MountainCar-v0", "gymnax:Breakout-MinAtar"):
        assert make_config(env) == make_config(env, next(preset for preset, name in TUNED if name == env))


def test_the_users_settings_win_over_the_chosen_ones():
    config = make_config("FrozenLake-v1", hidden_sizes=(8,), env_steps=20_000, exploration_env_steps=6_000)
    assert config.agent.hidden_sizes == (8,) and config.env_steps == 20_000


@pytest.mark.parametrize("env", ["FrozenLake-v1", "gym:CartPole-v1", "LunarLander-v3", "CartPole-v1", "ale:Pong"])
def test_a_short_trial_run_learns_and_explores_within_its_length(env):
    config = make_config(env, env_steps=2_000)
    if config.agent.replay != "none":
        assert config.agent.warmup_env_steps <= 200 and config.num_learner_steps > 0
    assert config.agent.exploration_env_steps <= 800
    assert make_config(env).agent.exploration_env_steps > 800


def test_the_same_choice_is_made_each_time():
    for env in ("gym:MountainCar-v0", "gym:Acrobot-v1", "gym:CartPole-v1"):
        assert make_explained_config(env) == make_explained_config(env)


def test_an_environment_whose_random_play_pays_the_same_is_explored_for_longer():
    config, reason = make_explained_config("gym:MountainCar-v0")
    assert config.agent.exploration_env_steps == defaults.SEEN["no signal"][1]["exploration_env_steps"]
    assert "random play pays the same" in reason
    falls, reason = make_explained_config("gym:CartPole-v1")  # it pays the same too, but ends
    assert falls.agent.exploration_env_steps < config.agent.exploration_env_steps and "random" not in reason


class Lanes:
    """One lane that pays what it is told, and terminates or fails at a step."""

    def __init__(self, rewards=(0.0,), terminates_at=None, fails_at=None):
        self.rewards, self.terminates_at, self.fails_at = rewards, terminates_at, fails_at
        self.actions: list[int] = []
        self.is_closed = False

    def reset(self, seed):
        return np.zeros((1, 3), np.float32)

    def send(self, action):
        self.actions.append(int(action[0]))

    def recv(self):
        step = len(self.actions)
        if step == self.fails_at:
            raise qfleet.RunFailed("it broke", learner_is_sound=True)
        none = np.zeros(1, bool)
        reward = np.array([self.rewards[step % len(self.rewards)]], np.float32)
        return HostStep(np.zeros((1, 3), np.float32), reward, np.array([step == self.terminates_at]), none, none)

    def close(self):
        self.is_closed = True


def env_of(lanes: Lanes) -> HostEnv:
    def make_lanes(num_lanes: int, options: LaneOptions) -> Lanes:
        assert num_lanes == 1
        return lanes

    return HostEnv(spec_of((3,), "float32"), make_lanes, make_lanes)


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        (Lanes(), "no signal"),
        (Lanes(rewards=(-1.0,)), "no signal"),
        (Lanes(rewards=(0.0,) * 100 + (1.0,)), None),
        (Lanes(terminates_at=200), None),
        (Lanes(fails_at=7), None),
    ],
)
def test_random_play_sees_whether_actions_make_a_difference_and_closes_its_environment(lanes, expected):
    assert defaults.seen_in_random_play(env_of(lanes)) == expected
    assert lanes.is_closed and len(lanes.actions) <= defaults.RANDOM_PLAY_STEPS
    assert len(set(lanes.actions)) == 2


def test_an_environment_for_worker_processes_is_not_played_in_this_one(monkeypatch):
    monkeypatch.setattr(defaults, "seen_in_random_play", None)
    assert make_config("gym:MountainCar-v0", num_env_workers=1).agent.replay != "none"


def test_random_play_in_a_slow_environment_is_given_up(monkeypatch):
    monkeypatch.setattr(defaults, "RANDOM_PLAY_SECONDS", -1.0)
    lanes = Lanes()
    assert defaults.seen_in_random_play(env_of(lanes)) == "slow" and len(lanes.actions) == 2
    monkeypatch.setattr(defaults, "make_env", lambda name: env_of(Lanes()))
    config, reason = make_explained_config("Slow-v0")
    assert config.env_steps <= 20_000 and config.agent.exploration_env_steps < config.env_steps and "slow" in reason


@pytest.mark.parametrize(
    ("can_be_sent", "may_start_processes", "given", "num_env_workers"),
    [
        (True, True, {}, 3),
        (True, True, {"num_envs": 2}, 2),
        (True, True, {"num_env_workers": 0}, 0),
        (True, True, {"topology": "actor-learner"}, 0),
        (True, False, {}, 0),
        (False, True, {}, 0),
    ],
)
def test_a_slow_environment_is_stepped_by_worker_processes_where_it_can_be(
    monkeypatch, can_be_sent, may_start_processes, given, num_env_workers
):
    def make_lanes(num_lanes: int, options: LaneOptions) -> Lanes:
        if options.num_env_workers and not can_be_sent:
            raise ConfigError("environment Slow-v0 must be one that can be sent to worker processes")
        return Lanes()

    monkeypatch.setattr(defaults, "RANDOM_PLAY_SECONDS", -1.0)
    monkeypatch.setattr(defaults, "num_cores", lambda: 3)
    monkeypatch.setattr(defaults, "make_env", lambda name: HostEnv(spec_of((3,), "float32"), make_lanes, make_lanes))
    config, _ = make_explained_config("Slow-v0", may_start_processes=may_start_processes, **given)
    assert config.topology.lane_options.num_env_workers == num_env_workers


def test_no_environment_is_made_if_the_preset_is_named(monkeypatch):
    monkeypatch.setattr(defaults, "make_env", None)
    make_config("LunarLander-v3", "double_dqn")
    make_config("ale:Pong", "dqn")


def test_an_environment_that_cannot_be_made_gets_a_default_and_the_run_says_what_is_wrong():
    config, reason = make_explained_config("NoSuchEnvironment-v0")
    assert config.agent.replay != "none" and "nothing is known" in reason
    with pytest.raises(ConfigError, match="no environment is named"):
        qfleet.iterate(config)


def test_options_are_passed_on_to_the_environment():
    env_options = {"max_episode_steps": 50}
    config, _ = make_explained_config("gym:MountainCar-v0", env_options=env_options)
    assert config.env_options == env_options


def test_a_replay_of_large_pixels_keeps_fewer_of_them(monkeypatch):
    sizes = {}
    for shape, dtype in (((84, 84), "uint8"), ((96, 96, 3), "uint8"), ((96, 96, 3), "float32")):
        env = env_of(Lanes())._replace(spec=spec_of(shape, dtype))
        monkeypatch.setattr(defaults, "make_env", lambda name, env=env: env)
        config = make_config("Pixels-v0")
        agent = config.agent
        assert config.eval_exploration == 0
        sizes[shape, dtype] = agent.replay_capacity
        assert agent.replay_capacity * np.prod(shape) * np.dtype(dtype).itemsize <= defaults.PIXEL_BYTES
        assert agent.warmup_env_steps <= agent.replay_capacity / 2
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True) and max(sizes.values()) == 1_000_000


def test_a_replay_of_states_keeps_all_steps_of_a_run_that_find_room(monkeypatch):
    def agent_with(num_states):
        env = env_of(Lanes())._replace(spec=spec_of((num_states,), "bool"))
        monkeypatch.setattr(defaults, "make_env", lambda name: env)
        monkeypatch.setattr(defaults, "shows_one_state", lambda env: True)
        return make_config("States-v0").agent

    assert agent_with(16).replay_capacity == make_config("States-v0").env_steps
    assert agent_with(5_000).replay_capacity * 5_000 == defaults.STATE_BYTES
    assert agent_with(10**8).replay_capacity == 1_000 and agent_with(10**8).warmup_env_steps == 500


# --- The command line ---


def test_the_command_line_chooses_by_environment_and_topology():
    request = parse(["gym:MountainCar-v0"])
    assert request.config == make_config("gym:MountainCar-v0") and "random play" in request.reason
    assert parse(["--seed", "3", "FrozenLake-v1"]).config.preset == make_config("FrozenLake-v1").preset
    assert parse(["CartPole-v1", "--topology", "parameter-server"]).config.agent.replay != "none"
    assert parse(["CartPole-v1", "--preset", "dqn"]).reason == ""


# --- Published means published ---


@pytest.mark.parametrize("preset", ["dqn", "double_dqn", "rainbow_lite", "c51", "rainbow"])
def test_on_atari_the_names_of_papers_bring_the_papers_settings(preset):
    config, toy = make_config("ale:Pong", preset), make_config("CartPole-v1", preset)
    agent = config.agent
    assert (agent.torso, agent.hidden_sizes, agent.batch_size) == ("nature", (512,), 32)
    assert (agent.replay_capacity, agent.env_steps_per_learner_step) == (1_000_000, 4.0)
    assert toy.agent.torso == "auto" and toy.agent.replay_capacity <= 100_000
    assert config.eval_exploration == (0.05 if preset in ("dqn", "double_dqn") else 0.001) and toy.eval_exploration == 0
    assert preset in ON_ATARI and agent.double == (preset not in ("dqn", "c51"))
    assert make_config("ale:Pong", "dqn").agent == make_config("ale:Pong", "atari_dqn").agent


def test_atari_pqn_keeps_its_learning_rate():
    assert make_config("ale:Pong", "atari_pqn").agent.learning_rate_schedule == "constant"


def test_rainbow_lite_draws_as_rainbow_does_and_corrects_in_full_when_the_run_ends():
    config = make_config("LunarLander-v3", "rainbow_lite", env_steps=77_000)
    assert config.agent.priority_exponent == 0.5
    assert config.agent.importance_exponent_env_steps is None
    assert config.with_schedule_lengths().agent.importance_exponent_env_steps == 77_000


def test_ape_x_has_squared_errors_and_no_ratio_of_360_actors():
    on_atari, elsewhere = make_config("ale:Pong", "ape_x"), make_config("CartPole-v1", "ape_x")
    for config in (on_atari, elsewhere):
        assert config.agent.loss == "squared" and config.agent.max_gradient_norm == 40.0
        assert config.topology.name == "actor-learner"
        assert config.agent.replay_ratio >= 8
    assert on_atari.env_steps == 50_000_000
    assert on_atari.eval_exploration == 0.001 and elsewhere.eval_exploration == 0
    assert elsewhere.env_steps <= 1_000_000 and elsewhere.agent.warmup_env_steps < 10_000


def test_toy_text_is_one_family():
    small, large, taxi = (make_config(env).agent for env in ("FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v4"))
    assert small == large == dataclasses.replace(taxi, replay_capacity=small.replay_capacity)
    assert "Taxi-v4" in gymnasium.registry


def test_flags_of_several_parts_are_no_state_of_a_table():
    assert make_config("FrozenLake-v1").agent.hidden_sizes == ()
    config, reason = make_explained_config("Blackjack-v1")  # the sum, the dealer's card and the ace, each one-hot
    assert config.agent.hidden_sizes and "vectors" in reason


def test_an_unknown_preset_is_still_refused():
    with pytest.raises(ConfigError, match="preset must be one of"):
        make_config("CartPole-v1", "auto")
