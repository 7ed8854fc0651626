"""Without a GPU these tests run in Triton's interpreter, with what it gets wrong put right and every access watched."""

from collections.abc import Iterator

import pytest
from triton import knobs

if knobs.runtime.interpret:
    from .bytes import watching
    from .interpreter import install

    install()

    @pytest.fixture(autouse=True)
    def watched() -> Iterator[None]:
        """An access out of bounds, or of what another program writes, fails the test."""
        with watching(remember=False):
            yield
