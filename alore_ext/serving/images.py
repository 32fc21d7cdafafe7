"""An uploaded image file to the pixels of the model's input, refusing what is no image or too large to decode."""

from __future__ import annotations

import io
from dataclasses import dataclass

from torch import Tensor

from alore_ext.training.errors import require
from alore_ext.training.pictures import as_rgb, to_square

from .errors import ImageTooLarge, NotAnImage

__all__ = ["FORMATS", "Decoder"]

# Those that `alore-ext finetune` reads. Pillow knows many more, some of which start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class Decoder:
    """Bytes of an image file -> uint8 [3, size, size], cropped and resized as at evaluation."""

    size: int
    max_pixels: int
    centre_crop: bool = False  # the central 7/8, which `--augment crop` is tested on; else the whole image

    def __call__(self, data: bytes) -> Tensor:
        """
        Raises:
            NotAnImage: no image of `FORMATS`, or a damaged one.
            ImageTooLarge: more than `max_pixels`; found out from its header, before any pixel is decoded.
        """
        pillow = require("PIL.Image")
        if not data:
            raise NotAnImage("the image is empty")
        try:
            image = pillow.open(io.BytesIO(data), formats=FORMATS)
        except pillow.DecompressionBombError:
            raise ImageTooLarge(f"the image has more than {self.max_pixels:,} pixels") from None
        except pillow.UnidentifiedImageError:
            raise NotAnImage(f"these {len(data):,} bytes are no image; known: {', '.join(FORMATS)}") from None
        except Exception as error:  # a header that only begins like an image's
            raise NotAnImage(f"cannot read the image: {_reason(error)}") from None
        with image:
            width, height = image.size
            if width * height > self.max_pixels:
                raise ImageTooLarge(f"the image has {width} x {height} pixels, at most {self.max_pixels:,} are taken")
            try:
                rgb = as_rgb(image)
            except Exception as error:  # each decoder has its own: OSError, SyntaxError, struct.error, EOFError, ...
                raise NotAnImage(f"cannot decode the {image.format} image: {_reason(error)}") from None
        return to_square(rgb, self.size, "crop" if self.centre_crop else "none", None)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
