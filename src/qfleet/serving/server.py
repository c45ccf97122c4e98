"""The server itself: an ASGI application that reads requests within limits and answers with a policy's actions."""

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from qfleet.config import ConfigError, RunFailed
from qfleet.policy import Policy
from qfleet.runtime.run_directory import strict_json
from qfleet.runtime.web_address import WebAddress, run_until_stopped
from qfleet.serving.batcher import Batcher, Overloaded
from qfleet.serving.engine import Engine, UnknownSession
from qfleet.serving.limits import Rate, ServingLimits
from qfleet.serving.measures import Measures
from qfleet.serving.messages import ARRAYS, JSON, read_request, write_answer
from qfleet.serving.needs import check_extra

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger("qfleet")

_MOST_CONNECTIONS = 2_000

_BODY_SECONDS = 10.0
"""Longest time that a request may take to arrive."""

_DRAIN_SECONDS = 10
"""Longest time that requests under way get when the server ends."""

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class _Refused(Exception):
    """A request that isn't answered: its status, and the reason."""

    def __init__(self, status: int, text: str, wait_seconds: float | None = None) -> None:
        super().__init__(text)
        self.status, self.wait_seconds = status, wait_seconds


class PolicyServer:
    """Answers observations with a policy's actions, and goes over to a newer policy while it does."""

    def __init__(self, load: Callable[[], Policy], address: WebAddress, limits: ServingLimits | None = None) -> None:
        """Loads the policy, and compiles its programs.

        Args:
          load: returns the policy, at the beginning and whenever it is loaded anew.
          address: where to listen.
          limits: what is accepted.

        Raises:
          ConfigError: if Starlette, uvicorn or prometheus-client aren't installed, or the policy can't be loaded.
        """
        check_extra()
        self._load, self._address = load, address
        self._reloads_first: Callable[[], bool] = lambda: False
        self.limits = limits or ServingLimits()
        self._engine = self._make_engine()
        self._measures, self._rate = Measures(), Rate(self.limits.max_observations_per_second)
        self._batcher: Batcher | None = None
        self._must_reload: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def label(self) -> str:
        """The policy that it began with."""
        return self._engine.policy.label

    def serve(self, reloads_first: Callable[[], bool] = lambda: False) -> None:
        """Answers requests until a signal asks to stop; SIGHUP loads the policy anew.

        Args:
          reloads_first: whether SIGHUP came before this, asked as soon as it is listened for here.
        """
        self._reloads_first = reloads_first
        run_until_stopped(self.server(), self._address)

    def server(self) -> "uvicorn.Server":
        """Returns the server, which answers on the address's socket once it runs."""
        import uvicorn

        return uvicorn.Server(
            uvicorn.Config(
                self.app(),
                log_level="error",
                lifespan="on",
                ws="none",
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=_DRAIN_SECONDS,
                server_header=False,
                proxy_headers=False,
            )
        )

    def reload(self) -> None:
        """Has the policy loaded anew in the background, while the server runs. Any thread may call it."""
        if self._loop is not None and self._must_reload is not None:
            self._loop.call_soon_threadsafe(self._must_reload.set)

    def app(self) -> Any:
        """Returns the ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/act", self._answering(self._act), methods=["POST"]),
            Route("/sessions/{name:path}", self._answering(self._end_session), methods=["DELETE"]),
            Route("/policy", self._answering(self._describe), methods=["GET"]),
            Route("/healthz", self._answering(self._tell_health), methods=["GET"]),
            Route("/metrics", self._answering(self._tell_measures), methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    # --- What runs beside the requests ---

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        limits = self.limits
        self._batcher = Batcher(self._engine, limits.max_batch, limits.max_delay_seconds, limits.max_waiting)
        self._batcher.on_batch = self._measures.note_batch
        self._must_reload, self._loop = asyncio.Event(), asyncio.get_running_loop()
        tasks = [asyncio.create_task(self._batcher.run()), asyncio.create_task(self._reload_when_asked())]
        # In another thread than the main one, nobody can ask by a signal.
        with contextlib.suppress(ValueError, RuntimeError, AttributeError):
            self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        if self._reloads_first():
            self.reload()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reload_when_asked(self) -> None:
        assert self._must_reload is not None and self._batcher is not None
        while True:
            await self._must_reload.wait()
            self._must_reload.clear()
            try:
                engine = await asyncio.to_thread(self._make_engine, self._batcher.engine.policy)
            except Exception as error:  # whatever it is, the policy that answers now is sound
                self._measures.note_reload(is_done=False)
                is_known = isinstance(error, ConfigError | RunFailed | OSError)  # its message then says all
                logger.warning(
                    "the policy could not be loaded anew, so the server keeps the one it has: %s",
                    error,
                    exc_info=not is_known,
                )
                continue
            await self._batcher.replace(engine)
            self._measures.note_reload(is_done=True)
            logger.info("the server goes on with %s", engine.policy.label)

    def _make_engine(self, before: Policy | None = None) -> Engine:
        policy = self._load()
        if before is not None and policy.spec != before.spec:
            raise ConfigError(
                f"a policy that is loaded anew must be of the same environment, {before.spec.name}, got another one of "
                f"{policy.spec.name}; start another server for it"
            )
        engine = Engine(policy, self.limits.max_batch, self.limits.max_sessions, self.limits.session_seconds)
        engine.warm_up()
        return engine

    # --- Requests ---

    def _answering(self, answer: Callable[["Request"], Any]) -> Any:
        """Returns an endpoint that answers, or says why not."""
        from starlette.requests import Request
        from starlette.responses import Response

        async def endpoint(request: Request) -> Response:
            started = time.monotonic()
            headers = dict(_HEADERS)
            try:
                self._check_allowed(request)
                response: Response = await answer(request)
            except _Refused as refused:
                if refused.wait_seconds is not None:
                    headers["Retry-After"] = str(math.ceil(refused.wait_seconds))
                response = Response(strict_json({"error": str(refused)}), refused.status, media_type=JSON)
            except Exception as error:
                logger.exception("a request failed")
                response = Response(strict_json({"error": f"the server failed: {error}"}), 500, media_type=JSON)
            response.headers.update(headers)
            self._measures.note_request(request.url.path, response.status_code, time.monotonic() - started)
            return response

        return endpoint

    def _check_allowed(self, request: "Request") -> None:
        if self._address.is_local:
            if not self._address.is_own_name(request.headers.get("host", "")):
                raise _Refused(421, "the host must be one of this machine's own names, such as localhost")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not self._address.is_token(given):
            raise _Refused(401, "a token is needed: send the header `Authorization: Bearer TOKEN`")

    async def _act(self, request: "Request") -> "Response":
        from starlette.responses import Response

        assert self._batcher is not None
        content_type = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if content_type not in (JSON, ARRAYS):
            raise _Refused(415, f"a request must be {JSON} or {ARRAYS}, got {content_type}")
        body = await self._body_of(request)
        try:
            asked = read_request(content_type, body)
            question = self._batcher.engine.encode(asked.observations, asked.mask, asked.sessions, asked.is_first)
        except ConfigError as error:
            raise _Refused(400, str(error)) from error
        size, most = len(question.obs), self.limits.max_batch
        if size > most:
            raise _Refused(413, f"a request must have at most {most} observations, got {size}; send several")
        if wait_seconds := self._rate.take(size):
            raise _Refused(429, "observations come faster than the server was told to take them", wait_seconds)
        try:
            found = await self._batcher.ask(question)
        except Overloaded as error:
            raise _Refused(503, str(error), 1.0) from error
        except UnknownSession as error:
            raise _Refused(409, str(error)) from error
        return Response(write_answer(content_type, found, asked.wants_q_values), media_type=content_type)

    async def _body_of(self, request: "Request") -> bytes:
        from starlette.requests import ClientDisconnect

        most, body = self.limits.max_request_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                if not declared.isdigit() or int(declared) <= most:
                    async for piece in request.stream():
                        body += piece
                        if len(body) > most:
                            break
                    else:
                        return bytes(body)
        except TimeoutError as error:
            raise _Refused(408, f"a request must arrive within {_BODY_SECONDS:g} s") from error
        except ClientDisconnect as error:
            raise _Refused(400, "the request ended early") from error
        raise _Refused(413, f"a request must have at most {most} bytes; send fewer observations at once")

    async def _end_session(self, request: "Request") -> "Response":
        from starlette.responses import Response

        assert self._batcher is not None
        name = request.path_params["name"]
        if not await self._batcher.forget(name):
            raise _Refused(404, "there is no such session")
        return Response(status_code=204)

    async def _describe(self, request: "Request") -> "Response":
        from starlette.responses import Response

        assert self._batcher is not None
        engine = self._batcher.engine
        spec = engine.policy.spec
        about = {
            "environment": spec.name,
            "checkpoint": engine.policy.label,
            "observation_shape": spec.observation_shape,
            "observation_dtype": spec.observation_dtype.name,
            "frame_stack": spec.frame_stack,
            "num_actions": spec.num_actions,
            "has_action_mask": spec.has_action_mask,
            "takes_sessions": engine.takes_sessions,
            "needs_sessions": engine.policy.is_recurrent,
            "max_batch": self.limits.max_batch,
        }
        return Response(strict_json(about), media_type=JSON)

    async def _tell_health(self, request: "Request") -> "Response":
        from starlette.responses import Response

        assert self._batcher is not None
        return Response(strict_json({"status": "ok", "checkpoint": self._batcher.engine.policy.label}), media_type=JSON)

    async def _tell_measures(self, request: "Request") -> "Response":
        from starlette.responses import Response

        assert self._batcher is not None
        text, media_type = self._measures.text(self._batcher.num_waiting, self._batcher.engine.num_sessions)
        return Response(text, media_type=media_type)
