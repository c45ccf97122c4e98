"""The connection to Ray: that a local one is out of others' reach, and that a user's own is left as it was."""

import ipaddress
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from qfleet.config import ConfigError  # noqa: E402
from qfleet.topologies.fleet.cluster import connected, in_words, last_line, room, variables  # noqa: E402


def auth_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}


# --- Without a cluster ---


@pytest.mark.parametrize("mode", [None, "disabled", "token"])
@pytest.mark.parametrize("address", ["auto", "192.0.2.1:6379"])
def test_to_a_cluster_of_others_the_users_settings_hold(monkeypatch, address: str, mode: str | None) -> None:
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    before, seen = auth_variables(), []

    def init(job_config, **settings):
        assert job_config._runtime_env_has_working_dir()
        seen.append((settings, auth_variables(), ray._private.ray_constants.ENABLE_RAY_CLUSTER))

    monkeypatch.setattr(ray, "init", init)
    is_enabled = ray._private.ray_constants.ENABLE_RAY_CLUSTER
    with connected(address, 2, "ray_address"):
        pass
    assert seen == [({"address": address, "log_to_driver": False, "logging_level": "WARNING"}, before, is_enabled)]


@pytest.mark.parametrize(
    "settings", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "the user's"}, {"RAY_AUTH_TOKEN_PATH": "/a/file"}]
)
def test_a_local_one_takes_the_users_token_and_nothing_else_from_the_user(monkeypatch, settings: dict) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    before, seen = auth_variables(), []
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(auth_variables()))
    with connected("local", 2, "ray_address"):
        pass
    (found,) = seen
    has_token = "RAY_AUTH_TOKEN" in settings or "RAY_AUTH_TOKEN_PATH" in settings
    assert found["RAY_AUTH_MODE"] == "token"
    assert has_token or len(found["RAY_AUTH_TOKEN"]) == 64
    assert not has_token or found == before | {"RAY_AUTH_MODE": "token"}
    assert auth_variables() == before


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError, Exception])
def test_what_can_not_be_reached_or_started_names_the_setting_and_leaves_no_trace(monkeypatch, kind: type) -> None:
    def init(**settings):
        raise kind("it is not there")

    monkeypatch.setattr(ray, "init", init)
    before, is_enabled = auth_variables(), ray._private.ray_constants.ENABLE_RAY_CLUSTER
    for address, words in (
        ("local", r"with actors_on local, Ray must start .* \(it is not there\); try again"),
        ("auto", r"actors_on must be .*, got auto \(it is not there\); start one"),
    ):
        with pytest.raises(ConfigError, match=words), connected(address, 2, "actors_on"):
            raise AssertionError
    assert auth_variables() == before
    assert is_enabled == ray._private.ray_constants.ENABLE_RAY_CLUSTER


def test_processes_get_the_variables_that_say_how_to_compute_and_where_the_users_modules_are(
    monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--of_the_users")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a secret")
    monkeypatch.syspath_prepend(tmp_path)
    found = variables()
    assert found["XLA_FLAGS"] == "--of_the_users" and "RAY_AUTH_TOKEN" not in found
    folders = found["PYTHONPATH"].split(os.pathsep)
    assert folders[0] == str(tmp_path) and not any("site-packages" in folder for folder in folders)


def test_the_words_of_messages() -> None:
    assert in_words({"CPU": 1, "GPU": 0.5}) == "1 CPU and 0.5 GPU"
    assert last_line(ValueError("in an actor\n  a trace\nValueError: why\n")) == "ValueError: why"


# --- On a local Ray, which the tests share ---


