"""A server that shows the reports of runs in a browser, and draws them anew as metrics arrive.

It serves four things: its page, plotly.js, the list of runs, and the data of reports. It never serves a file: a request
can only name a run of the list, and what is read of that run is what a report shows.

Whoever is on this machine may ask, under a loopback address. On another address every request must bear a token.
"""

import contextlib
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from qfleet.config import ConfigError
from qfleet.runtime.metrics_reading import MetricsReader
from qfleet.runtime.report.page import LIVE_POLICY, plotly_script, render_live, report_data
from qfleet.runtime.run_directory import SEEDS_FOLDER, strict_json
from qfleet.runtime.saved_run import SavedRun
from qfleet.runtime.web_address import WebAddress, run_until_stopped

if TYPE_CHECKING:
    import uvicorn

MAX_RUNS = 50
"""Most runs that are compared at once."""

MAX_LISTED = 1_000
"""Most runs in the list: the newest."""

MAX_CONNECTIONS = 64
"""Most requests that are answered at the same time. Further ones are told to come back."""

MAX_KEPT_BYTES = 64 * 2**20
"""Most memory that finished reports take, which are sent again while the files of their runs stay the same."""

_COOKIE = "qfleet_token"

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"{LIVE_POLICY}; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


Signature = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of change of each file that a report of one run is made from."""


class LiveRuns:
    """The runs that a dashboard shows, by name. Metrics that were read once aren't read again.

    A report is made anew only once a file of its runs has changed.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        """Reads nothing yet.

        Args:
          places: folders of runs, and folders whose subfolders are runs.
        """
        self._places = places
        self._readers: dict[Path, MetricsReader] = {}
        self._kept: OrderedDict[tuple[Path, ...], tuple[list[Signature], str]] = OrderedDict()  # newest use last

    def paths(self) -> dict[str, Path]:
        """Returns the folders of the runs by name, newest first. Symbolic links don't count."""
        found: dict[Path, float] = {}
        for place in self._places:
            for folder in [place, *_subfolders(place)]:
                config = folder / "config.json"
                if config.is_file() and not config.is_symlink():
                    found[folder] = config.lstat().st_mtime
        newest = sorted(found, key=lambda folder: found[folder], reverse=True)[:MAX_LISTED]
        return {str(folder): folder for folder in newest}

    def open(self, path: Path) -> SavedRun:
        """Returns a run with its newest metrics.

        Raises:
          ConfigError: if it isn't a run, or one of its files can't be read.
        """
        return SavedRun(path, self._readers.setdefault(path, MetricsReader(path / "metrics.jsonl")))

    def report(self, paths: Sequence[Path]) -> str:
        """Returns the data of the report of these runs, as JSON.

        Raises:
          ConfigError: as `report_data` does.
        """
        runs = tuple(paths)
        signatures = [_signature(path) for path in runs]  # first: a later change must not count as known
        kept, text = self._kept.pop(runs, (None, ""))
        if kept != signatures:
            text = strict_json(report_data([self.open(path) for path in runs]))
        self._kept[runs] = (signatures, text)
        while sum(len(text) for _, text in self._kept.values()) > MAX_KEPT_BYTES:
            self._kept.popitem(last=False)
        return text


def _subfolders(place: Path) -> list[Path]:
    try:
        return [folder for folder in place.iterdir() if folder.is_dir() and not folder.is_symlink()]
    except OSError:
        return []


