"""The dashboard: it follows a run, asks strangers for a token, and serves nothing but reports."""

import contextlib
import json
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, chromium
from made_runs import make_run

from qfleet.cli.main import main
from qfleet.config import ConfigError
from qfleet.runtime.report import dashboard as dashboard_module
from qfleet.runtime.report.dashboard import Dashboard, LiveRuns
from qfleet.runtime.report.page import report_data

NUM_FUZZED = int(os.environ.get("QFLEET_TEST_REQUESTS", "200"))

SECRET = "the-secret-of-another-file"

pytest.importorskip("uvicorn")


@contextlib.contextmanager
def serving(dashboard: Dashboard) -> Iterator[Dashboard]:
    server = dashboard.server()
    thread = threading.Thread(target=lambda: server.run(sockets=[dashboard.socket]))
    thread.start()
    try:
        yield dashboard
    finally:
        server.should_exit = True
        thread.join()


def ask(dashboard: Dashboard, request: bytes, timeout_seconds: float = 60) -> bytes:
    """Sends bytes to the dashboard and returns what it answers, until it closes the connection or falls silent."""
    answer = b""
    address = ("127.0.0.1", dashboard.port)
    silence = contextlib.suppress(ConnectionError, TimeoutError)
    with socket.create_connection(address, timeout_seconds) as connection, silence:
        connection.sendall(request)
        while more := connection.recv(2**16):
            answer += more
    return answer


def get(dashboard: Dashboard, target: str, **headers: str) -> tuple[int, str]:
    """Returns the status and the body of the answer to a GET request, and before the body all of its head."""
    fields = {"Host": f"127.0.0.1:{dashboard.port}", "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    answer = ask(dashboard, f"GET {target} HTTP/1.1\r\n{head}\r\n".encode()).decode(errors="replace")
    return int(answer.split(" ", 2)[1]), answer


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Dashboard]:
    make_run(tmp_path / "runs" / "a", 20)
    make_run(tmp_path / "runs" / "b", 20, seed=1)
    with serving(Dashboard([tmp_path / "runs"])) as started:
        yield started


def test_a_run_is_drawn_again_as_its_metrics_arrive(tmp_path: Path, dashboard: Dashboard) -> None:
    run = make_run(tmp_path / "runs" / "new", 20)
    run.directory.summary_path.unlink()
    with chromium() as browser:
        visit = Visit(browser, f"{dashboard.address}?run={run.path}")
        visit.keep_screenshot("dashboard-1280")
        assert "2,000" in visit.page.locator(".cards").inner_text()
        with run.directory.metrics_path.open("a") as file:
            file.write(json.dumps({"env_steps": 7777, "wall_seconds": 30.0}) + "\n")
        visit.page.locator(".cards", has_text="7,777").wait_for()
        visit.page.get_by_label("b").first.check()
        visit.page.locator("#report", has_text="Settings compared").wait_for()
        assert visit.errors == []
        assert {address.split("?")[0].removeprefix(dashboard.address) for address in visit.addresses_asked} == {
            *("", "plotly.js", "runs", "data")
        }


def test_a_report_is_made_again_only_once_a_file_of_its_runs_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def count(runs: Any) -> dict[str, Any]:
        made.append(len(runs))
        return report_data(runs)

    monkeypatch.setattr(dashboard_module, "report_data", count)
    a, b = (make_run(tmp_path / name, 5).directory for name in ("a", "b"))
    runs, both = LiveRuns([tmp_path]), [a.path, b.path]
    a.summary_path.unlink()
    first = runs.report([a.path])
    assert [runs.report([a.path]), made] == [first, [1]]
    with a.metrics_path.open("a") as file:
        file.write(json.dumps({"env_steps": 7777, "wall_seconds": 30.0}) + "\n")
    changed = runs.report([a.path])
    assert "7,777" in changed and changed != first and made == [1, 1]
    a.write_summary({"stopped": "interrupted"})
    assert "stopped: interrupted" in runs.report([a.path])
    a.videos_path.mkdir()
    (a.videos_path / "1.mp4").write_bytes(b"video")
    assert "data:video/mp4" in runs.report([a.path])
    seeds_videos = a.path / "seeds" / "0" / "videos"
    seeds_videos.mkdir(parents=True)
    made.clear()
    (seeds_videos / "1.mp4").write_bytes(b"video")
    assert [runs.report([a.path]) != "", made] == [True, [1]]
    made.clear()
    assert [runs.report(both), made] == [runs.report(both), [2]]
    b.summary_path.unlink()
    runs.report(both)
    assert made == [2, 2]
    b.metrics_path.write_text("a line that is no record\n")
    assert "is left out" in runs.report([b.path])


def test_reports_are_kept_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def name(runs: Any) -> dict[str, Any]:
        made.append(runs[0].path)
        return {"path": runs[0].path.name}

    monkeypatch.setattr(dashboard_module, "report_data", name)
    monkeypatch.setattr(dashboard_module, "MAX_KEPT_BYTES", 2 * len('{"path": "a"}'))
    a, b, c = (make_run(tmp_path / name, 1).path for name in "abc")
    runs = LiveRuns([tmp_path])
    for path in (a, b, a, c):  # c displaces b, which was asked for less recently
        runs.report([path])
    assert made == [a, b, c]
    runs.report([a])
    runs.report([b])
    assert made == [a, b, c, b]


