"""What a server can be told, in the units and names of its command line."""

from __future__ import annotations

import math
from dataclasses import dataclass

from alore_ext.training.errors import InputError

__all__ = ["Settings", "option_of"]


# Beyond this Pillow warns of a decompression bomb, and refuses at twice as much.
_PILLOWS_MEGAPIXELS = 89.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and behaviour of one server.

    Raises:
        InputError: a value out of range; names the option.
    """

    max_batch: int = 32  # images in one pass
    max_delay_ms: float = 5.0  # that the first image of a batch waits for others
    max_queue: int = 256  # requests admitted at a time: decoded, waiting for a batch, in one
    max_reading: int = 512  # requests whose bodies are being read at a time
    max_request_mb: float = 10.0  # of a request's body, MB = 10^6 bytes
    max_megapixels: float = 50.0  # of an image before it is decoded
    body_timeout_s: float = 30.0  # for a request's body to arrive
    decode_threads: int = 4
    centre_crop: bool = False
    reload_token: str | None = None  # None: POST /adapters/reload is off
    watch_s: float | None = None  # seconds between looks at the adapter directory; None: never

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_reading", "decode_threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{option_of(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("max_request_mb", "max_megapixels", "body_timeout_s", "watch_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{option_of(name)} must be a number above 0, got {value}")
        if self.max_megapixels > _PILLOWS_MEGAPIXELS:
            raise InputError(
                f"{option_of('max_megapixels')} must be at most {_PILLOWS_MEGAPIXELS:g}, beyond which Pillow takes an "
                f"image for a bomb, got {self.max_megapixels:g}"
            )
        if not 0 <= self.max_delay_ms < math.inf:
            raise InputError(f"{option_of('max_delay_ms')} must be a number from 0 on, got {self.max_delay_ms}")
        if self.reload_token is not None and not self.reload_token.strip():
            raise InputError("the reload token is empty")

    @property
    def max_request_bytes(self) -> int:
        return int(self.max_request_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)


def option_of(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + {"watch_s": "watch", "body_timeout_s": "body-timeout"}.get(name, name).replace("_", "-")
