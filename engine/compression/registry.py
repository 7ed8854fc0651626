"""The policies by name. A new one is a file in its folder and a line here; nothing else names it.

The request schema, the OpenAPI page, `/v1/models` and the conformance tests follow from this table.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from winnow.engine.compression.merge import MergeMethod
from winnow.engine.compression.policy import EvictionPolicy
from winnow.engine.compression.prompt.policy import PromptPolicy
from winnow.engine.compression.read_policy import ReadPolicy

if TYPE_CHECKING:
    from winnow.engine.compression.mix import MixMethod

EVICTION: dict[str, str] = {
    "streaming_llm": "winnow.engine.compression.eviction.streaming_llm:StreamingLLM",
    "snapkv": "winnow.engine.compression.eviction.snapkv:SnapKV",
    "h2o": "winnow.engine.compression.eviction.h2o:H2O",
    "a2sf": "winnow.engine.compression.eviction.a2sf:A2SF",
    "keyformer": "winnow.engine.compression.eviction.keyformer:Keyformer",
    "tova": "winnow.engine.compression.eviction.tova:TOVA",
    "knorm": "winnow.engine.compression.eviction.knorm:KNorm",
    "keydiff": "winnow.engine.compression.eviction.keydiff:KeyDiff",
    "tri_attention": "winnow.engine.compression.eviction.tri_attention:TriAttention",
    "razor_attention": "winnow.engine.compression.eviction.razor_attention:RazorAttention",
    "prompt_distill": "winnow.engine.compression.eviction.prompt_distill:PromptDistill",
    "ems": "winnow.engine.compression.eviction.ems:EMS",
    "lagkv": "winnow.engine.compression.eviction.lagkv:LagKV",
    "expected_attention": "winnow.engine.compression.eviction.expected_attention:ExpectedAttention",
    "lacache": "winnow.engine.compression.eviction.lacache:LaCache",
    "kvzip": "winnow.engine.compression.eviction.kvzip:KVzip",
    "spec_kv": "winnow.engine.compression.eviction.spec_kv:SpecKV",
    "random": "winnow.engine.compression.eviction.random:Random",
}

PROMPT: dict[str, str] = {
    "selective": "winnow.engine.compression.prompt.selective:Selective",
    "extractive": "winnow.engine.compression.prompt.extractive:Extractive",
    "llmlingua2": "winnow.engine.compression.prompt.llmlingua2:LLMLingua2",
    "spec_pc": "winnow.engine.compression.prompt.spec_pc:SpecPC",
}

READ: dict[str, str] = {
    "quest": "winnow.engine.compression.selection.quest:Quest",
    "tidal_decode": "winnow.engine.compression.selection.tidal_decode:TidalDecode",
    "double_sparsity": "winnow.engine.compression.selection.double_sparsity:DoubleSparsity",
    "token_select": "winnow.engine.compression.selection.token_select:TokenSelect",
}


MERGE: dict[str, str] = {
    "kv_merging": "winnow.engine.compression.merging.kv_merging:KVMerging",
    "ems": "winnow.engine.compression.merging.ems:EMS",
    "compensation": "winnow.engine.compression.merging.compensation:Compensation",
}

OWN_MERGE: dict[str, str] = {"ems": "ems", "razor_attention": "compensation"}
"""Eviction policies whose papers merge what they evict: the method that `merge` is unless the caller says otherwise."""

MIX: dict[str, str] = {
    "mikv": "winnow.engine.compression.mixing.mikv:MiKV",
    "zipcache": "winnow.engine.compression.mixing.zipcache:ZipCache",
    "zipvl": "winnow.engine.compression.mixing.zipvl:ZipVL",
    "mini_cache": "winnow.engine.compression.mixing.mini_cache:MiniCache",
}


@cache
def eviction_policy(name: str) -> EvictionPolicy:
    """The one instance of the policy, or of the mix method that chooses like one; KeyError if there is none of this
    name."""
    policy: EvictionPolicy = _made((EVICTION if name in EVICTION else MIX)[name])
    return policy


@cache
def merge_method(name: str) -> MergeMethod:
    """The one instance of the merge method; KeyError if there is none of this name."""
    method: MergeMethod = _made(MERGE[name])
    return method


@cache
def prompt_policy(name: str) -> PromptPolicy:
    """The one instance of the policy; KeyError if there is none of this name."""
    policy: PromptPolicy = _made(PROMPT[name])
    return policy


@cache
def read_policy(name: str) -> ReadPolicy:
    """The one instance of the policy; KeyError if there is none of this name."""
    policy: ReadPolicy = _made(READ[name])
    return policy


@cache
def mix_method(name: str) -> MixMethod:
    """The one instance of the mix method; KeyError if there is none of this name."""
    method: MixMethod = _made(MIX[name])
    return method


def _made(place: str) -> Any:
    module, attribute = place.split(":")
    return getattr(import_module(module), attribute)()
