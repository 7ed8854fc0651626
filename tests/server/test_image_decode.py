"""Bytes of all sorts, and what becomes of their pixels."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from winnow.server.images.bad import BadImage
from winnow.server.images.decode import FORMATS, Bounds, decode_image, decode_video
from winnow.server.settings import load

BOUNDS = Bounds(max_pixels=1 << 22, max_video_pixels=1 << 16, max_frames=8, min_side=4, max_aspect=200)
FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def encoded(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def picture(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    """Four corners of different colours."""
    image = Image.new("RGB", (width, height), (200, 30, 40))
    image.paste((20, 180, 60), (width // 2, 0, width, height // 2))
    image.paste((30, 40, 210), (0, height // 2, width // 2, height))
    image.paste((240, 240, 10), (width // 2, height // 2, width, height))
    return image.quantize(16) if mode == "P" else image.convert(mode)


def near(image: Image.Image, wanted: Image.Image, most: int = 12) -> bool:
    assert image.mode == "RGB" and image.size == wanted.size
    inner = (slice(2, 5), slice(2, 5))  # a corner, away from edges that lossy formats blur
    apart = np.abs(np.asarray(image).astype(int) - np.asarray(wanted.convert("RGB")).astype(int))
    return int(apart[inner].max()) <= most


@pytest.mark.parametrize(
    ("mode", "fmt", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGB", "JPEG", {"quality": 95}),
        ("RGB", "WEBP", {"lossless": True}),
        ("P", "GIF", {}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("CMYK", "JPEG", {"quality": 95}),
        ("RGB", "JPEG", {"quality": 95, "progressive": True}),
    ],
)
def test_formats(mode: str, fmt: str, options: dict[str, Any]) -> None:
    assert near(decode_image(encoded(picture(mode=mode), fmt, **options), BOUNDS), picture(), 24)


def test_grey() -> None:
    for mode in ("L", "1", "LA"):
        grey = picture(mode="L").convert(mode)
        assert near(decode_image(encoded(grey), BOUNDS), grey.convert("L"))


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = (np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) << 8) | 0x7F
    image = Image.fromarray(values)
    assert image.mode.startswith("I")
    read = np.asarray(decode_image(encoded(image), BOUNDS))
    assert (read == (values >> 8)[..., None]).all()


def test_what_is_transparent_lies_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 128), (0, 0, 4, 8))
    read = np.asarray(decode_image(encoded(image), BOUNDS))
    assert (read[:, 4:] == 255).all()
    assert np.abs(read[:, :4].astype(int) - (127, 127, 255)).max() <= 1
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (np.asarray(decode_image(encoded(palette, "GIF", transparency=1), BOUNDS)) == 255).all()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(fmt: str, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the turn that a camera's rotation was
    stored = picture() if orientation == 1 else picture().transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"lossless": True} if fmt == "WEBP" else {"quality": 95} if fmt == "JPEG" else {}
    assert near(decode_image(encoded(stored, fmt, exif=exif, **options), BOUNDS), picture(), 24)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as Pillow logs it
def test_exif_that_is_damaged_says_nothing() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        assert near(decode_image(encoded(picture(), "JPEG", quality=95, exif=exif), BOUNDS), picture(), 24)


def test_of_an_animation_the_first_frame() -> None:
    frames = [picture(), Image.new("RGB", (24, 16), "black")]
    for fmt in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], lossless=True)
        assert near(decode_image(data, BOUNDS), picture())


def test_low_detail() -> None:
    assert decode_image(encoded(picture(1024, 256)), BOUNDS, is_low=True).size == (512, 128)
    assert decode_image(encoded(picture(512, 512)), BOUNDS, is_low=True).size == (512, 512)
    assert decode_image(encoded(picture(100, 90)), BOUNDS, is_low=True).size == (100, 90)
    with pytest.raises(BadImage, match="512x3"):  # nothing is left of its height
        decode_image(encoded(picture(2000, 10)), BOUNDS, is_low=True)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of zeros: next to nothing in bytes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(min(1 << 24, height * (1 + 3 * width))))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG with a comment of 256 MB in a few kilobytes."""
    plain = encoded(picture())
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    return plain[:33] + chunk(b"zTXt", b"Comment\0\0" + packed) + plain[33:]


def frame(width: int, height: int) -> bytes:
    """Of a GIF: next to nothing is in it, and it is to be wiped away by the next one."""
    head = b"!\xf9\x04\x08\0\0\0\0," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return head + b"\x02\x02\x44\x01\0"


LARGER = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x80, 0, 0) + bytes(6) + frame(8000, 8000) + b";"
"""One whose first frame is larger than it says that it is"""


