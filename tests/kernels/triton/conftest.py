"""Without a GPU these tests run in Triton's interpreter, with what it gets wrong put right."""

from triton import knobs

if knobs.runtime.interpret:
    from .interpreter import install

    install()
