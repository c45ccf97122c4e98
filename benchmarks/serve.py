"""A policy's server under load: observations per second, latency, malformed requests, and reloads meanwhile.

    python benchmarks/serve.py [--seconds 10] [--observations 16] [--connections 8]

The load comes from `hey`, which is a package of that name in Debian. First it asks as fast as it can, then at half of
that speed. While it asks at half speed a second time, the server gets SIGHUP once a second. At last come a thousand
requests with mistakes, each of which must be told so by a status between 400 and 499.
"""

import argparse
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import common


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--observations", type=int, default=16, help="observations in one request")
    parser.add_argument("--connections", type=int, default=8)
    arguments = parser.parse_args()
    if shutil.which("hey") is None:
        sys.exit("hey makes the load, and it isn't installed: apt install hey")
    with common.scratch() as folder:
        common.train(Path(folder) / "run", "CartPole-v1", "--env-steps", "20000", "--preset", "pqn")
        body = Path(folder) / "body.json"
        body.write_text(json.dumps({"observations": [[0.0, 0.1, 0.02, -0.1]] * arguments.observations}))
        command = [sys.executable, "-m", "qfleet", "serve", f"{folder}/run", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                words = server.stdout.readline()
                port = int(re.findall(r":(\d+)/", words)[0])
                rows = list(measure(server.pid, port, body, arguments))
            finally:
                server.terminate()
        rows.append({"what": "end by SIGTERM", "exit_code": server.returncode})
    columns = {name: None for row in rows for name in row}
    common.report("serve", [columns | row for row in rows])


def measure(server: int, port: int, body: Path, arguments: argparse.Namespace) -> Any:
    """Yields the rows of the table."""
    load(port, body, 2.0, arguments)  # so that all is warm
    fastest = load(port, body, arguments.seconds, arguments)
    yield {"what": "as fast as it can", **fastest}
    half = fastest["requests_per_second"] / 2 / arguments.connections
    yield {"what": "half load", **load(port, body, arguments.seconds, arguments, half)}
    done = threading.Event()

    def ask_for_reloads() -> None:
        while not done.wait(1.0):
            os.kill(server, signal.SIGHUP)

    asking = threading.Thread(target=ask_for_reloads)
    asking.start()
    try:
        found = load(port, body, arguments.seconds, arguments, half)
    finally:
        done.set()
        asking.join()
    yield {"what": "half load with reloads", **found, "reloads": num_reloads(port)}
    yield {"what": "malformed requests", **ask_badly(port)}


def load(
    port: int, body: Path, seconds: float, arguments: argparse.Namespace, rate: float | None = None
) -> dict[str, Any]:
    """Asks for some seconds, and returns what `hey` reports; `rate` is that of each connection, per second."""
    command = ["hey", "-z", f"{seconds}s", "-c", str(arguments.connections), "-m", "POST", "-T", "application/json"]
    command += [] if rate is None else ["-q", f"{rate:.3f}"]
    report = subprocess.run(
        [*command, "-D", str(body), f"http://127.0.0.1:{port}/act"], capture_output=True, text=True, check=True
    ).stdout
    requests_per_second = float(re.findall(r"Requests/sec:\s+([\d.]+)", report)[0])
    statuses = {status: int(count) for status, count in re.findall(r"\[(\d+)\]\s+(\d+) responses", report)}
    errors = report.partition("Error distribution:")[2]
    return {
        "requests_per_second": requests_per_second,
        "observations_per_second": requests_per_second * arguments.observations,
        **{f"p{share}_ms": 1000 * float(re.findall(rf"{share}%\S* in ([\d.]+) secs", report)[0]) for share in (50, 99)},
        "failed": sum(count for status, count in statuses.items() if status != "200")
        + sum(map(int, re.findall(r"^\s+\[(\d+)\]", errors, re.MULTILINE))),
    }


def num_reloads(port: int) -> int:
    """Returns how often the server has loaded the policy anew."""
    status, text = ask(port, "GET", "/metrics")
    assert status == 200
    return int(float(re.findall(r'qfleet_reloads_total{result="done"} (\S+)', text)[0]))


def ask_badly(port: int) -> dict[str, Any]:
    """Sends a thousand requests with mistakes, and counts those that were not told so."""
    rng, untold = random.Random(0), 0
    good = json.dumps({"observations": [[0.0, 0.1, 0.02, -0.1]]}).encode()
    started = time.monotonic()
    for _ in range(1_000):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        if rng.random() < 0.3:
            body = body[: rng.randrange(len(body))]
        try:
            is_good = set(json.loads(body)) == {"observations"} and sum(map(len, json.loads(body)["observations"])) == 4
        except (ValueError, TypeError, AttributeError):
            is_good = False
        if is_good:  # a digit became another one
            body = bytearray(b'{"observations": "none"}')
        status, text = ask(port, "POST", "/act", bytes(body))
        untold += not (400 <= status < 500 and json.loads(text)["error"])
    status, _ = ask(port, "POST", "/act", good)
    return {"failed": untold + (status != 200), "requests_per_second": 1_000 / (time.monotonic() - started)}


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    """Returns the status and the text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


if __name__ == "__main__":
    main()
