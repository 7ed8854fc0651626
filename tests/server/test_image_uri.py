"""data: URIs, by the letter."""

from __future__ import annotations

import string
from base64 import b64encode, urlsafe_b64encode
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.server.images.bad import BadImage
from winnow.server.images.uri import IMAGE_TYPES, frames_of, image_of, is_data

FEW = settings(max_examples=200, deadline=None, derandomize=True, database=None)
WORD = st.text(string.ascii_letters + string.digits + "+/=,;:-_% \n", max_size=60)


@FEW
@given(st.binary(min_size=1, max_size=200), st.sampled_from(IMAGE_TYPES), st.booleans())
def test_what_goes_in_comes_out(data: bytes, kind: str, is_loud: bool) -> None:
    head = f"data:{kind};base64,"
    url = (head.upper() if is_loud else head) + b64encode(data).decode()
    assert is_data(url)
    assert image_of(url, len(data)) == data
    with pytest.raises(BadImage) as told:
        image_of(url, len(data) - 1)
    assert told.value.code == "image_too_large"


@FEW
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5))
def test_frames(frames: list[bytes]) -> None:
    url = "data:video/jpeg;base64," + ",".join(b64encode(frame).decode() for frame in frames)
    assert frames_of(url, 40, 5) == frames
    with pytest.raises(BadImage):
        frames_of(url, 40, len(frames) - 1)


@FEW
@given(st.one_of(WORD, WORD.map("data:image/png;base64,".__add__), WORD.map("data:".__add__), st.text(max_size=40)))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (lambda: image_of(text, 1000), lambda: frames_of(text, 1000, 4)):
        with suppress(BadImage):
            assert read()


@FEW
@given(st.binary(min_size=1, max_size=60), st.integers(0, 100), st.sampled_from(" \n-_.,;é%=\0"))
def test_one_wrong_character(data: bytes, place: int, char: str) -> None:
    text = b64encode(data).decode()
    at = place % len(text)
    with pytest.raises(BadImage) as told:
        image_of(f"data:image/png;base64,{text[:at]}{char}{text[at:]}", 1000)
    assert told.value.code == "invalid_base64_image"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png;base64,QUJD====", "invalid_base64_image"),
        ("data:image/png;base64,QUJDR", "invalid_base64_image"),  # no padding
        ("data:image/png;base64,QUJDRA=", "invalid_base64_image"),  # half of it
        ("data:image/png;base64,=QUJ", "invalid_base64_image"),
        ("data:image/png;base64," + urlsafe_b64encode(b"\xff\xfe\xfd").decode(), "invalid_base64_image"),
        ("data:image/png,QUJD", "invalid_image_url"),  # not base64
        ("data:;base64,QUJD", "invalid_image_url"),
        ("data:image/png;charset=utf-8;base64,QUJD", "invalid_image_url"),
        ("data:image/png;base64", "invalid_image_url"),
        ("data:" + "a" * 10_000 + "/png;base64,QUJD", "invalid_image_url"),
        ("data:image/svg+xml;base64,QUJD", "unsupported_image_media_type"),
        ("data:text/html;base64,QUJD", "unsupported_image_media_type"),
        ("data:video/jpeg;base64,QUJD", "unsupported_image_media_type"),
    ],
)
def test_refused(url: str, code: str) -> None:
    with pytest.raises(BadImage) as told:
        image_of(url, 1000)
    assert told.value.code == code


def test_refused_videos() -> None:
    for url, code in (
        ("data:video/mp4;base64,QUJD", "unsupported_image_media_type"),
        ("data:video/jpeg;base64,QUJD,", "empty_image_file"),
        ("data:video/jpeg;base64,QUJD,QUJ!", "invalid_base64_image"),
        ("data:video/jpeg;base64," + "QUJD," * 100_000, "image_too_large"),
    ):
        with pytest.raises(BadImage) as told:
            frames_of(url, 1000, 8)
        assert told.value.code == code
