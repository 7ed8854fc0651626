"""What a request may ask of vLLM, in its words. Nothing here imports vllm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from winnow.engine.errors import RequestError
from winnow.engine.messages import SamplingParams, TokenLogprob

LEAST_TEMPERATURE = 0.01
"""vLLM raises what is below, and is no longer greedy, to this"""
GREEDY_BELOW = 1e-5
SEEDS = 2**63
"""vLLM takes -1 for no seed: seeds are brought into [0, SEEDS)"""

REFUSES = {
    "compression.kv.evict": "vLLM keeps every token",
    "compression.kv.mix": "vLLM holds all tokens in one format",
    "compression.kv.format": (
        "vLLM holds the keys and values of all requests in one format, which the server is started with "
        "(--vllm-arg kv_cache_dtype=fp8)"
    ),
    "compression.kv.residual": "vLLM leaves no token unquantized",
    "compression.kv.read": "vLLM reads every token",
    "compression.kv.scope": "vLLM reads documents and questions alike",
    "compression.vision": (
        "vLLM prunes no images, and of videos all or none: by evs, where the server is started with it "
        "(--vllm-arg video_pruning_rate=...)"
    ),
    "compression.prompt": "vLLM shortens no prompts",
    "compression.on_pressure": "vLLM makes room by preempting",
    "compression.quality": "no plan but the format that it was started with can be carried out by vLLM",
    "speculative": "vLLM guesses for all requests or for none (--vllm-arg speculative_config=...)",
    "forced": "vLLM cannot be told how its output begins",
}
"""What `EngineInfo.refuses` says of it"""


def refusals(video_keep: float | None) -> dict[str, str]:
    """The same of a server that prunes videos: `EngineInfo.video_keep`."""
    if video_keep is None:
        return REFUSES
    plan = f'{{"policy": "evs", "keep": {video_keep}}}'
    return REFUSES | {"compression.vision": f"this server's vLLM prunes every video by {plan}, and no image"}


class Logprob(Protocol):
    """vLLM's"""

    logprob: float
    rank: int | None


def sampling_fields(sampling: SamplingParams, index: int) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams for choice `index` of a request, which runs as a request of its own.

    Each has its namesake but these: stop strings are found by the server; end tokens come among the stop tokens, so
    that vLLM must not look for its own; every choice has a seed of its own, as vLLM gives them.

    Raises
        RequestError: it names the field that vLLM would not take at its word
    """
    if GREEDY_BELOW <= sampling.temperature < LEAST_TEMPERATURE:
        message = f"temperature must be 0 or at least {LEAST_TEMPERATURE}: vLLM knows none between"
        raise RequestError("temperature", message, "invalid_value")
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "seed": None if sampling.seed is None else (sampling.seed + index) % SEEDS,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "ignore_eos": True,
        "stop_token_ids": list(sampling.stop_token_ids),
        "logprobs": sampling.logprobs,
        "n": 1,
        "detokenize": False,
    }


def token_logprobs(
    tokens: Sequence[int], positions: Sequence[Mapping[int, Logprob] | None], asked: int
) -> list[TokenLogprob]:
    """Of new tokens: vLLM gives, for each, the token's own logprob and those of the `asked` likeliest."""
    said = []
    for token, position in zip(tokens, positions, strict=True):
        assert position is not None
        ranked = sorted(position.items(), key=lambda entry: entry[1].rank or 0)
        # The token comes on top of the likeliest where it is none of them.
        top = [(other, of.logprob) for other, of in ranked if other != token or len(position) <= asked]
        said.append(TokenLogprob(position[token].logprob, position[token].rank or 0, top))
    return said
