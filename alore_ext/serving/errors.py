"""What a request can be refused for: each error knows its HTTP status and the reason that metrics count it under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = [
    "BadRequest",
    "BodyTimeout",
    "BodyTooLarge",
    "DeviceFailed",
    "FolderUnreadable",
    "ImageTooLarge",
    "InvalidField",
    "InvalidPrediction",
    "NotAnImage",
    "PredictionFailed",
    "QueueFull",
    "ReloadDisabled",
    "RequestError",
    "ShuttingDown",
    "Unauthorized",
    "UnknownAdapter",
    "UnsupportedBody",
    "listing",
]


class RequestError(Exception):
    """One request cannot be answered. The message goes to the client: what was expected, what came."""

    status = 500
    reason = "internal"
    headers: Mapping[str, str] = {}


class QueueFull(RequestError):
    status, reason = 429, "queue_full"
    headers = {"Retry-After": "1"}


class ShuttingDown(RequestError):
    status, reason = 503, "shutting_down"
    headers = {"Retry-After": "5"}


class DeviceFailed(RequestError):
    """The device gives errors from now on, whatever it is asked: only a new process helps."""

    status, reason = 503, "device_failed"


class UnknownAdapter(RequestError):
    status, reason = 404, "unknown_adapter"

    @classmethod
    def named(cls, name: str, known: Iterable[str]) -> UnknownAdapter:
        return cls(f"there is no adapter {name[:100]!r}; {listing(known)}")


class BadRequest(RequestError):
    status, reason = 400, "malformed"


class InvalidField(RequestError):
    status, reason = 422, "invalid_field"


class UnsupportedBody(RequestError):
    status, reason = 415, "unsupported_body"


class BodyTooLarge(RequestError):
    status, reason = 413, "body_too_large"


class BodyTimeout(RequestError):
    status, reason = 408, "body_timeout"


class NotAnImage(RequestError):
    status, reason = 415, "not_an_image"


class ImageTooLarge(RequestError):
    status, reason = 413, "image_too_large"


class Unauthorized(RequestError):
    status, reason = 401, "unauthorized"
    headers = {"WWW-Authenticate": "Bearer"}


class ReloadDisabled(RequestError):
    status, reason = 403, "reload_disabled"


class FolderUnreadable(RequestError):
    status, reason = 500, "folder_unreadable"


class InvalidPrediction(RequestError):
    """The model gave NaN or infinite logits: JSON has no such numbers, and they rank nothing."""

    status, reason = 500, "invalid_prediction"


class PredictionFailed(RequestError):
    """The model raised. The cause is in the server's log, not in the answer."""

    status, reason = 500, "prediction_failed"


def listing(names: Iterable[str], most: int = 20) -> str:
    """ "known: a, b" of at most ``most`` names, for a message."""
    names = list(names)
    if not names:
        return "none is loaded"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"known: {', '.join(names[:most])}{more}"
