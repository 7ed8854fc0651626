"""Settings of the engine process."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from winnow.kernels.layout import PageFormat

WEIGHTS = {"cpu": ("f32", "int8"), "cuda": ("f32", "bf16", "f16", "fp8")}
"""How a device can hold weights"""

NO_DRAFT = "needs a draft model; start the server with --draft-model"

ON_CUDA: dict[str, Any] = {
    "weights": "bf16",
    "kv_memory_gib": None,
    "max_seqs": 256,
    "max_step_tokens": 2048,
    "page_tokens": 32,
    "async_scheduling": True,
}
"""Defaults that differ from those of the CPU, which the fields below have"""

VLLM_WEIGHTS = ("bf16", "f32", "fp8")
ON_VLLM: dict[str, Any] = {"weights": "bf16", "max_seqs": 256, "max_step_tokens": 2048}
"""The same for `engine: vllm`, on either device"""


class EngineSettings(BaseModel):
    """What the engine needs to know at start; immutable afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["winnow", "vllm"] = Field(
        "winnow", description="what runs the model: vllm is there with the extra of that name"
    )
    vllm_args: dict[str, Any] = Field(
        {}, description="arguments of vLLM by its own names, such as tensor_parallel_size or kv_cache_dtype"
    )
    model: str = Field("default", description="directory, .gguf file, Hugging Face name, or 'default'")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the model runs")
    weights: Literal["f32", "int8", "bf16", "f16", "fp8"] = Field(
        "int8", description="how weights are held: f32 or int8 on the CPU, bf16 (the default), f16, fp8 or f32 on a GPU"
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="processes, with a GPU each where there are any, that share the model by its heads"
    )
    kv_memory_gib: float | None = Field(
        4.0,
        gt=0,
        le=4096,
        description="size of each process' page arena; on a GPU, what memory_utilization leaves if unset",
    )
    memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory for weights, activations and pages together"
    )
    max_model_len: int | None = Field(None, ge=16, description="longest prompt plus output; the model's own if unset")
    max_stream_len: int = Field(
        131072, ge=16, le=10_000_000, description="longest prompt plus output of a request with compact positions"
    )
    max_seqs: int = Field(64, ge=1, le=4096, description="sequences that run together")
    max_step_tokens: int = Field(512, ge=16, le=65536, description="tokens of one step, prefill chunks included")
    page_tokens: int = Field(16, ge=16, le=256, multiple_of=16, description="tokens of a page in the compute format")
    prefix_caching: bool = Field(True, description="reuse the pages of equal prompt prefixes")
    cuda_graphs: bool = Field(True, description="on a GPU, replay recorded steps of generated tokens")
    async_scheduling: bool = Field(
        False,
        description="plan and launch a step before the last one's tokens have been read; the default on a GPU",
    )
    batch_invariant: bool = Field(
        False, description="on a GPU, give a row the same bits whatever shares its step, at some cost in speed"
    )
    image_cache_gib: float = Field(
        1.0, ge=0, le=4096, description="host memory for what a vision tower and policies have made of images"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; all cores if unset")
    embedding_model: str | None = Field(
        None, description="directory of the sentence encoder for extractive prompts; the installed package's if unset"
    )
    draft_model: str | None = Field(
        None, description="a smaller model with the vocabulary of `model`, named like it: guesses, and looks ahead"
    )
    draft_weights: Literal["f32", "int8", "bf16", "f16", "fp8"] | None = Field(
        None, description="how the draft model's weights are held; like the model's if unset"
    )
    draft_memory_gib: float = Field(1.0, gt=0, le=4096, description="size of the draft model's own page arena")
    llmlingua2_model: str | None = Field(None, description="directory of the token classifier for llmlingua2 prompts")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_device(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        is_cuda = values.get("device") == "cuda"
        if values.get("engine") == "vllm":
            return ON_VLLM | ({"kv_memory_gib": None} if is_cuda else {}) | values
        return ON_CUDA | values if is_cuda else values

    @model_validator(mode="after")
    def _fits_device(self) -> EngineSettings:
        where, able = f"device {self.device}", WEIGHTS[self.device]
        if self.engine == "vllm":
            where, able = "vLLM", VLLM_WEIGHTS
        elif self.vllm_args:
            raise ValueError("vllm_args have no effect without engine: vllm")
        for name in ("weights", "draft_weights"):
            if (held := getattr(self, name)) is not None and held not in able:
                raise ValueError(f"{name}: {held} is not for {where}, which has {', '.join(able)}")
        if self.draft_weights is not None and self.draft_model is None:
            raise ValueError("draft_weights has no effect without draft_model")
        if self.tensor_parallel > 1 and self.engine == "vllm":
            raise ValueError("tensor_parallel: vLLM's own is vllm_args tensor_parallel_size")
        if self.tensor_parallel > 1 and self.draft_model is not None:
            raise ValueError("tensor_parallel: a draft model goes with one process only")
        if self.device == "cpu" and self.kv_memory_gib is None:
            raise ValueError("kv_memory_gib must be given on the CPU, whose memory others use too")
        return self

    @property
    def of_draft(self) -> EngineSettings | None:
        """Those of the draft model's engine, if there is one: it runs as many sequences of its own, and follows all of
        this one's."""
        if self.draft_model is None:
            return None
        changes = {
            "model": self.draft_model,
            "weights": self.draft_weights or self.weights,
            "kv_memory_gib": self.draft_memory_gib,
            "max_model_len": None,
            "max_seqs": 2 * self.max_seqs,
            "draft_model": None,
            "draft_weights": None,
        }
        return self.model_copy(update=changes)

    @property
    def compute_format(self) -> PageFormat:
        """Of the pages that new tokens are written in: it has the precision of activations."""
        formats = {"bf16": PageFormat.BF16, "fp8": PageFormat.BF16, "f16": PageFormat.F16}
        return formats.get(self.weights, PageFormat.F32)