def scans(image: Image.Image, more: int, before: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes so many times again, behind a marker."""
    data = encoded(image, "JPEG", progressive=True)
    return data[:-2] + before + data[data.rindex(b"\xff\xda") : -2] * more + data[-2:]


SIZES = {
    "one pixel": (encoded(picture(1, 1)), "image_too_small"),
    "a line": (encoded(picture(20_000, 1)), "image_too_small"),
    "nearly a line": (encoded(picture(4_000, 4)), "image_too_large"),
    "too many pixels": (encoded(Image.new("L", (4096, 1025))), "image_too_large"),
    "a bomb": (bomb(50_000, 50_000), "image_too_large"),
    "the largest PNG": (bomb(2**31 - 1, 2**31 - 1), "image_too_large"),
    "pixels are missing": (bomb(2000, 2000)[:-5000], "image_parse_error"),
    "a bomb of text": (text_bomb(), "image_parse_error"),
    "a frame larger than its GIF": (LARGER, "image_too_large"),
    "a JPEG that is painted over": (scans(picture(), 300), "image_too_large"),
    "behind a marker without a length": (scans(picture(), 300, b"\xff\x01"), "image_too_large"),
}


@pytest.mark.parametrize(("data", "code"), SIZES.values(), ids=SIZES.keys())
def test_sizes(data: bytes, code: str) -> None:
    tracemalloc.start()
    with pytest.raises(BadImage) as told:
        decode_image(data, BOUNDS)
    assert tracemalloc.get_traced_memory()[1] < 70 << 20  # what Python holds; a text may be unpacked to 64 MiB
    tracemalloc.stop()
    assert told.value.code == code


def test_room_for_a_frame_is_made_when_its_size_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow fills what a frame is to leave behind while it opens a GIF, or goes on to the frame."""
    filled: list[int] = []
    fill = Image.core.fill

    def watched(mode: str, size: tuple[int, int], *colour: Any) -> Any:
        filled.append(size[0] * size[1])
        return fill(mode, size, *colour)

    monkeypatch.setattr(Image.core, "fill", watched)
    with pytest.raises(BadImage, match="more pixels"):
        decode_image(LARGER, BOUNDS)
    with pytest.raises(BadImage, match="more pixels"):
        decode_video([encoded(picture(16, 16, "P"), "GIF")[:-1] + frame(8000, 8000) + b";"], BOUNDS)
    assert max(filled, default=0) <= BOUNDS.max_pixels


def test_scans_of_a_jpeg() -> None:
    """What is not scanned may look like one: a thumbnail in its header, a film behind its end."""
    whole = picture(64, 48)
    assert near(decode_image(scans(whole, 50), BOUNDS), whole, 24)
    plain = encoded(whole, "JPEG", quality=95)
    noise = b"\xff\xda" * 300
    header = b"\xff\xe1" + struct.pack(">H", len(noise) + 2) + noise
    assert near(decode_image(plain[:2] + header + plain[2:] + noise, BOUNDS), whole, 24)


@pytest.mark.parametrize("fmt", FORMATS)
def test_truncated(fmt: str) -> None:
    data = encoded(picture(64, 64), fmt)
    for length in (1, 10, 30, len(data) // 2):
        with pytest.raises(BadImage) as told:
            decode_image(data[:length], BOUNDS)
        assert told.value.code in ("image_parse_error", "unsupported_image_media_type")


@FEW
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=12))
def test_corrupted_bytes_are_read_or_refused(fmt: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(picture(32, 32), fmt))
    for at, value in changes:
        data[at % len(data)] = value
    with suppress(BadImage):
        assert decode_image(bytes(data), BOUNDS).mode == "RGB"


@FEW
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP"]),
    st.binary(max_size=300),
)
def test_any_bytes_are_refused(head: bytes, rest: bytes) -> None:
    with pytest.raises(BadImage):
        decode_image(head + rest, BOUNDS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%PDF-1.7 ...",
        encoded(picture(), "BMP"),
        encoded(picture(), "TIFF"),
        encoded(picture(), "ICO"),
        encoded(picture(), "PPM"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_other_types(data: bytes) -> None:
    with pytest.raises(BadImage) as told:
        decode_image(data, BOUNDS)
    assert told.value.code == ("unsupported_image_media_type" if data else "empty_image_file")


def test_frames_of_a_video() -> None:
    frames = [Image.new("RGB", (16, 12), (20 * i, 0, 0)) for i in range(5)]
    for parts in (
        [encoded(frame, "PNG") for frame in frames],
        [encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])],
    ):
        read = decode_video(parts, BOUNDS)
        assert [frame.getpixel((3, 3)) for frame in read] == [(20 * i, 0, 0) for i in range(5)]
        assert {(frame.mode, frame.size) for frame in read} == {("RGB", (16, 12))}
    assert len(decode_video([encoded(frames[0], "JPEG")], BOUNDS)) == 1


def test_bounds_of_videos() -> None:
    small, large = encoded(picture(16, 16)), encoded(picture(128, 128))
    for parts, why in (
        ([small] * 9, "frames"),
        ([encoded(picture(8, 8), "GIF", save_all=True, append_images=[picture(8, 8, "L")] * 8)], None),
        ([large] * 5, "each of 5 frames"),
        ([small, large], "several sizes"),
        ([small, *[large] * 4], "each of 5 frames"),
        ([small, b"x"], "no PNG"),
        ([small, small[:60]], "damaged"),
    ):
        if why is None:  # equal frames are one in a GIF
            assert len(decode_video(parts, BOUNDS)) <= 8
            continue
        with pytest.raises(BadImage, match=why):
            decode_video(parts, BOUNDS)
    colours = [Image.new("RGB", (8, 8), (i * 20, 0, 0)) for i in range(9)]
    with pytest.raises(BadImage, match="more frames"):
        decode_video([encoded(colours[0], "GIF", save_all=True, append_images=colours[1:])], BOUNDS)


def test_defaults() -> None:
    bounds = Bounds.of(load())
    bounds.check(4000, 3000)
    bounds.check(8000, 40)
    for size in ((1, 1), (20_000, 1), (4097, 4096), (20_000, 90)):
        with pytest.raises(BadImage):
            bounds.check(*size)
