"""Uploaded files to pixels: every kind of image a client may send, and what is none."""

import struct
import zlib

import numpy
import pytest

pytest.importorskip("PIL")

import torch
from PIL import Image
from serving_fakes import encoded

from alore_ext.serving.errors import ImageTooLarge, NotAnImage
from alore_ext.serving.images import Decoder
from alore_ext.training.data import FileSplit
from alore_ext.training.images import crop_boxes, resized_crop
from alore_ext.training.loader import InputSpec, make_loader

DECODE = Decoder(16, 1_000_000)


@pytest.fixture(scope="module")
def picture():
    """A smooth image with a bright corner, wider than high."""
    y, x = numpy.mgrid[0:40, 0:60]
    pixels = numpy.stack([4 * x, 6 * y, 120 + x], axis=2)
    pixels[:12, :12] = 250
    return Image.fromarray(pixels.astype(numpy.uint8))


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_pixels_are_those_of_evaluation(picture, tmp_path, augment):
    decode = Decoder(16, 1_000_000, centre_crop=augment == "crop")
    pixels = decode(encoded(picture))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16)
    file = tmp_path / "image.png"
    picture.save(file)
    split = FileSplit((str(file),), torch.tensor([0]))
    spec = InputSpec(16, (0.0,) * 3, (1 / 255,) * 3)
    images, _ = next(make_loader(split, spec, 1, torch.device("cpu"), augment=augment).batches())
    assert torch.equal(images[0].round().byte(), pixels)
    tensor = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None]
    boxes = crop_boxes(torch.tensor([40.0]), torch.tensor([60.0]), augment, None)
    assert (resized_crop(tensor, boxes, 16)[0] - pixels).abs().max() <= 1  # in memory: the same arithmetic in floats


MODES = {
    "PNG": "RGB L 1 P RGBA LA",
    "WEBP": "RGB RGBA",
    "BMP": "RGB L 1 P RGBA",
    "GIF": "L 1 P",
    "JPEG": "RGB L CMYK",
}


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind, modes in MODES.items() for mode in modes.split()])
def test_formats_and_modes(picture, kind, mode):
    image = picture.convert("L").convert("LA") if mode == "LA" else picture.convert(mode)  # there is no RGB to LA
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    difference = DECODE(data).int() - DECODE(encoded(image.convert("RGB"))).int()
    assert difference.abs().max() <= (40 if kind == "JPEG" else 0)


def test_16_bit_gray_is_scaled_and_not_clipped():
    levels = numpy.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(numpy.uint16)
    wide, narrow = Image.fromarray(levels), Image.fromarray((levels >> 8).astype(numpy.uint8))
    assert torch.equal(DECODE(encoded(wide)), DECODE(encoded(narrow)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, orientation):
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = picture.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert torch.equal(DECODE(encoded(stored, exif=exif)), DECODE(encoded(picture)))


def test_damaged_exif_is_ignored(picture):
    data = encoded(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage", quality=95)
    assert torch.equal(DECODE(data), DECODE(encoded(picture, "JPEG", quality=95)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(picture, kind):
    frames = [picture, Image.new("RGB", picture.size, "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    expected = DECODE(encoded(frames[0], kind, **options))
    assert torch.equal(DECODE(data), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 999), (3000, 1), (16, 16)])
def test_any_shape_fits(size):
    assert DECODE(encoded(Image.new("RGB", size, (9, 8, 7))))[:, 0, 0].tolist() == [9, 8, 7]


def test_truncated_anywhere_is_refused_or_decoded_but_never_another_error(picture):
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        data = encoded(picture, kind)
        for length in range(0, len(data) - 1, max(1, len(data) // 40)):
            try:
                DECODE(data[:length])
            except NotAnImage:
                pass
        with pytest.raises(NotAnImage):
            DECODE(data[: len(data) // 2])


def test_damaged_bytes_are_refused_or_decoded_but_never_another_error(picture):
    rng = numpy.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        data = numpy.frombuffer(encoded(picture, kind), numpy.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            try:
                DECODE(broken.tobytes())
            except (NotAnImage, ImageTooLarge):
                pass


@pytest.mark.parametrize(
    "data", [b"", b"hallo", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"]
)
def test_what_is_no_image(data):
    with pytest.raises(NotAnImage):
        DECODE(data)


def test_formats_that_are_not_read(picture):
    """Pillow could: EPS would start Ghostscript, PPM as text and TIFF take time without bound."""
    for kind in ("EPS", "ICO", "PDF", "PPM", "TGA", "TIFF"):
        with pytest.raises(NotAnImage, match="known: BMP, GIF, JPEG"):
            DECODE(encoded(picture, kind))


def progressive_jpeg(scans, size=(64, 64)):
    """One whose last scan is repeated."""
    data = encoded(Image.new("RGB", size, "red"), "JPEG", progressive=True)
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:end] + data[last:end] * (scans - data.count(b"\xff\xda")) + data[end:]


def test_scans_of_a_jpeg_are_bounded():
    """Each takes as long as the image is large, in some bytes of the file."""
    assert DECODE(progressive_jpeg(100)).shape == (3, 16, 16)
    with pytest.raises(NotAnImage, match="at most 100 scans; this one has 101"):
        DECODE(progressive_jpeg(101))
    with pytest.raises(NotAnImage, match="of 20,000,000 pixels must have at most 50 scans; this one has 51"):
        Decoder(16, 50_000_000)(progressive_jpeg(51, (5000, 4000)))


def rle_bmp(width, height, data):
    palette = b"".join(bytes([255 - i, i, i, 0]) for i in range(256))
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + palette + data


@pytest.mark.parametrize("data", [rle_bmp(8, 2, b"\x08\x01\0\0" * 2), rle_bmp(900, 900, b"\x01\x05\0\0" * 900)])
def test_a_run_length_encoded_bmp_is_refused(data):
    with pytest.raises(NotAnImage, match="BMP image must be uncompressed"):
        DECODE(data)


def test_text_of_pixels_is_refused():
    with pytest.raises(NotAnImage, match="known: BMP, GIF, JPEG, PNG, WEBP"):
        DECODE(b"P3\n2 2\n255\n" + b"#\n" * 1000 + b"1 " * 12)


@pytest.mark.parametrize("size", [(1, 32_769), (32_769, 1), (1, 999_999)])
def test_a_side_is_bounded(size):
    """Resizing makes rows of the model's width of each row first."""
    with pytest.raises(ImageTooLarge, match="a side at most 32,768"):
        DECODE(png_header(*size))
    assert DECODE(encoded(Image.new("L", (1, 32_768)))).shape == (3, 16, 16)


def test_an_image_that_memory_does_not_hold_is_too_large(picture, monkeypatch):
    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr("alore_ext.serving.images.to_square", no_memory)
    with pytest.raises(ImageTooLarge, match="no memory to decode 60 x 40"):
        DECODE(encoded(picture))


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1001, 1000), (2**31 - 1, 1), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_announces_too_much_is_refused_by_it(size):
    with pytest.raises(ImageTooLarge, match="1,000,000"):
        DECODE(png_header(*size))


def test_a_bomb_of_text_is_refused():
    data = png_header(8, 8)
    body = zlib.compress(b"x" * 200_000_000, 9)
    text = b"zTXt" + b"comment\0\0" + body
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    with pytest.raises(NotAnImage):
        DECODE(data[:33] + chunk + data[33:])
