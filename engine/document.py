"""Documents: the beginning of a prompt, compressed by a plan of scope 'document' before the rest is read.

    prompt:    [ document | question ]      compressed when its last token has been read; whatever is asked of it
    lanes:     [ what the plan left | question | answer ]

What is left of a document depends on the document, the plan and nothing else, so that requests with other questions
share it (prefix_cache.py). The last token of a prompt, from which the answer begins, belongs to the question always.
"""

from __future__ import annotations

from hashlib import blake2b

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import RequestError
from winnow.engine.messages import Submit
from winnow.engine.pages import Ints


def document_tokens(request: Submit, plan: Plan) -> int:
    """Tokens of the prompt that are compressed at once: all where there is no question.

    Raises:
        RequestError: the document ends beyond the prompt, or the plan has no place for it
    """
    length = len(request.prompt)
    if not 0 <= request.document < length:
        raise RequestError("document", f"document must be below {length}, the prompt's tokens")
    if request.document and plan.kv.scope is None:
        raise RequestError("document", "a document needs a plan of scope 'document'")
    return request.document or length


def document_seed(document: Ints) -> int:
    """Of the random draws of its policy, 64 bits: not the request's own, which would keep it to itself."""
    return int.from_bytes(blake2b(document.tobytes(), digest_size=8).digest(), "little")
