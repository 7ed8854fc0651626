"""Settings of the engine process."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineSettings(BaseModel):
    """What the engine needs to know at start; immutable afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("default", description="directory, .gguf file, Hugging Face name, or 'default'")
    weights: Literal["f32", "int8"] = Field("int8", description="how weights are held on the CPU")
    device: Literal["cpu"] = Field("cpu", description="where the model runs")
    kv_memory_gib: float = Field(4.0, gt=0, le=4096, description="size of the page arena")
    max_model_len: int | None = Field(None, ge=16, description="longest prompt plus output; the model's own if unset")
    max_stream_len: int = Field(
        131072, ge=16, le=10_000_000, description="longest prompt plus output of a request with compact positions"
    )
    max_seqs: int = Field(64, ge=1, le=4096, description="sequences that run together")
    max_step_tokens: int = Field(512, ge=16, le=65536, description="tokens of one step, prefill chunks included")
    page_tokens: int = Field(16, ge=16, le=256, multiple_of=16, description="tokens of a page in the compute format")
    prefix_caching: bool = Field(True, description="reuse the pages of equal prompt prefixes")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; all cores if unset")
    embedding_model: str | None = Field(
        None, description="directory of the sentence encoder for extractive prompts; the installed package's if unset"
    )
    llmlingua2_model: str | None = Field(None, description="directory of the token classifier for llmlingua2 prompts")
