"""The HTTP interface: POST /predict, GET /adapters, /health, /metrics, POST /adapters/reload."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alore_ext.training.loader import InputSpec

from .bodies import BODY_SCHEMA, check_length, read_body
from .errors import FolderUnreadable, InvalidField, ReloadDisabled, RequestError, ShuttingDown, Unauthorized, listing
from .metrics import Metrics
from .reload import AdapterDirectory
from .service import PredictionService
from .settings import Settings

if TYPE_CHECKING:
    from . import AdapterPool

__all__ = ["create_app"]

_log = logging.getLogger("alore_ext.serving")

_CLIENT_GONE = 499  # nobody reads it but the metrics
_ADAPTER = "alore_ext_adapter"  # where a request's scope keeps the adapter asked for, for the metrics


def create_app(
    pool: AdapterPool,
    spec: InputSpec,
    settings: Settings | None = None,
    directory: AdapterDirectory | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        pool: the adapters to serve. Once the application runs, change it through `directory` alone.
        spec: the input that the pool's backbone takes (`alore_ext.training.backbone.input_spec`).
        settings: limits and behaviour.
        directory: where POST /adapters/reload and the watcher look; None: the pool stays as it is.
    """
    settings = settings or Settings()
    metrics = Metrics()
    service = PredictionService(pool, spec, settings, on_batch=metrics.batch)
    metrics.watch("requests_reading", "Requests whose bodies are being read", lambda: service.reading.taken)
    metrics.watch("queue_depth", "Requests admitted and not yet answered", lambda: service.batcher.admitted)
    metrics.watch("queue_waiting", "Decoded images that wait for a batch", lambda: service.batcher.waiting)
    metrics.watch("adapters_loaded", "Adapters in the pool", lambda: len(service.names))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        watcher = None
        if directory is not None and settings.watch_s is not None:
            watcher = asyncio.create_task(_watch(service, directory, settings.watch_s))
        yield
        if watcher is not None:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        await service.close()

    app = FastAPI(title="alore_ext", lifespan=lifespan)
    app.add_middleware(_Measured, metrics=metrics, service=service)
    app.add_exception_handler(RequestError, _refusal(metrics))
    app.add_exception_handler(Exception, _internal_error)
    _add_predict(app, service, settings)
    _add_adapters(app, service, settings, directory)
    _add_state(app, service, metrics)
    return app


def _add_predict(app: FastAPI, service: PredictionService, settings: Settings) -> None:
    @app.post("/predict", openapi_extra={"requestBody": BODY_SCHEMA})
    async def predict(request: Request) -> Any:
        """The likeliest classes of one image, by the adapter named."""
        check_length(request, settings.max_request_bytes)
        service.batcher.check()  # before a body is read for nothing
        try:
            with service.reading.hold():  # no place in the queue: a slow client takes none from the others
                body = await read_body(request, settings.max_request_bytes, settings.body_timeout_s, service.aside)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        if body.adapter is None:
            raise InvalidField(f'"adapter" must be the name of an adapter; none came; {listing(service.names)}')
        request.scope[_ADAPTER] = body.adapter
        with service.batcher.admit():
            answer = asyncio.ensure_future(service.classify(body.image, body.adapter, body.top_k))
            gone = asyncio.ensure_future(_disconnect(request))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    return Response(status_code=_CLIENT_GONE)
                predictions = answer.result()
            finally:  # also where the server cancels this handler
                gone.cancel()
                answer.cancel()
        return JSONResponse({"adapter": body.adapter, "predictions": [vars(p) for p in predictions]})


def _add_adapters(
    app: FastAPI, service: PredictionService, settings: Settings, directory: AdapterDirectory | None
) -> None:
    @app.get("/adapters")
    async def adapters() -> Any:
        """What can be asked for."""
        return JSONResponse({"adapters": [vars(adapter) for adapter in service.adapters.values()]})

    @app.post("/adapters/reload")
    async def reload(request: Request) -> Any:
        """Bring the adapters in step with their folder. Needs `Authorization: Bearer TOKEN`."""
        _authorize(request, settings.reload_token, directory)
        try:
            report = await _reload(service, directory)
        except OSError as error:
            raise FolderUnreadable(f"the adapter folder cannot be read: {error.strerror}; nothing changed") from None
        return JSONResponse({**report.to_dict(), "adapters": service.names})


def _add_state(app: FastAPI, service: PredictionService, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Any:
        """200 while requests are admitted and answered, 503 otherwise: a load balancer's readiness probe.

        `live` is false where only a new process helps.
        """
        batcher = service.batcher
        ready = batcher.ready
        state = {"live": batcher.live, "ready": ready, "adapters": len(service.names)}
        state |= {"reading": service.reading.taken, "queued": batcher.admitted}
        return JSONResponse(state, status_code=200 if ready else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _disconnect(request: Request) -> None:
    """Return when the client goes away. The body has been read: nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _authorize(request: Request, token: str | None, directory: AdapterDirectory | None) -> None:
    if token is None or directory is None:
        raise ReloadDisabled("reloading is off: this server was started without a reload token or adapter folder")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Bytes, for compare_digest takes no other than ASCII strings.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.strip().encode()):
        raise Unauthorized("reloading needs the header Authorization: Bearer TOKEN with the server's reload token")


async def _reload(service: PredictionService, directory: AdapterDirectory, settled_only: bool = False):
    return await asyncio.to_thread(
        directory.reload, lambda change: service.exclusive(change).result(), settled_only=settled_only
    )


async def _watch(service: PredictionService, directory: AdapterDirectory, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            report = await _reload(service, directory, settled_only=True)
        except (OSError, ShuttingDown) as error:
            _log.warning("the adapter folder cannot be read: %s", error)
            continue
        if report:
            _log.info("adapters: %s", report.to_dict())


def _refusal(metrics: Metrics):
    async def handle(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        metrics.rejected(error.reason)
        return JSONResponse({"detail": str(error)}, error.status, dict(error.headers))

    return handle


async def _internal_error(_request: Request, _error: Exception) -> Response:
    # Starlette raises the error again after this answer, and uvicorn logs it with its traceback.
    return JSONResponse({"detail": "internal error; the server's log has the cause"}, 500)


class _Measured:
    """Counts every request with its route, status, adapter and time."""

    def __init__(self, app: ASGIApp, metrics: Metrics, service: PredictionService) -> None:
        self.app, self.metrics, self.service = app, metrics, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - started
            self.metrics.request(route, status, seconds, scope.get(_ADAPTER), self.service.names)
