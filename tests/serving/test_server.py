"""A policy's server, asked over HTTP: it answers as the policy does, and refuses what it can't answer."""

import contextlib
import dataclasses
import http.client
import io
import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.masks import masked
from qfleet.core.types import Network
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.policy import Policy
from qfleet.runtime.web_address import WebAddress

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from qfleet.serving.engine import Engine
from qfleet.serving.limits import ServingLimits
from qfleet.serving.messages import ARRAYS, JSON
from qfleet.serving.server import PolicyServer

OBS = np.array([[0.0, 0.1, 0.2, 0.3], [0.0, -0.1, -0.2, -0.3], [1.0, 0.0, 0.0, 0.0]], np.float32)


def linear_policy(weight: float = 1.0, label: str = "mine", env: str = "CartPole-v1") -> Policy:
    """Returns a policy whose value of action 1 is `weight` times the observation's second number, and of 0 is 0."""

    def apply(params: Any, obs: jax.Array) -> jax.Array:
        flat = obs.reshape(len(obs), -1).astype(jnp.float32)
        return jnp.stack([0 * flat[:, 1], params * flat[:, 1]], axis=-1)

    return Policy(make_env(env), Network(lambda key: 0.0, apply), jnp.float32(weight), label)


class Client:
    """Asks a server that runs in another thread."""

    def __init__(self, server: PolicyServer, address: WebAddress) -> None:
        self.server, self.address = server, address

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.address.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def act(self, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
        status, body = self.ask("POST", "/act", json.dumps(fields).encode(), {"Content-Type": JSON, **(headers or {})})
        return status, json.loads(body)

    def measure(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def serving(load: Callable[[], Policy], host: str = "127.0.0.1", **limits: Any) -> Iterator[Client]:
    address = WebAddress(host, 0, "a server")
    server = PolicyServer(load, address, ServingLimits(**{"max_batch": 8, "max_sessions": 3, **limits}))
    running = server.server()
    thread = threading.Thread(target=lambda: running.run(sockets=[address.socket]))
    thread.start()
    try:
        client = Client(server, address)
        yield client
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(linear_policy) as client:
        yield client


def test_it_answers_what_the_policy_says_in_json_and_in_arrays(client: Client) -> None:
    policy = linear_policy()
    status, answer = client.act(observations=OBS.tolist(), q_values=True)
    assert status == 200 and answer["actions"] == policy(OBS).tolist() == [1, 0, 0]
    np.testing.assert_array_equal(np.array(answer["q_values"], np.float32), policy.q_values(OBS))
    assert answer["checkpoint"] == "mine"
    buffer = io.BytesIO()
    np.savez(buffer, observations=OBS, q_values=np.array(True))
    status, body = client.ask("POST", "/act", buffer.getvalue(), {"Content-Type": ARRAYS})
    arrays = np.load(io.BytesIO(body))
    assert status == 200 and arrays["actions"].tolist() == [1, 0, 0] and str(arrays["checkpoint"]) == "mine"
    np.testing.assert_array_equal(arrays["q_values"], policy.q_values(OBS))


def test_it_says_what_it_takes_and_how_it_is(client: Client) -> None:
    status, body = client.ask("GET", "/policy")
    about = json.loads(body)
    assert status == 200 and about["environment"] == "CartPole-v1" and about["observation_shape"] == [4]
    assert about["num_actions"] == 2 and not about["takes_sessions"] and about["max_batch"] == 8
    assert json.loads(client.ask("GET", "/healthz")[1]) == {"status": "ok", "checkpoint": "mine"}
    before = client.measure("qfleet_observations_total")
    client.act(observations=OBS.tolist())
    assert client.measure("qfleet_observations_total") == before + 3
    assert client.measure('qfleet_requests_total{path="/act",status="200"}') >= 1


BAD = {
    "observations must be a batch": {"observations": [0.0, 0.0, 0.0, 0.0]},
    "must have shape": {"observations": [[0.0, 0.0]]},
    "must be a list in which all entries have one shape": {"observations": [[0.0, 0.0, 0.0, 0.0], [0.0]]},
    "must be finite": {"observations": [[0.0, 0.0, 0.0, float("nan")]]},
    "made of numbers": {"observations": [["a", "b", "c", "d"]]},
    "must have the field `observations`": {"q_values": True},
    "Did you mean observations": {"observation": OBS.tolist()},
    "q_values must be true or false": {"observations": OBS.tolist(), "q_values": 1},
    "takes no sessions": {"observations": OBS.tolist(), "sessions": ["a", "b", "c"]},
    "no action masks": {"observations": OBS.tolist(), "mask": [[1, 1]] * 3},
    "names of 1 to 200 characters": {"observations": OBS.tolist(), "sessions": [1, 2, 3]},
}


@pytest.mark.parametrize("words", BAD)
def test_what_it_cannot_answer_is_refused_with_the_reason(words: str, client: Client) -> None:
    status, answer = client.act(**BAD[words])
    assert status == 400 and words in answer["error"]


def test_limits_are_kept_and_said() -> None:
    with serving(linear_policy, max_request_bytes=500, max_observations_per_second=10.0) as client:
        status, answer = client.act(observations=[[0, 0, 0, 0]] * 9)
        assert status == 413 and "at most 8 observations" in answer["error"]
        status, answer = client.act(observations=[[0, 0, 0, 0]] * 100)
        assert status == 413 and "at most 500 bytes" in answer["error"]
        statuses = [client.act(observations=[[0, 0, 0, 0]] * 8)[0] for _ in range(3)]
        assert statuses[0] == 200 and statuses[2] == 429
        assert client.ask("POST", "/act", b"", {"Content-Type": "text/plain"})[0] == 415
        assert client.ask("GET", "/act")[0] == 405 and client.ask("GET", "/nothing")[0] == 404


def test_nothing_that_strangers_write_fails_the_server(client: Client) -> None:
    rng = random.Random(0)
    buffer = io.BytesIO()
    np.savez(buffer, observations=OBS, sessions=np.array(["a", "b", "c"]))
    for kind, good in ((JSON, json.dumps({"observations": OBS.tolist()}).encode()), (ARRAYS, buffer.getvalue())):
        for _ in range(100):
            body = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            if rng.random() < 0.3:
                body = body[: rng.randrange(len(body))]
            status, answer = client.ask("POST", "/act", bytes(body), {"Content-Type": kind})
            assert status == 200 or (400 <= status < 500 and json.loads(answer)["error"])
    for body in (
        b'{"observations": ' + b'{"a":' * 600 + b"1" + b"}" * 601,
        b"[" * 100_000,
        b'{"observations": ' + b"[" * 100_000,
        b"1" * 5_000,
    ):
        assert client.ask("POST", "/act", body, {"Content-Type": JSON})[0] == 400
    assert client.act(observations=OBS.tolist())[1]["actions"] == [1, 0, 0]


def test_only_this_machine_or_who_has_the_token_may_ask(client: Client) -> None:
    assert client.act(headers={"Host": "evil.example"}, observations=OBS.tolist())[0] == 421
    with serving(linear_policy, host="0.0.0.0") as other:
        assert other.act(observations=OBS.tolist())[0] == 401
        assert other.act(headers={"Authorization": "Bearer wrong"}, observations=OBS.tolist())[0] == 401
        right = {"Authorization": f"Bearer {other.address.token}"}
        assert other.act(headers=right, observations=OBS.tolist())[0] == 200


def test_a_newer_policy_takes_over_and_no_request_fails_meanwhile() -> None:
    policies: list[Any] = [linear_policy(1.0, "first")]

    def load() -> Policy:
        newest = policies[-1]
        if isinstance(newest, Exception):
            raise newest
        return newest

    with serving(load) as client:
        answers: list[tuple[int, Any]] = []
        done = threading.Event()

        def keep_asking() -> None:
            while not done.is_set():
                answers.append(client.act(observations=OBS.tolist()))

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            policies.append(linear_policy(-1.0, "second"))
            client.server.reload()
            while not answers or answers[-1][1].get("checkpoint") != "second":
                done.wait(0.01)
            policies.append(ZeroDivisionError("of whatever a policy's own network does"))
            client.server.reload()  # as SIGHUP does in a server's own process
            while not client.measure('qfleet_reloads_total{result="failed"}'):
                done.wait(0.01)
            policies.append(linear_policy(1.0, "third", env="MountainCar-v0"))
            client.server.reload()
            while client.measure('qfleet_reloads_total{result="failed"}') < 2:
                done.wait(0.01)
        finally:
            done.set()
            asking.join()
        assert {status for status, _ in answers} == {200}
        assert {answer["checkpoint"] for _, answer in answers} == {"first", "second"}
        for _, answer in answers:
            assert answer["actions"] == ([1, 0, 0] if answer["checkpoint"] == "first" else [0, 1, 0])


@pytest.mark.parametrize(
    ("env", "frame_stack"),
    [("FrozenLake-v1", 1), ("Blackjack-v1", 1), ("gym:Taxi-v4", 1), ("gymnax:Breakout-MinAtar", 1),
     ("gymnax:SpaceInvaders-MinAtar", 3)],
)  # fmt: skip
def test_every_kind_of_observation_is_compiled_beforehand(env: str, frame_stack: int) -> None:
    """And then a request compiles nothing: its observations have the shapes of those that were made up."""
    made = make_env(env)
    made = made._replace(spec=dataclasses.replace(made.spec, frame_stack=frame_stack))
    network = make_network(made.spec, AgentConfig(hidden_sizes=(8,)))
    engine = Engine(Policy(made, masked(network, made.spec), network.init(jax.random.key(0)), "mine"), 2, 2, 60.0)
    engine.warm_up()
    obs = np.zeros((2, *made.spec.agent_observation_shape), made.spec.observation_dtype)
    mask = np.ones((2, made.spec.num_actions), bool) if made.spec.has_action_mask else None
    compiled: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        engine.act([engine.encode(obs, mask, (), None)])
        if frame_stack > 1:
            frames = np.zeros((2, *made.spec.observation_shape), made.spec.observation_dtype)
            engine.act([engine.encode(frames, mask, ("a", "b"), [True, True])])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


@pytest.fixture(scope="module")
def recurrent() -> Policy:
    env = make_env("CartPole-v1")
    network = make_network(env.spec, AgentConfig(memory="lstm", memory_size=8, hidden_sizes=(8,), replay="none"))
    return Policy(env, network, network.init(jax.random.key(0)), "recurrent")


def test_sessions_go_on_as_episodes_of_their_own(recurrent: Policy) -> None:
    """The values of interleaved sessions are those of `Policy.step` for each episode by itself."""
    rng = np.random.default_rng(0)
    episodes = {name: rng.normal(size=(5, 4)).astype(np.float32) for name in "abc"}
    wanted = {}
    for name, frames in episodes.items():
        memory = recurrent.start()
        wanted[name] = []
        for frame in frames:
            action, memory = recurrent.step(memory, frame)
            wanted[name].append(action)
    with serving(lambda: recurrent) as client:
        found: dict[str, list[int]] = {name: [] for name in episodes}
        for moment in range(5):
            names = list(rng.permutation(list(episodes)))
            status, answer = client.act(
                observations=[episodes[name][moment].tolist() for name in names],
                sessions=names,
                is_first=[moment == 0] * 3,
            )
            assert status == 200
            for name, action in zip(names, answer["actions"], strict=True):
                found[name].append(action)
        assert found == wanted
        status, answer = client.act(observations=[[0.0] * 4], sessions=["new"])
        assert status == 409 and "begin it with is_first" in answer["error"]
        status, answer = client.act(observations=[[0.0] * 4], sessions=["new"], is_first=[True])
        assert status == 409 and "3 of 3 in use" in answer["error"]
        assert client.ask("DELETE", "/sessions/a")[0] == 204 and client.ask("DELETE", "/sessions/a")[0] == 404
        assert client.act(observations=[[0.0] * 4], sessions=["new/1"], is_first=[True])[0] == 200
        assert client.ask("DELETE", "/sessions/new%2F1")[0] == 204
        status, answer = client.act(observations=[[0.0] * 4])
        assert status == 400 and "a recurrent network must know the episode" in answer["error"]
        status, answer = client.act(observations=[[0.0] * 4] * 2, sessions=["b", "b"])
        assert status == 400 and "must differ" in answer["error"]


def test_a_server_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_waiting must be"):
        ServingLimits(max_batch=100, max_waiting=10)
    with WebAddress("127.0.0.1", 0, "a server").socket as taken, pytest.raises(ConfigError, match="--host or --port"):
        WebAddress("127.0.0.1", taken.getsockname()[1], "a server")
