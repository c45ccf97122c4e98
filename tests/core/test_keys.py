"""No two purposes share a random number."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import probes
import pytest

import qfleet
from qfleet.config import AgentConfig, FusedConfig, TrainConfig
from qfleet.core.keys import Stream, key_of
from qfleet.core.player import make_player
from qfleet.envs.host import seed_of
from qfleet.policy import Policy
from qfleet.runtime.episodes import play
from qfleet.topologies.fused.topology import Fused

PACKAGE = Path(qfleet.__file__).parent
SEEDS = (0, 1, 7, 2**32 - 1)

Key = tuple[int, ...]


def as_numbers(key: jax.Array) -> Key:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_the_streams_of_a_few_seeds_have_keys_of_their_own() -> None:
    """They also differ from the key of the seed itself, which a user may use elsewhere."""
    keys = [as_numbers(key_of(seed, stream)) for seed in SEEDS for stream in Stream]
    keys += [as_numbers(jax.random.key(seed)) for seed in SEEDS]
    assert len(set(keys)) == len(keys) == len(SEEDS) * (len(Stream) + 1)


def test_the_keys_of_different_paths_differ() -> None:
    paths = [(seed, stream, *rest) for seed in (0, 1) for stream in Stream for rest in [(), (0,), (1,), (0, 0), (0, 1)]]
    assert len({as_numbers(key_of(*path)) for path in paths}) == len(paths)


def test_the_seeds_of_environments_outside_jax_differ_by_stream() -> None:
    seeds = {seed_of(seed, stream, number) for seed in SEEDS for stream in Stream for number in range(8)}
    assert len(seeds) == len(SEEDS) * len(Stream) * 8


def test_nothing_starts_from_the_key_of_a_seed_itself() -> None:
    """JAX's `split(key(seed), n)[i]` is the key of stream i, so code that started there would reuse its numbers."""
    for i, key in enumerate(jax.random.split(jax.random.key(5), len(Stream))):
        assert as_numbers(key) == as_numbers(key_of(5, Stream(i)))
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = {name for name, source in sources.items() if re.search(r"random\.(PRNG)?[kK]ey\((?!0\))", source)}
    assert found == {"core/keys.py", "envs/conformance.py"}  # the latter checks environments, outside any run


class Spy:
    """Notes every key that reaches an environment, or the network that learns in it."""

    def __init__(self) -> None:
        self._seen: set[Key] = set()
        env = probes.random_walk(frame_stack=1)
        network = probes.linear_network(env.spec)
        self.env = env._replace(
            reset=lambda key: self._noted(key, env.reset(key)),
            step=lambda state, action, key: self._noted(key, env.step(state, action, key)),
            render=lambda state, observation: np.zeros((4, 6, 3), np.uint8),
        )
        self.network = network._replace(init=lambda key: self._noted(key, network.init(key)))

    def _noted(self, key: jax.Array, result: Any) -> Any:
        jax.debug.callback(lambda data: self._seen.add(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return result

    def take(self) -> set[Key]:
        """Returns the keys seen since it was last called."""
        jax.effects_barrier()
        taken, self._seen = self._seen, set()
        return taken


@pytest.mark.parametrize("seed", [0, 3])
def test_a_policy_is_evaluated_by_keys_that_its_run_has_not_used(seed: int) -> None:
    """Evaluated and filmed with the run's own seed, it plays no episode that the run has played."""
    spy = Spy()
    agent = AgentConfig(replay="none", num_epochs=1, num_minibatches=1)
    config = TrainConfig(env="spied", agent=agent, topology=FusedConfig(num_envs=4), seed=seed, eval_episodes=3)
    run = Fused(config, spy.env, spy.network)
    run.start()
    run.advance(run.env_steps_per_iteration)
    trained = spy.take()
    run.evaluate(3)
    evaluated = spy.take()
    policy = Policy(spy.env, spy.network, run.params, "policy")
    policy.evaluate(3, seed)
    scored = spy.take()
    for moments in play(spy.env, make_player(spy.network), policy.params, 3, seed):
        list(moments)
    filmed = spy.take()
    assert min(map(len, (trained, evaluated, scored))) > 3
    assert not (trained & evaluated or trained & scored or evaluated & scored)
    assert filmed <= scored  # which plays on, in lanes whose episode has ended, until the last one has
