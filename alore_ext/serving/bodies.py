"""Reading POST /predict: multipart or JSON, never more bytes than allowed, never longer than allowed."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive

from .errors import BadRequest, BodyTimeout, BodyTooLarge, InvalidField, UnsupportedBody

__all__ = ["BODY_SCHEMA", "PredictBody", "check_length", "read_body"]

_DEFAULT_TOP_K = 5
_FIELDS = (
    'multipart/form-data with fields "file", "adapter", "top_k", or JSON with "image" (base64), "adapter", "top_k"'
)

_COMMON = {"adapter": {"type": "string"}, "top_k": {"type": "integer", "minimum": 1, "default": _DEFAULT_TOP_K}}
BODY_SCHEMA = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "adapter"],
                "properties": {"file": {"type": "string", "format": "binary"}, **_COMMON},
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["image", "adapter"],
                "properties": {"image": {"type": "string", "format": "byte"}, **_COMMON},
            }
        },
    },
}


@dataclass(frozen=True)
class PredictBody:
    """What a client asks for."""

    image: bytes
    adapter: str | None  # None: not given
    top_k: int


def check_length(request: Request, limit: int) -> None:
    """Refuse by Content-Length, before a byte of the body is read.

    Raises:
        BodyTooLarge: more than `limit` bytes are announced.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise BodyTooLarge(f"the request's body has {int(announced):,} bytes, at most {limit:,} are taken")


async def read_body(request: Request, limit: int, timeout: float, aside) -> PredictBody:
    """Read and check the body.

    Args:
        limit: most bytes, counted as they come (a chunked body announces no length).
        timeout: seconds until all of it must be here.
        aside: ``await aside(function, *arguments)`` runs what takes long off the event loop.

    Raises:
        BodyTooLarge, BodyTimeout, UnsupportedBody, BadRequest, InvalidField: says what was expected.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    limited = Request(request.scope, _limited(request.receive, limit))
    try:
        if kind == "multipart/form-data":
            return await asyncio.wait_for(_multipart(limited), timeout)
        if kind == "application/json":
            return await aside(_json, await asyncio.wait_for(limited.body(), timeout))
    except asyncio.TimeoutError:
        raise BodyTimeout(f"the request's body did not arrive within the {timeout:g} s of --body-timeout") from None
    raise UnsupportedBody(f"the body must be {_FIELDS}; got Content-Type {kind[:100]!r}")


def _limited(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def counting() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise BodyTooLarge(f"the request's body has more than {limit:,} bytes")
        return message

    return counting


async def _multipart(request: Request) -> PredictBody:
    try:
        form = await request.form(max_files=1, max_fields=8, max_part_size=4096)
    except (HTTPException, MultiPartException, UnicodeError) as error:  # the first where an application runs
        message = getattr(error, "detail", None) or getattr(error, "message", None) or str(error)[:200]
        raise BadRequest(f"the multipart body cannot be read: {message}") from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidField(f'"file" must be an uploaded image file; got {_found(form.keys(), file)}')
        image = await file.read()
    finally:
        await form.close()
    top_k = form.get("top_k", str(_DEFAULT_TOP_K))
    if not isinstance(top_k, str) or not top_k.strip().isdecimal():
        raise InvalidField(f'"top_k" must be a whole number; got {_short(top_k)}')
    return _checked(image, form.get("adapter"), int(top_k))


def _json(body: bytes) -> PredictBody:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object; got {type(fields).__name__}")
    encoded = fields.get("image")
    if not isinstance(encoded, str):
        raise InvalidField(f'"image" must be an image file in base64; got {_found(fields, encoded)}')
    try:
        image = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise InvalidField(f'"image" must be an image file in base64; got something else: {error}') from None
    return _checked(image, fields.get("adapter"), fields.get("top_k", _DEFAULT_TOP_K))


def _checked(image: bytes, adapter: Any, top_k: Any) -> PredictBody:
    if not isinstance(adapter, str | None):
        raise InvalidField(f'"adapter" must be the name of an adapter; got {_short(adapter)}')
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise InvalidField(f'"top_k" must be a whole number of at least 1; got {_short(top_k)}')
    return PredictBody(image, adapter, top_k)


def _found(names, value: Any) -> str:
    """What came instead of a field: nothing, or a value of another type."""
    if value is not None:
        return type(value).__name__
    return f"the fields {', '.join(_short(name) for name in list(names)[:8]) or '(none)'}"


def _short(value: Any) -> str:
    return repr(value)[:100]