def test_only_runs_of_the_list_are_read(tmp_path: Path, dashboard: Dashboard) -> None:
    outside = make_run(tmp_path / "outside", 3)
    (tmp_path / "runs" / "link").symlink_to(outside.path)
    (tmp_path / "runs" / "a" / "notes.txt").write_text(SECRET)
    assert [each["name"] for each in json.loads(get(dashboard, "/runs")[1].split("\r\n\r\n")[1])] == [
        str(tmp_path / "runs" / name) for name in ("b", "a")
    ]
    for name in (outside.path, tmp_path / "runs" / "link", tmp_path / "runs" / "a" / ".." / "a", "/etc", ""):
        assert get(dashboard, f"/data?run={name}")[0] == 404
    for target in ("/runs/a/notes.txt", "/../a/notes.txt", f"/{tmp_path}/runs/a/notes.txt", "/a/report.html"):
        assert get(dashboard, target)[0] == 404
    status, answer = get(dashboard, f"/data?run={tmp_path}/runs/a")
    assert status == 200 and '"figures"' in answer and SECRET not in answer


def test_files_that_lead_elsewhere_are_not_followed(tmp_path: Path, dashboard: Dashboard) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.mp4").write_text(SECRET)
    run = make_run(tmp_path / "runs" / "new", 3)
    run.directory.videos_path.symlink_to(secret)
    run.directory.metrics_path.unlink()
    run.directory.metrics_path.symlink_to(secret / "a.mp4")
    status, answer = get(dashboard, f"/data?run={run.path}")
    assert status == 200 and "metrics.jsonl must be a readable file" in answer


def test_a_page_of_somebody_else_cannot_ask_under_its_own_name(dashboard: Dashboard) -> None:
    assert get(dashboard, "/runs", Host="evil.example")[0] == 421
    assert get(dashboard, "/runs", Host=f"localhost:{dashboard.port}")[0] == 200


def test_on_other_addresses_every_request_needs_the_token(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", 3)
    with serving(Dashboard([tmp_path / "runs"], "0.0.0.0")) as dashboard:
        for target in ("/", "/runs", "/plotly.js", f"/data?run={run.path}", "/?token=wrong", "/runs?token="):
            status, answer = get(dashboard, target, Cookie="qfleet_token=wrong")
            assert status == 403 and str(run.path) not in answer
        status, answer = get(dashboard, f"/?token={dashboard.token}")
        assert status == 303 and "httponly" in answer.lower() and "samesite=strict" in answer.lower()
        assert get(dashboard, "/runs", Cookie=f"qfleet_token={dashboard.token}")[0] == 200
        assert len(dashboard.token or "") > 40 and (dashboard.token or "?") in dashboard.address


def test_an_address_that_is_taken_is_one_clear_error(
    tmp_path: Path, dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="must have an address of this machine to listen on, got 127.0.0.1 port"):
        Dashboard([tmp_path], "127.0.0.1", dashboard.port)
    assert main(["dashboard", str(tmp_path / "none")]) == 2
    assert main(["dashboard", "--port", "70000", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "RUNS must be folders" in errors and "port must be" in errors


HEADERS = [
    "",
    "Host: 127.0.0.1",
    "Cookie: qfleet_token=\x01; =;;",
    "Content-Length: 99999999999",
    f"X: {'y' * 9000}",
    "Transfer-Encoding: chunked",
    "Upgrade: websocket\r\nConnection: Upgrade",
    "Range: bytes=0-1",
    ":",
]

PIECES = ["..", "../../etc/passwd", "%2e%2e%2f", "runs", "data", "plotly.js", "?run=", "&run=", "%00", "//", "\udc80"]
PIECES += ["notes.txt", "%ff", "*", "http://evil.example/", "?token=x", ";", "\\", "a" * 5_000]


def fuzzed(rng: random.Random, names: list[str], port: int) -> bytes:
    """Returns a request that is broken, hostile or odd in some way."""
    target = "/" + "".join(rng.choices([*PIECES, *names], k=rng.randrange(5)))
    method = rng.choice(["GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "\x00", ""])
    version = rng.choice(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9", ""])
    head = [f"Host: 127.0.0.1:{port}", "Connection: close", rng.choice(HEADERS)]
    lines = [f"{method} {target} {version}", *filter(None, head), "", ""]
    request = "\r\n".join(lines).encode(errors="surrogateescape")
    if rng.random() < 0.2:
        place = rng.randrange(len(request))
        request = request[:place] + rng.randbytes(rng.randrange(1, 50)) + request[place + rng.randrange(20) :]
    return request


def test_fuzzed_requests_get_nothing_from_outside(tmp_path: Path, dashboard: Dashboard) -> None:
    """`QFLEET_TEST_REQUESTS=2000` tries more of them."""
    run = tmp_path / "runs" / "a"
    (run / "notes.txt").write_text(SECRET)
    (tmp_path / "runs" / "secret").write_text(SECRET)
    names = [str(run), "a", "b", str(tmp_path), "secret", "config.json"]
    rng = random.Random(0)
    for _ in range(NUM_FUZZED):
        request = fuzzed(rng, names, dashboard.port)
        answer = ask(dashboard, request, 0.2)  # the server may wait for the rest of a broken request
        assert SECRET.encode() not in answer and b"root:x:" not in answer, request
        assert not answer.startswith(b"HTTP/1.1 5"), request
    assert get(dashboard, "/runs")[0] == 200
