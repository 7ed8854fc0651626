"""What the server and the engine process say to each other: msgspec structs, length-prefixed msgpack frames."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from winnow.kernels.formats import PageFormat


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen. Bounds are those of the OpenAI API where it has them, vLLM's elsewhere."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit"""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Includes the model's end tokens unless `ignore_eos`; the server fills it."""
    logprobs: int | None = None
    """None: none; 0: the chosen token's; n: also the n likeliest at each position."""
    n: int = 1


class Array(msgspec.Struct, frozen=True, array_like=True):
    """Numbers of one type."""

    dtype: str
    """As numpy names it"""
    shape: list[int]
    data: bytes
    """Little-endian, the last axis running fastest"""


class Picture(msgspec.Struct, frozen=True, omit_defaults=True):
    """An image or a video of a prompt, ready for the vision tower."""

    key: bytes
    """16 bytes of blake2b over what the tower reads, the processor's settings included"""
    first: int
    """Place in the prompt of the first placeholder: the tokens with the id in `EngineInfo.sees`"""
    span: int
    """Tokens of the prompt from the first to the last placeholder, with the marks that stand between them"""
    inputs: dict[str, Array]
    """What the tower reads, as the model's image processor names it"""
    text: list[int]
    """Tokens of the text of the message that it came with, without placeholders and marks"""
    turn_end: int
    """Place in the prompt behind the last token of that message's turn"""
    kind: Literal["image", "video"] = "image"


class Submit(msgspec.Struct, frozen=True, tag="submit", omit_defaults=True):
    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    plan: dict[str, Any] = {}
    """A resolved `Plan` as JSON data; empty: no compression."""
    cache_salt: str = ""
    """Requests share cached prefixes only under an equal salt."""
    speculative: dict[str, Any] = {}
    """A `Speculation` as JSON data; empty: none"""
    forced: list[int] = []
    """What the output begins with; it is read after the prompt's plan was carried out, and counts as generated."""
    lead_ins: list[list[int]] = []
    """`recital.lead_ins`, for plans under which the model repeats its prompt"""
    document: int = 0
    """How many of the prompt's first tokens a plan of scope 'document' compresses; 0: nothing follows, all of them"""
    pictures: list[Picture] = []
    """Those that the prompt has placeholders for, in order"""


class ContextPart(msgspec.Struct, frozen=True, array_like=True):
    """A part of a prompt that may be shortened."""

    text: str
    first: int
    """Place of its first token in the prompt"""
    ends: list[int]
    """For each of its tokens, where the token's text ends in `text`, in characters"""


class Shorten(msgspec.Struct, frozen=True, tag="shorten", omit_defaults=True):
    """Asks for what a plan leaves of a prompt; answered with Shortened, and ended early by Abort."""

    request_id: str
    prompt: list[int]
    parts: list[ContextPart]
    plan: dict[str, Any]
    """A `Prompt` as JSON data"""
    question: str = ""
    cache_salt: str = ""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Ends one choice whose text is complete; it is answered with the choice's last output."""

    request_id: str
    index: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    logprob: float
    rank: int
    """1 for the likeliest token"""
    top: list[tuple[int, float]]
    """(token id, logprob), likeliest first"""


class CompressionReport(msgspec.Struct, frozen=True):
    """What was kept of one sequence, measured from its pages at its end."""

    tokens_seen: int
    tokens_kept_min: int
    tokens_kept_mean: float
    tokens_kept_max: int
    bytes_uncompressed: int
    """Bytes of the pages that the same tokens take with no plan"""
    bytes_held: int
    """Bytes of the pages that the sequence's lanes refer to, and of those that stand for what it holds beside them"""
    tokens_by_format: dict[str, float] = {}
    """Page format -> tokens that a lane holds in it, the mean over lanes"""
    tokens_read: int = 0
    """Generated tokens that read a part of the lanes"""
    bytes_read: int = 0
    """Bytes of keys, values and what they were chosen by that those tokens' attention read, counted by the kernels"""
    bytes_read_dense: int = 0
    """Bytes that the same tokens read with no `kv.read`"""
    squeezed_at: int | None = None
    """Tokens it had read when pages ran out and `on_pressure` came into force; None if it did not"""
    document_tokens: int = 0
    """Tokens of the document that was compressed before the rest of the prompt was read; 0 where there is none"""
    found_document: bool = False
    """Whether the prefix cache had it, compressed"""
    image_tokens: int = 0
    """Placeholders of the prompt's images and videos, as it was submitted"""
    image_tokens_kept: int = 0
    """Of these, how many the language model reads, at least in its first layer"""


