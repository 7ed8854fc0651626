"""The server's settings. What wins: command line, then WINNOW_… environment, then the YAML file, then defaults."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)
from pydantic_settings import SettingsError as SourceError
from yaml import YAMLError

from winnow.engine.compression.maximum import Maximum
from winnow.engine.config import WEIGHTS, EngineSettings

LogLevel = Literal["debug", "info", "warning", "error"]


NOT_OF_VLLM = {"page_tokens", "max_stream_len", "embedding_model", "llmlingua2_model", "speculative"}
NOT_OF_VLLM |= {"draft_model", "draft_weights", "draft_memory_gib"}
NOT_OF_VLLM |= {"vision_model", "vision_model_name", "vision_weights", "vision_memory_gib"}
NOT_OF_VLLM |= {"image_cache_gib", "async_scheduling"}
"""Settings of what only our own engine does"""
DOMAIN = re.compile(r"[A-Za-z0-9.-]+(:\d{1,5})?")
"""A host as it is looked up (internationalized names in their ASCII form), and a port"""


class SettingsError(Exception):
    """A setting is unknown, out of range or unreadable; the message names it."""


class Settings(BaseSettings, EngineSettings):
    """Everything that can be set, the engine's settings included.

    Each field is a key of the YAML file, an environment variable (``WINNOW_`` and the name in capitals) and, for the
    common ones, an option of ``winnow serve``.
    """

    model_config = SettingsConfigDict(
        env_prefix="WINNOW_", extra="forbid", frozen=True, env_ignore_empty=True, protected_namespaces=()
    )

    # Where and for whom
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="accepted Bearer keys (comma-separated in the environment); none: no key is asked for"
    )
    served_model_name: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="names that requests may use; the first is the one shown. Default: taken from `model`"
    )
    log_level: LogLevel = Field("info", description="what is logged")

    # Compression
    compression: str | dict[str, Any] | None = Field(
        None, description="plan or profile of requests that name none; `{}` in a request turns it off"
    )
    max_compression: Maximum | None = Field(None, description="the most that a request may hold: budget, format")
    profiles: Path | None = Field(None, description="YAML file of named profiles; the packaged ones if unset")

    # Speed
    speculative: str | dict[str, Any] | None = Field(
        None, description="method, or method and knobs, of requests that name none; `{}` in a request turns it off"
    )

    # A second model
    vision_model: str | None = Field(
        None, description="a model that sees images, named like `model`, served beside it by an engine of its own"
    )
    vision_model_name: Annotated[tuple[str, ...], NoDecode] = Field((), description="its names, like served_model_name")
    vision_weights: Literal["f32", "int8", "bf16", "f16", "fp8"] | None = Field(
        None, description="how its weights are held; like the model's if unset"
    )
    vision_memory_gib: float = Field(1.0, gt=0, le=4096, description="size of its engine's page arena")

    # Images and videos. The limits are on each of them.
    allowed_image_domains: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="hosts (host:port where it is not the scheme's own) to fetch images from; none: data: URIs only",
    )
    max_image_bytes: int = Field(10 << 20, ge=1024, le=1 << 30, description="bytes of an image, or of a video's frame")
    max_image_pixels: int = Field(1 << 24, ge=1, le=1 << 30, description="pixels of an image, or of a video's frame")
    max_image_aspect: float = Field(200.0, ge=1, le=65536, description="an image's longer side over its shorter one")
    min_image_side: int = Field(4, ge=1, le=4096, description="pixels of an image's shorter side")
    max_video_frames: int = Field(64, ge=1, le=4096, description="frames of a video")
    max_video_pixels: int = Field(1 << 26, ge=1, le=1 << 32, description="pixels of all frames of a video")
    image_fetch_timeout_s: float = Field(5.0, gt=0, le=600, description="time to fetch an image, redirects included")
    max_image_redirects: int = Field(3, ge=0, le=32, description="redirects that are followed, each checked anew")
    max_image_fetches: int = Field(8, ge=1, le=1024, description="images that are fetched at a time")
    image_threads: int = Field(2, ge=1, le=64, description="threads that decode images")

    # Limits on one request
    max_images: int = Field(16, ge=0, le=4096, description="images and videos of a chat")
    max_body_bytes: int = Field(16 << 20, ge=1024, le=1 << 30, description="request body, counted while it is read")
    body_timeout_s: float = Field(30.0, gt=0, le=3600, description="time for a client to send its body")
    max_messages: int = Field(2048, ge=1, le=1 << 20, description="messages of a chat")
    max_prompts: int = Field(64, ge=1, le=4096, description="prompts of a completions request")
    max_contexts: int = Field(64, ge=1, le=4096, description="texts of a completions request that may be shortened")
    max_unshortened_tokens: int = Field(
        1 << 17, ge=1, le=1 << 30, description="tokens of a prompt before compression.prompt shortens it"
    )
    max_n: int = Field(16, ge=1, le=1024, description="choices per prompt")
    max_choices: int = Field(128, ge=1, le=65536, description="choices of a request: prompts times n")
    max_stop_strings: int = Field(16, ge=1, le=256, description="stop strings")
    max_stop_chars: int = Field(256, ge=1, le=65536, description="length of one stop string")
    max_stop_token_ids: int = Field(64, ge=1, le=4096, description="stop token ids")
    max_logprobs: int = Field(20, ge=0, le=128, description="likeliest tokens reported at each position")
    max_logit_bias: int = Field(1024, ge=0, le=1 << 20, description="entries of logit_bias")
    request_timeout_s: float = Field(600.0, gt=0, le=86400, description="longest life of a request")

    generation_config: Literal["auto", "none"] = Field(
        "auto", description="auto: requests that name no sampling get that of the model's generation_config.json"
    )

    # Limits on all of them. A request is queued until its first token.
    max_queue_requests: int = Field(256, ge=1, le=1 << 20, description="requests that may wait")
    max_queue_tokens: int = Field(1 << 20, ge=1, le=1 << 40, description="prompt tokens that may wait")
    max_queue_image_bytes: int = Field(
        1 << 28,
        ge=1,
        le=1 << 40,
        description="bytes of images of requests that may wait, as sent and as the model takes them",
    )
    tokenizer_threads: int = Field(2, ge=1, le=64, description="threads that tokenize prompts")

    # Times
    ping_s: float = Field(10.0, gt=0, le=3600, description="silence after which a stream gets a comment line")
    drain_s: float = Field(30.0, ge=0, le=3600, description="time that running requests get after SIGTERM")
    heartbeat_s: float = Field(30.0, gt=0, le=3600, description="silence of the engine that /live calls dead")

    @field_validator("api_key", "served_model_name", "vision_model_name", "allowed_image_domains", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """`key=value` of the command line, where the value is YAML."""
        if not isinstance(value, list):
            return value
        pairs = [str(pair).partition("=") for pair in value]
        if unclear := [name for name, equals, _ in pairs if not equals]:
            raise ValueError(f"'{unclear[0]}' should be key=value")
        return {name: yaml.safe_load(text) for name, _, text in pairs}

    @field_validator("api_key")
    @classmethod
    def _usable(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in keys:
            text = key.get_secret_value()
            if not text or not text.isascii() or not text.isprintable() or " " in text:
                raise ValueError("an API key is printable ASCII without spaces")
        return keys

    @field_validator("allowed_image_domains")
    @classmethod
    def _domains(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [domain for domain in domains if not DOMAIN.fullmatch(domain)]:
            raise ValueError(f"'{wrong[0]}' should be a host such as images.example.com, or host:port")
        return tuple(domain.lower() for domain in domains)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.max_model_len is not None and self.max_queue_tokens < self.max_model_len:
            raise ValueError("max_queue_tokens must hold at least one prompt of max_model_len tokens")
        if self.engine == "vllm" and (idle := sorted(NOT_OF_VLLM & self.model_fields_set)):
            raise ValueError(f"{idle[0]} has no effect with engine: vllm")
        if self.vision_model is None and (self.vision_weights is not None or self.vision_model_name):
            raise ValueError("vision_weights and vision_model_name have no effect without vision_model")
        if self.vision_weights is not None and self.vision_weights not in WEIGHTS[self.device]:
            able = ", ".join(WEIGHTS[self.device])
            raise ValueError(f"vision_weights: {self.vision_weights} is not for device {self.device}, which has {able}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, YamlConfigSettingsSource(settings_cls))

    @property
    def of_engine(self) -> EngineSettings:
        return EngineSettings(**{name: getattr(self, name) for name in EngineSettings.model_fields})

    @property
    def of_models(self) -> tuple[Settings, ...]:
        """Those of each model that is served: the first model's are the server's own."""
        if self.vision_model is None:
            return (self,)
        changes = {
            "model": self.vision_model,
            "served_model_name": self.vision_model_name,
            "weights": self.vision_weights or self.weights,
            "kv_memory_gib": self.vision_memory_gib,
            "vision_model": None,
            # Of the first model alone:
            "max_model_len": None,
            "tensor_parallel": 1,
            "draft_model": None,
            "draft_weights": None,
            "speculative": None,
        }
        return self, self.model_copy(update=changes)

    @property
    def model_to_name(self) -> str:
        """`model` as a command line takes it, for messages to clients: never a path of this machine."""
        return f".../{Path(self.model).name}" if Path(self.model).exists() else self.model

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that a request may give; never a path of this machine."""
        if self.served_model_name:
            return self.served_model_name
        if self.model == "default":
            return ("SmolLM2-135M-Instruct", "default")
        path = Path(self.model)
        return (path.stem if path.suffix == ".gguf" else path.name,) if path.exists() else (self.model,)


def load(config: Path | None = None, **options: Any) -> Settings:
    """Settings from a YAML file (or the one that WINNOW_CONFIG names), the environment and the options that are given:
    neither None nor empty.

    Raises
        SettingsError
    """
    if config is None and (named := os.environ.get("WINNOW_CONFIG")):
        config = Path(named)
    if config is not None and not config.is_file():
        raise SettingsError(f"there is no config file {config}")

    class Sourced(Settings):
        model_config = SettingsConfigDict(yaml_file=config, yaml_file_encoding="utf-8")

    try:
        return Sourced(**{name: value for name, value in options.items() if value not in (None, [], "")})
    except ValidationError as error:
        lines = [f"  {'.'.join(str(p) for p in e['loc']) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise SettingsError("bad settings:\n" + "\n".join(lines)) from error
    except (YAMLError, UnicodeDecodeError, SourceError, TypeError, ValueError) as error:
        raise SettingsError(f"cannot read the settings{f' of {config}' if config else ''}: {error}") from error