def _signature(run: Path) -> Signature:
    files = [run / name for name in ("config.json", "environment.json", "metrics.jsonl", "summary.json")]
    for videos in (run / "videos", *sorted(run.glob(f"{SEEDS_FOLDER}/*/videos"))):
        with contextlib.suppress(OSError):  # there are none
            files += sorted(videos.iterdir())
    found = []
    for file in files:
        with contextlib.suppress(OSError):  # there is none, or it was deleted meanwhile
            status = file.lstat()
            found.append((file.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


class Dashboard:
    """The dashboard as an ASGI application, with the address and the token under which it is reached."""

    def __init__(self, places: Sequence[Path], host: str = "127.0.0.1", port: int = 0) -> None:
        """Takes the port, so that nobody else can. It is served once `serve` is called.

        Args:
          places: as for `LiveRuns`.
          host: address or name to listen on.
          port: port to listen on; 0 takes a free one.

        Raises:
          ConfigError: if Starlette and uvicorn aren't installed, or that address can't be had.
        """
        _check_extra()
        self._runs = LiveRuns(places)
        self._reading = threading.Lock()  # requests are answered in several threads
        self._web = WebAddress(host, port, "a dashboard")
        self.port, self.token = self._web.port, self._web.token
        self.address = self._web.url + ("" if self.token is None else f"?token={self.token}")
        """What to open in a browser."""

    def serve(self) -> None:
        """Answers requests until a signal asks to stop."""
        run_until_stopped(self.server(), self._web)

    def server(self) -> "uvicorn.Server":
        """Returns the server, which answers on this dashboard's socket once it runs."""
        import uvicorn

        config = uvicorn.Config(
            self.app(),
            log_level="error",
            lifespan="off",
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=2,
            server_header=False,
            proxy_headers=False,
        )
        return uvicorn.Server(config)

    @property
    def socket(self) -> socket.socket:
        """The socket that it listens on."""
        return self._web.socket

    def app(self) -> Any:
        """Returns the ASGI application."""
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import RedirectResponse, Response
        from starlette.routing import Route

        def refused(request: Request) -> Response | None:
            if self._web.is_local:
                is_ours = self._web.is_own_name(request.headers.get("host", ""))
                return None if is_ours else Response("unknown host", 421, _HEADERS)
            is_right = self._web.is_token(_token_of(request.headers.get("cookie", ""), request.url.query))
            return None if is_right else Response("a token is needed: open the printed address", 403, _HEADERS)

        def page(request: Request) -> Response:
            if "token" in request.query_params:  # kept in a cookie, so that it stays in no history and no link
                answer: Response = RedirectResponse("/", 303, _HEADERS)
                answer.set_cookie(_COOKIE, self.token or "", httponly=True, samesite="strict")
                return answer
            return Response(render_live(), 200, _HEADERS, "text/html; charset=utf-8")

        def plotly(request: Request) -> Response:
            headers = _HEADERS | {"Cache-Control": "private, max-age=86400"}
            return Response(plotly_script(), 200, headers, "text/javascript; charset=utf-8")

        def runs(request: Request) -> Response:
            listed = [{"name": name, "age": _age(path)} for name, path in self._runs.paths().items()]
            return Response(strict_json(listed), 200, _HEADERS, "application/json")

        def data(request: Request) -> Response:
            names, known = request.query_params.getlist("run"), self._runs.paths()
            if not 0 < len(names) <= MAX_RUNS or not set(names) <= set(known):
                return Response(f"`run` must name 1 to {MAX_RUNS} runs of the list", 404, _HEADERS)
            try:
                with self._reading:
                    content = self._runs.report([known[name] for name in dict.fromkeys(names)])
            except ConfigError as error:
                return Response(strict_json({"error": str(error)}), 200, _HEADERS, "application/json")
            return Response(content, 200, _HEADERS, "application/json")

        def guarded(answer: Any) -> Any:
            return lambda request: refused(request) or answer(request)

        answers = {"/": page, "/plotly.js": plotly, "/runs": runs, "/data": data}
        return Starlette(routes=[Route(path, guarded(answer), methods=["GET"]) for path, answer in answers.items()])


def _check_extra() -> None:
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"the dashboard needs Starlette and uvicorn ({error}); pip install 'qfleet[dashboard]'"
        ) from error
    del starlette, uvicorn


def _token_of(cookies: str, query: str) -> str:
    """Returns the token that a request bears, in a cookie or in its address; empty if it bears none."""
    try:
        cookie = SimpleCookie(cookies).get(_COOKIE)
        return cookie.value if cookie is not None else parse_qs(query).get("token", [""])[0]
    except Exception:  # of a library that reads what strangers wrote: whatever they wrote is no token
        return ""


def _age(path: Path) -> float | None:
    """Returns the seconds since a run's newest record; None if it has none."""
    try:
        return max(0.0, time.time() - (path / "metrics.jsonl").lstat().st_mtime)
    except OSError:
        return None
