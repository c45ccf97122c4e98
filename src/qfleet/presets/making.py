"""The config of a run, from a preset, the settings tuned for an environment, and those that the caller gives."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qfleet.config import TOPOLOGIES, AgentConfig, ConfigError, LaneOptions, TrainConfig, suggest
from qfleet.config.errors import RAISED_BY_USERS
from qfleet.config.new_run import check_new_run, settings_without_effect
from qfleet.config.topologies import check_suits, check_topology_name, suits, without_alias
from qfleet.config.values import to_plain
from qfleet.defaults import Choice, accepts, adapted, choose, family_of, is_atari
from qfleet.envs.factory import name_of_factory
from qfleet.envs.names import is_of_suite
from qfleet.envs.registry import default_topology, make_env
from qfleet.presets.atari import ON_ATARI
from qfleet.presets.named import OFF_ATARI, PRESETS
from qfleet.presets.tuned import TUNED


def make_config(
    env: str | Callable[..., Any], preset: str | None = None, topology: str | None = None, **settings: Any
) -> TrainConfig:
    """Returns the config of `preset` for `env`. `settings` replace the tuned ones, and those replace the preset's.

    Args:
      env: name of an environment, or a function or class that makes it, which runs record as `factory:` and its name.
      preset: one of `PRESETS`. By default, preset and settings are chosen for the environment and the topology, see
        `qfleet.defaults`. The environment is made for this, and one outside JAX may be played for a moment.
      topology: one of `qfleet.config.TOPOLOGIES`; by default the one that suits the environment.
      **settings: any field of `AgentConfig`, of the topology's config, or of `TrainConfig`.

    Raises:
      ConfigError: if the preset, the topology or a field is unknown, or a value breaks its rule.
    """
    name = env if isinstance(env, str) else name_of_factory(env)
    return make_explained_config(name, preset, topology, **settings)[0]


def make_explained_config(
    env: str,
    preset: str | None = None,
    topology: str | None = None,
    *,
    may_start_processes: bool = False,
    **settings: Any,
) -> tuple[TrainConfig, str]:
    """Returns the config that `make_config` returns, and what to say of its preset: why it was chosen, or how it was
    adapted to the environment. It is "" if there is nothing to say.

    With `may_start_processes`, worker processes may be chosen for an environment that is slow. The main module must
    then be one that they can import again, as the command line's is.
    """
    env, preset, topology = (
        to_plain(kind, value, name)
        for kind, value, name in ((str, env, "env"), (str | None, preset, "preset"), (str | None, topology, "topology"))
    )
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.{suggest(preset, PRESETS)}")
    topology = without_alias(topology, settings.pop("exchange", None))
    options = to_plain(Mapping[str, Any], settings.get("env_options", {}), "env_options")
    if topology is None:
        topology = (preset and PRESETS[preset].topology) or default_topology(env, **options)
    check_topology_name(topology)
    if preset is None:
        # One that is to be stepped in processes of its own may hang or crash in this one.
        may_play = not settings.get("num_env_workers")
        may_start_processes &= "num_env_workers" not in settings
        preset, chosen, why = _choose(env, topology, options, may_play, may_start_processes)
        reason = f"chosen because {why}"
        env_steps, num_envs = (to_plain(int | None, settings.get(name), name) for name in ("env_steps", "num_envs"))
        found = adapted({**PRESETS[preset].settings, **chosen}, env_steps, num_envs)
    else:
        _check_pixels(preset, env, options)
        found = {**PRESETS[preset].settings, **_settings_for(preset, env)}
        is_adapted = preset in OFF_ATARI and not is_atari(env)
        reason = "with our settings for small problems, because the published ones are for Atari" if is_adapted else ""
    merged = {**_starts_from({**_evaluation_of(env), **found}, topology, settings), **settings}
    return _assemble(env, preset, topology, settings, merged), reason


def _settings_for(preset: str, env: str) -> Mapping[str, Any]:
    """Returns the settings that replace those of a preset in this environment."""
    if preset not in (*ON_ATARI, *OFF_ATARI):
        return TUNED.get((preset, env), {})
    return {**(ON_ATARI if is_atari(env) else OFF_ATARI).get(preset, {}), **TUNED.get((preset, env), {})}


def _check_pixels(preset: str, env: str, env_options: Mapping[str, Any]) -> None:
    """Checks that a preset whose sizes are meant for Atari is used with pixels.

    An environment that can't be made here isn't checked: the run makes it, and reports what is wrong.

    Raises:
      ConfigError: if it isn't.
    """
    if not PRESETS[preset].for_pixels or is_atari(env):
        return
    if is_of_suite(env):  # whose environments are not made here, see `choose`; none shows such pixels
        shown = ""
    else:
        try:
            spec = make_env(env, **env_options).spec
        except RAISED_BY_USERS:
            return
        if family_of(spec) == "pixels":
            return
        shown = f", with observations of shape {spec.agent_observation_shape}"
    other = preset.removeprefix("atari_")
    raise ConfigError(
        f"env must show pixels as Atari does with preset {preset}, got {env}{shown}; choose preset {other}, whose "
        f"sizes suit it better"
    )


def _choose(
    env: str, topology: str, env_options: Mapping[str, Any], may_play: bool, may_start_processes: bool
) -> Choice:
    """Returns the preset with settings tuned for this very environment, if there is one, or the one for its family."""
    for (preset, name), tuned in TUNED.items():
        replay = PRESETS[preset].settings.get("replay", "uniform")
        if name == env and accepts(topology, replay=replay):
            return Choice(preset, tuned, f"this preset is tuned for {env}")
    choice = choose(env, topology, env_options, may_play=may_play, may_start_processes=may_start_processes)
    return choice._replace(settings={**_settings_for(choice.preset, env), **choice.settings})


def _assemble(env: str, preset: str, topology: str, given: Mapping[str, Any], merged: Mapping[str, Any]) -> TrainConfig:
    """Returns the config with the `merged` settings, after checking the names of those that the caller has given."""
    kinds = (AgentConfig, TOPOLOGIES[topology], TrainConfig)
    names = {kind.__name__: {field.name for field in dataclasses.fields(kind)} for kind in kinds}
    known = set.union(*names.values()) - {"agent", "topology", "env", "preset"}
    for name in given:
        check_suits(name, topology)
    for name in merged:
        if name not in known:
            raise ConfigError(
                f"settings must be fields of a config with topology {topology}, got {name!r}.{suggest(name, known)}"
            )

    def settings_of(kind: type) -> dict[str, Any]:
        return {name: value for name, value in merged.items() if name in names[kind.__name__]}

    config = TrainConfig(
        env=env,
        preset=preset,
        agent=AgentConfig(**settings_of(AgentConfig)),
        topology=TOPOLOGIES[topology](**settings_of(TOPOLOGIES[topology])),
        **settings_of(TrainConfig),
    )
    check_new_run(config)
    check_lane_options(config)
    return config


def check_lane_options(config: TrainConfig) -> None:
    """Checks that how an environment is stepped has its defaults if it is part of the compiled program.

    Raises:
      ConfigError: if it hasn't.
    """
    topology, usual = vars(config.topology), vars(type(config.topology)())
    names = [*(field.name for field in dataclasses.fields(LaneOptions)), "lock_step"]
    changed = [name for name in names if topology.get(name) != usual.get(name)]
    if not changed or "in-graph" not in config.topology.environment_kinds:
        return
    if default_topology(config.env, **config.env_options) == "fused":
        raise ConfigError(
            f"{changed[0]} must be left out in {config.env}, which is written in JAX and part of the compiled program, "
            f"got {topology[changed[0]]}; leave it out"
        )


def _evaluation_of(env: str) -> Mapping[str, Any]:
    """Returns how evaluations play: with a few random actions in MinAtar, in octax and on Atari, otherwise greedily.

    These games are deterministic or nearly so. MinAtar's Breakout has two beginnings and its Space Invaders one, so a
    greedy policy plays one or two episodes again and again. One action in a thousand is random, as in evaluations on
    Atari since van Hasselt et al. 2016; `atari_dqn` keeps the 5% of Mnih et al. 2015.
    """
    return {"eval_exploration": 0.001} if env.endswith("-MinAtar") or env.startswith("octax:") or is_atari(env) else {}


def _starts_from(found: Mapping[str, Any], topology: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preset's and the tuned settings, without those that have no effect beside the given ones."""
    dropped = set(settings_without_effect({**found, **settings}, TOPOLOGIES[topology]))
    rate = to_plain(float, settings.get("target_update_rate", 1.0), "target_update_rate")
    if rate < 1 and found.get("target_update_period") != 1:
        dropped.add("target_update_period")  # it is meant for whole copies, and would make a smaller rate too slow
    return {name: value for name, value in found.items() if name not in dropped and suits(name, topology)}
