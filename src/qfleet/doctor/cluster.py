"""The check of Ray: whether it works here, whether a cluster answers, and whether there is a token for it."""

import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from qfleet.config import TOPOLOGIES, ConfigError
from qfleet.config.checks import is_host_and_port
from qfleet.doctor.check import Check, from_error

_CONNECTING_SECONDS = 2.0

_ANSWERING_SECONDS = 8.0
"""Time that Ray's own check of a cluster has, once something listens at the cluster's address."""


def cluster() -> Check:
    """Imports Ray, tries the network of this machine, and connects to the cluster that a run would join."""
    users = ", ".join(name for name, kind in TOPOLOGIES.items() if kind.runs_in == "ray")
    if importlib.util.find_spec("ray") is None:
        text = f"not installed; topologies {users} need it"
        return Check("Ray", "good", text, "pip install 'qfleet[ray]'", {"installed": False})
    try:
        pass  # which imports Ray, and says what to do if that fails
    except ConfigError as error:
        return from_error("Ray", "warn", error)
    words = importlib.metadata.version("ray")
    facts: dict[str, Any] = {"installed": True, "version": words, "token": _token()}
    try:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
    except OSError as error:
        text = f"{words}; no port of 127.0.0.1 can be opened ({error.strerror}), which a local Ray needs"
        return Check("Ray", "warn", text, "bring the loopback interface up (`ip link set lo up`)", facts)
    if (wrong := _wrong_token()) is not None:
        return Check("Ray", "warn", f"{words}; {wrong[0]}", wrong[1], facts)
    given = os.environ.get("RAY_ADDRESS")
    is_named = given not in (None, "", "auto", "local")
    address = given if is_named else None if given == "local" else _current_cluster()
    facts |= {"address": address, "answers": None}
    words += f", {facts['token']}"
    if not address:
        return Check("Ray", "good", f"{words}; no cluster is named, and a run starts its own", facts=facts)
    if not is_host_and_port(address):
        text = f"{words}; a cluster's address must be HOST:PORT, got {address}"
        return Check("Ray", "warn", text, "set RAY_ADDRESS so, or unset it", facts)
    refusal = _refusal(address)
    facts["answers"] = refusal is None
    source = "RAY_ADDRESS" if is_named else str(_current_cluster_file())
    if refusal is None:
        return Check("Ray", "good", f"{words}; a cluster answers at {address} ({source})", facts=facts)
    text = f"{words}; no cluster lets this process in at {address}, which {source} names ({refusal})"
    if is_named:
        remedy = "start it with `ray start --head`, give this machine the cluster's token, or unset RAY_ADDRESS"
        return Check("Ray", "warn", text, remedy, facts)
    return Check("Ray", "good", text, "--ray-address local, the default, starts a Ray for each run", facts)


def _refusal(address: str) -> str | None:
    """Returns why no cluster at HOST:PORT lets this process in; None if one does. Ray's own check takes the token."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTING_SECONDS):
            pass  # otherwise Ray would try again and again
    except OSError as error:
        return error.strerror or str(error)
    command = [str(Path(sysconfig.get_path("scripts")) / "ray"), "health-check", "--address", address]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERING_SECONDS)
    except subprocess.TimeoutExpired:
        return "something listens there, and doesn't answer as Ray does"
    except OSError as error:
        return f"{command[0]} can't be run: {error.strerror}"
    lines = found.stderr.strip().splitlines()
    return None if found.returncode == 0 else lines[-1].partition(". ")[0][:200] if lines else "it is not healthy"


def _current_cluster_file() -> Path:
    """Returns the file in which Ray notes the address of a cluster that was started on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"


def _current_cluster() -> str | None:
    try:
        return _current_cluster_file().read_text(encoding="utf-8", errors="replace")[:200].strip() or None
    except OSError:
        return None


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _token() -> str:
    """Returns in words where Ray would take its token from. The token itself is never read."""
    mode = os.environ.get("RAY_AUTH_MODE")
    words = f"RAY_AUTH_MODE={mode}, " if mode else ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return f"{words}token from RAY_AUTH_TOKEN"
    return f"{words}token from {_token_file()}" if _token_file().is_file() else f"{words}no token"


def _wrong_token() -> tuple[str, str] | None:
    """Returns what is wrong with the token's file, or with having none, and the remedy."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    file, named = _token_file(), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not file.is_file():
        if named:
            return f"RAY_AUTH_TOKEN_PATH names {file}, which is no file", "correct it, or unset it"
        if os.environ.get("RAY_AUTH_MODE") == "token":
            return "RAY_AUTH_MODE=token, and there is no token", "`ray get-auth-token --generate > /dev/null`"
        return None
    if file.stat().st_mode & 0o044 and all(folder.stat().st_mode & 0o011 for folder in file.parents):
        return f"others may read the token in {file}", f"chmod 600 {file}"
    return None