class Output(msgspec.Struct, frozen=True, tag="output", omit_defaults=True):
    """New tokens of one choice of one request."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    """"stop", "length" or "abort"; the choice is then over"""
    stop_token: int | None = None
    """The stop token id that ended it (it is the last of token_ids)"""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; on the choice's last output"""
    accepted_tokens: int = 0
    """Guessed tokens that became part of the answer; on the choice's last output, like the next"""
    rejected_tokens: int = 0
    compression: CompressionReport | None = None
    """On the choice's last output"""


class Shortened(msgspec.Struct, frozen=True, tag="shortened"):
    request_id: str
    prompt: list[int]
    """The tokens that are left, in order"""
    context_tokens: int
    """Tokens that might have been dropped"""
    context_kept: int


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """The engine refuses a request (kind "request": the sender's error) or lost it (kind "internal")."""

    request_id: str
    kind: str
    message: str
    param: str | None = None
    code: str | None = None


class FrontierPoint(msgspec.Struct, frozen=True):
    """What one plan costs on the loaded model, as `winnow calibrate --frontier` has measured it."""

    name: str
    plan: dict[str, Any]
    """As a request writes it"""
    quality: float
    """Share of tokens whose likeliest one is the uncompressed model's"""
    error: float
    """Standard error of `quality`"""
    memory: float
    """Bytes held, as a share of the uncompressed model's"""


class EngineInfo(msgspec.Struct, frozen=True, tag="info"):
    """Sent once when the model is loaded."""

    model: str
    max_model_len: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    compute_format: str
    page_bytes: int
    page_tokens: int
    """Tokens of a page in the compute format"""
    total_pages: int
    weights: str
    profiles: tuple[str, ...] = ()
    """Methods whose profile of this model exists (`winnow calibrate`)"""
    frontier: tuple[FrontierPoint, ...] = ()
    """What a plan's `quality` chooses from; empty if it was not measured"""
    missing_policies: dict[str, str] = {}
    """Prompt policies whose model this engine lacks, and what to do about it"""
    max_stream_len: int = 0
    """Longest prompt plus output under a plan with compact positions"""
    formats: tuple[str, ...] = tuple(fmt.label for fmt in PageFormat)
    """Page formats that its backend reads"""
    has_windows: bool = False
    """Some layers attend to a window of the newest positions only"""
    device: str = "cpu"
    """Where the model runs: cpu or cuda"""
    draft_max_len: int | None = None
    """Longest text that the draft model reads; None where there is none"""
    refuses: dict[str, str] = {}
    """JSON paths of what a request cannot ask of this engine, and why; a format that it has can be asked for still"""
    sees: dict[str, int] = {}
    """What the model sees ("image", "video") -> the id of the tokens that stand for it in a prompt; empty: only text"""
    video_keep: float | None = None
    """Share that the policy 'evs' leaves of every video, whatever plans say; None: as they say"""


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """Sent after steps (at most every 100 ms) and every second when idle: it is the heartbeat too."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    prefix_query_tokens_total: int = 0
    documents: int = 0
    """Compressed documents in the prefix cache"""
    document_hit_tokens_total: int = 0
    document_query_tokens_total: int = 0
    preemptions_total: int = 0
    evicted_tokens_total: int = 0
    """Lane tokens that policies evicted"""
    freed_bytes_total: int = 0
    """Bytes that compression gave back"""
    squeezes_total: int = 0
    """Sequences compressed further because pages ran out"""
    drafts_total: int = 0
    """Guesses that were verified"""
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
    accepted_tokens_by_place: list[int] = []
    """How often the first, second, ... token of a guess was right"""
    draft_pages_free: int = 0
    """Of the draft model's arena, those of its prefix cache included"""
    draft_pages_total: int = 0
    images_total: int = 0
    """Images and videos that requests came with"""
    image_hits_total: int = 0
    """Those that neither the tower nor a policy had to see again"""
    image_seconds_total: float = 0.0
    """Spent on the others"""
    image_cache_bytes: int = 0
    """Of host memory, that what was made of images takes"""
    steps_total: int = 0
    step_seconds_total: float = 0.0


ToEngine = Submit | Shorten | Abort | Finish | Shutdown
FromEngine = Output | Shortened | Rejected | EngineInfo | EngineStats
