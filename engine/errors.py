"""The one tree of errors; the server maps it to HTTP in one place.

WinnowError
├── RequestError            400  the caller can mend it; `param` is the JSON path of what is wrong
│   ├── PlanNotSupported         a combination that cannot be honoured, and which part to change
│   └── PromptTooLong
├── ModelError                   the model cannot be loaded; said at start-up, never over HTTP
├── EvalError                    an evaluation that cannot be made as it was asked for; said by the command
├── Overloaded              503  with `retry_after_s`
└── EngineDied              503  the request was lost, the server lives
"""

from __future__ import annotations


class WinnowError(Exception):
    """Base of all errors that Winnow raises on purpose."""


class RequestError(WinnowError):
    """The request is wrong in a way its sender can mend."""

    def __init__(self, param: str | None, message: str, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.message = message
        self.code = code


class PlanNotSupported(RequestError):
    """The compression asked for cannot be honoured."""

    def __init__(self, param: str, message: str):
        super().__init__(param, message, "compression_not_supported")


class PromptTooLong(RequestError):
    """The prompt, or the prompt with what may be generated, does not fit."""

    def __init__(self, param: str, message: str):
        super().__init__(param, message, "context_length_exceeded")


class ModelError(WinnowError):
    """The model's files are missing, damaged or of an unsupported kind."""


class EvalError(WinnowError):
    """An evaluation cannot be made as it was asked for: an option, a plan, a server that does not answer."""


class Overloaded(WinnowError):
    """The queue is full; the same request may succeed later."""

    def __init__(self, message: str, retry_after_s: int = 1):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDied(WinnowError):
    """The engine process ended while it held the request."""
