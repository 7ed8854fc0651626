"""Winnow's HTTP front end: OpenAI's API in front of an engine process.

It imports no torch; transformers does, for the image processor of a model that sees.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("winnow")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0.1.0"
