"""The vision policies by name. A new one is a file in `policies/` and a line here; nothing else names it.

The request schema, the OpenAPI page, `/v1/models`, METHODS.md and the conformance tests follow from this table.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from winnow.engine.compression.vision.policy import VisionPolicy

VISION: dict[str, str] = {
    "random": "winnow.engine.compression.vision.policies.random:Random",
    "uniform": "winnow.engine.compression.vision.policies.uniform:Uniform",
}


@cache
def vision_policy(name: str) -> VisionPolicy:
    """The one instance of the policy; KeyError if there is none of this name."""
    module, attribute = VISION[name].split(":")
    policy: VisionPolicy = getattr(import_module(module), attribute)()
    return policy
