"""Joining the processes of a run."""

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qfleet.runtime.peers import _is_loopback

CODE = """
import os, socket, sys
from pathlib import Path
from qfleet.runtime import peers

with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
peers.join(f"127.0.0.1:{port}", 1, 0, 1, 10.0)
own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists() or path.is_symlink()}
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
            print(fields[1].split(":")[0])
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("127.0.0.1:1", True), ("127.9.9.9:1", True), ("[::1]:1", True), ("localhost:1", True),
        ("10.0.0.1:1", False), ("[fe80::1]:1", False), ("node0:1", False), ("0.0.0.0:1", False),
    ],
)  # fmt: skip
def test_which_addresses_only_this_machine_can_reach(address: str, is_loopback: bool) -> None:
    assert _is_loopback(address) is is_loopback


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_coordinator_on_this_machine_listens_on_loopback_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path)
    addresses = [ipaddress.ip_address(packed(text)) for text in done.stdout.split()]
    assert addresses, done.stderr
    assert [
        str(address) for address in addresses if not (getattr(address, "ipv4_mapped", None) or address).is_loopback
    ] == []


SAVES = """
import os, sys, time
from qfleet.runtime import peers
from qfleet.runtime.signals import StopFlag
peers.BEAT_SECONDS = 0.01
with StopFlag(ends_process=True) as stop:
    peers.Reporter(int(sys.argv[1]), saves_at_end=True)
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(1.2)  # more than after which another request would end the process
    print("saved", flush=True)
"""


def test_a_process_that_saves_at_its_end_is_asked_to_stop_once_its_launcher_is_gone() -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-c", SAVES, str(writing)]
    with subprocess.Popen(command, pass_fds=[writing], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.close(writing)
        assert process.stdout.readline() == "ready\n"
        os.close(reading)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 0


def packed(text: str) -> bytes:
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    return b"".join(word.to_bytes(4, sys.byteorder) for word in words)
