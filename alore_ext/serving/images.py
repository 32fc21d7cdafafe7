"""An uploaded image file to the pixels of the model's input, refusing what is no image or too large to decode."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from alore_ext.training.errors import require
from alore_ext.training.pictures import as_rgb, to_square

from .errors import ImageTooLarge, NotAnImage

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "Decoder"]

# Those whose decoding takes time by their bytes and pixels alone: of 10 MB and 50 megapixels some 3 s at the most. Not
# read, though `alore-ext finetune` reads them: PPM, whose text form a Python loop decodes, and TIFF, which holds JPEGs
# and strips without bound. Pillow knows many more, some of which start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")

# Of a progressive JPEG: each passes over all pixels, whatever it adds; a thousand megapixels take 0.7 s. Encoders write
# about ten scans.
MAX_JPEG_SCANS = 100
MAX_SCANNED_PIXELS = 10**9
# Resizing makes an image of the model's width and this height: of 50 megapixels in one column that takes gigabytes.
MAX_SIDE = 32_768

_KNOWN = f"known: {', '.join(FORMATS)}"
_BMP_UNCOMPRESSED = (0, 3)  # BI_RGB, BI_BITFIELDS; run lengths are decoded by a Python loop


@dataclass(frozen=True)
class Decoder:
    """Bytes of an image file -> uint8 [3, size, size], cropped and resized as at evaluation."""

    size: int
    max_pixels: int
    centre_crop: bool = False  # the central 7/8, which `--augment crop` is tested on; else the whole image

    def __call__(self, data: bytes) -> Tensor:
        """
        Raises:
            NotAnImage: no image of `FORMATS`, a damaged one, or one whose decoding takes time without bound.
            ImageTooLarge: more than `max_pixels`, or a side of more than `MAX_SIDE`; found out from its header, before
                any pixel is decoded. Or no memory for it.
        """
        pillow = require("PIL.Image")
        if not data:
            raise NotAnImage("the image is empty")
        try:
            image = pillow.open(io.BytesIO(data), formats=FORMATS)
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):  # the latter under python -W error
            raise ImageTooLarge(f"the image has more than {self.max_pixels:,} pixels") from None
        except pillow.UnidentifiedImageError:
            raise NotAnImage(f"these {len(data):,} bytes are no image that is read here; {_KNOWN}") from None
        except Exception as error:  # a header that only begins like an image's
            raise NotAnImage(f"cannot read the image: {_reason(error)}") from None
        with image:
            width, height = image.size
            if width * height > self.max_pixels:
                raise ImageTooLarge(f"the image has {width} x {height} pixels, at most {self.max_pixels:,} are taken")
            if max(width, height) > MAX_SIDE:
                raise ImageTooLarge(f"the image has {width} x {height} pixels, a side at most {MAX_SIDE:,}")
            _check_bounded(image, data)
            try:
                return to_square(as_rgb(image), self.size, "crop" if self.centre_crop else "none", None)
            except MemoryError:
                raise ImageTooLarge(f"there is no memory to decode {width} x {height} pixels") from None
            except Exception as error:  # each decoder has its own: OSError, SyntaxError, struct.error, EOFError, ...
                raise NotAnImage(f"cannot decode the {image.format} image: {_reason(error)}") from None


def _check_bounded(image: Image, data: bytes) -> None:
    """Refuse what its format lets take time without bound. No pixel has been decoded yet."""
    if image.format == "BMP" and image.info.get("compression") not in _BMP_UNCOMPRESSED:
        raise NotAnImage("a BMP image must be uncompressed; this one is run-length encoded")
    # Every scan begins with these two bytes, which coded pixels cannot hold. What a phone appends to its photos can, by
    # chance one in 65,536: a film of 6.5 MB before it counts.
    pixels = image.width * image.height
    most = min(MAX_JPEG_SCANS, MAX_SCANNED_PIXELS // pixels)
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > most:
        raise NotAnImage(f"a JPEG image of {pixels:,} pixels must have at most {most} scans; this one has {scans:,}")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