@ray.remote
class Actor:
    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def has_on_path(self, folder: str) -> bool:
        return folder in sys.path


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts a Ray in an empty current folder, and yields that folder."""
    here, there = os.getcwd(), tmp_path_factory.mktemp("current")
    os.chdir(there)
    before, handler, group = auth_variables(), signal.getsignal(signal.SIGTERM), os.getpgrp()
    with connected("local", 3, "ray_address"):
        folder = Path(ray._private.worker._global_node.get_session_dir_path()).parents[1]
        os.chdir(here)
        assert (signal.getsignal(signal.SIGTERM), os.getpgrp()) == (handler, group)
        yield there
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert not folder.exists()
    assert auth_variables() == before


@pytest.mark.slow
def test_the_current_folder_is_not_on_the_path_of_processes(local: Path) -> None:
    assert ray.get(Actor.remote().has_on_path.remote(str(local))) is False


@pytest.mark.slow
def test_nobody_else_can_enter_the_folder_of_a_local_ray(local) -> None:
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert stat.S_IMODE(session.parents[1].stat().st_mode) == 0o700
    assert session.parents[1].stat().st_uid == os.getuid()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_of_a_local_ray_listens_to_other_machines(local) -> None:
    actor = Actor.remote()
    assert ray.get(actor.address.remote()) == "127.0.0.1"
    found: dict[int, list] = {}
    while sum(map(len, found.values())) < 5:  # of this process, the two servers, an agent and the actor
        found = {pid: addresses_of(pid) for pid in descendants(os.getpid())}
    assert [(command_of(pid), str(a)) for pid, each in found.items() for a in each if not a.is_loopback] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_ray_that_is_started_otherwise_listens_to_other_machines_and_searches_the_current_folder() -> None:
    """Tells when functions of `ray_internals` are no longer needed."""
    start = (
        "import os, ray, sys; ray.init(address='local', num_cpus=1, include_dashboard=False, logging_level='WARNING'); "
        "print(ray.get(ray.remote(lambda folder: folder in sys.path).remote(os.getcwd())), flush=True); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        is_searched = process.stdout.readline()
        assert process.stdout.readline() == "ready\n"
        found = [address for pid in descendants(process.pid) for address in addresses_of(pid)]
        process.communicate()  # closes its input, and so ends it
    assert is_searched == "True\n", "delete ray_internals.path_of_this_process_only, and its call in cluster"
    assert found and not all(address.is_loopback for address in found), (
        "a local Ray now keeps to loopback by itself: delete ray_internals.on_loopback, and its call in cluster"
    )


@pytest.mark.slow
def test_a_local_ray_refuses_those_without_its_token(local, tmp_path: Path) -> None:
    from ray._raylet import AuthenticationMode, get_authentication_mode

    assert get_authentication_mode() == AuthenticationMode.TOKEN
    ask = "import ray, sys; print(ray._raylet.GcsClient(address=sys.argv[1]).internal_kv_keys(b'', b'', 10))"
    command = [sys.executable, "-W", "ignore", "-c", ask, ray.get_runtime_context().gcs_address]
    known = subprocess.run(command, capture_output=True, text=True)
    assert known.returncode == 0, known.stderr
    for change in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        unknown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **change})
        assert unknown.returncode != 0 and "nauthenticated" in unknown.stderr, (unknown.stdout, unknown.stderr)


@pytest.mark.slow
def test_the_token_of_a_local_ray_is_in_no_file(local) -> None:
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for path in session.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if token in content_of(path)] == []
    default = Path.home() / ".ray" / "auth_token"
    assert not default.exists() or token not in default.read_bytes()


def content_of(path: Path) -> bytes:
    """Returns what a file holds, nothing if it has gone meanwhile."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize("address", ["local", "auto", "192.0.2.1:6379"])
def test_a_connection_that_is_there_is_used_and_left(local, address: str) -> None:
    before, node = auth_variables(), ray.get_runtime_context().get_node_id()
    with connected(address, 2, "ray_address"):
        assert ray.get_runtime_context().get_node_id() == node and auth_variables() == before
    assert ray.is_initialized()
    assert ray.get_runtime_context().get_node_id() == node


@pytest.mark.slow
def test_a_local_ray_has_as_many_cpus_as_it_was_asked_for(local) -> None:
    num_cpus = max(3, os.cpu_count() or 1)
    assert room(["CPU", "TPU"], {}).endswith(f" free of {num_cpus} CPU and 0 TPU")


def descendants(pid: int) -> list[int]:
    """Returns a process and all that it, or one of these, has started."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [pid]
    for each in found:  # which grows
        found += [child for child, parent in parents.items() if parent == each]
    return found


def addresses_of(pid: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Returns those that a process listens on."""
    listening, found = addresses_by_socket(), []
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            name = os.readlink(path)
            if name in listening:
                found.append(listening[name])
    except FileNotFoundError:  # the process, or a file of its, has gone
        pass
    return found


def addresses_by_socket() -> dict[str, ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # TCP_LISTEN
                text = fields[1].split(":")[0]
                words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
                packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
                address = ipaddress.ip_address(packed)
                mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
                found[f"socket:[{fields[9]}]"] = mapped or address
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return "one that has gone"
