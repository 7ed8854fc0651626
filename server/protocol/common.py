"""What chat and completions requests share.

Rules of every request body: unknown fields are refused by name; null means unset; a field that would change the
output and is not supported is refused; harmless ones are accepted and ignored. Bounds that are settings are checked
by `check_limits`, all others are in the types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import RequestError
from winnow.engine.messages import SamplingParams
from winnow.engine.speculation.speculation import SPECULATION
from winnow.server.settings import Settings

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that a model's generation_config.json may have values for"""


class Unsupported:
    """Marks a field that we know and do not honour: only null and the values that mean nothing are accepted."""

    def __init__(self, why: str, *harmless: Any):
        self.why = why
        self.harmless = harmless

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.harmless], "description": f"Not supported: {self.why}."}

    def _check(self, value: Any) -> None:
        if value is not None and value not in self.harmless:
            raise ValueError(self.why)


class Body(BaseModel):
    """A request body or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError("must be a JSON object")
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}


class StreamOptions(Body):
    include_usage: bool = Field(False, description="send a last chunk with the usage of the whole request")
    include_obfuscation: Annotated[Any, Unsupported("chunks are never padded", False)] = None


def one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class PlanSchema:
    """Shows a plan's fields in OpenAPI; what a request holds there is checked by `Plan.resolve`, which errs better."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(Plan.__pydantic_core_schema__)]}


class SpeculationSchema:
    """As `PlanSchema`, for what `parse_speculation` checks."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        none = {"type": "object", "additionalProperties": False, "description": "No speculation"}
        return {"anyOf": [none, handler(SPECULATION.core_schema)]}


_STOP = {"type": "string", "minLength": 1}
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(one_or_more),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP}]}),
]
Token = Annotated[int, Field(ge=0, le=INT32_MAX)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class GenerationRequest(Body):
    """Fields of chat and of completions."""

    model: str | None = Field(None, max_length=512, description="one of the names that /v1/models lists")

    # Sampling
    temperature: Finite = Field(1.0, ge=0, le=2, description="0: always the likeliest token")
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=INT32_MAX, description="0 or -1: no limit")
    min_p: Finite = Field(0.0, ge=0, le=1)
    repetition_penalty: Finite = Field(1.0, gt=0, le=2)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] = Field({}, description="by token id")
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    n: int = Field(1, ge=1, le=INT32_MAX, description="choices per prompt")

    # Length and end
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    min_tokens: int = Field(0, ge=0, le=INT32_MAX, description="no end token, stop string or stop token before")
    stop: Stops = Field([], description="strings that end the output")
    stop_token_ids: list[Token] = Field([])
    ignore_eos: bool = False

    # Form of the answer
    stream: bool = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    # Memory
    compression: Annotated[str | dict[str, Any] | None, PlanSchema] = Field(
        None, description="a plan, or the name of a profile that /v1/models lists"
    )
    cache_salt: str = Field("", max_length=256, description="prefixes are shared under an equal salt only")

    # Speed
    speculative: Annotated[dict[str, Any] | None, SpeculationSchema] = Field(
        None, description="how to guess tokens ahead; answers stay the same, token for token. `{}`: not at all"
    )

    # Accepted, without effect on the answer
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        for key in bias:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= INT32_MAX):
                raise ValueError("its keys are token ids")
        return bias

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "stream_options needs stream: true", "invalid_value")
        return self

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def logprobs_asked(self) -> int | None:
        """None: none; else how many of the likeliest tokens."""
        raise NotImplementedError

    @property
    def output_limit(self) -> int | None:
        """Tokens to generate at most; None: unset."""
        raise NotImplementedError

    def check_limits(self, limits: Settings) -> None:
        """Refuses what a setting bounds.

        Raises
            RequestError
        """
        at_most("n", self.n, limits.max_n)
        at_most("stop", len(self.stop), limits.max_stop_strings, "strings")
        for i, text in enumerate(self.stop):
            at_most(f"stop[{i}]", len(text), limits.max_stop_chars, "characters")
        at_most("stop_token_ids", len(self.stop_token_ids), limits.max_stop_token_ids, "ids")
        at_most("logit_bias", len(self.logit_bias), limits.max_logit_bias, "entries")

    def check_vocabulary(self, vocab_size: int) -> None:
        for key in self.logit_bias:
            if int(key) >= vocab_size:
                raise RequestError(f"logit_bias.{key}", f"the vocabulary has {vocab_size} tokens", "invalid_value")
        for i, token in enumerate(self.stop_token_ids):
            if token >= vocab_size:
                raise RequestError(f"stop_token_ids[{i}]", f"the vocabulary has {vocab_size} tokens", "invalid_value")

    def sampling(self, defaults: GenerationRequest, end_tokens: tuple[int, ...], max_tokens: int) -> SamplingParams:
        """For the engine, with the model's own defaults and end tokens, and the limit that the prompt leaves."""
        ends = () if self.ignore_eos else end_tokens
        named = {name: getattr(self if name in self.model_fields_set else defaults, name) for name in SAMPLING_DEFAULTS}
        named["top_k"] = max(named["top_k"], 0)
        return SamplingParams(
            **named,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(key): value for key, value in self.logit_bias.items()},
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(dict.fromkeys((*ends, *self.stop_token_ids))),
            logprobs=self.logprobs_asked,
            n=self.n,
        )


def at_most(param: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        what = f" {unit}" if unit else ""
        raise RequestError(param, f"{param}: {value}{what}, and this server takes at most {limit}", "limit_exceeded")
