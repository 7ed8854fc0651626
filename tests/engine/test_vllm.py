"""vLLM behind our messages: what is said to it and what is made of its answers. It need not be installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.engine.compression.capabilities import for_engine
from winnow.engine.compression.plan import KV, Plan
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError, PlanNotSupported, RequestError
from winnow.engine.messages import EngineInfo, SamplingParams, Submit, TokenLogprob
from winnow.engine.vllm.arguments import REFUSED, engine_arguments, environment, kv_format
from winnow.engine.vllm.memory import BlockMemory
from winnow.engine.vllm.requests import REFUSES, sampling_fields, token_logprobs


def info_of(label: str) -> EngineInfo:
    return EngineInfo(
        model="m",
        max_model_len=64,
        vocab_size=100,
        layers=2,
        kv_heads=1,
        head_dim=8,
        compute_format=label,
        page_bytes=512,
        page_tokens=16,
        total_pages=10,
        weights="bf16",
        refuses=REFUSES,
        formats=(label,),
    )


# Plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "path"),
    [
        ({"kv": {"evict": {"policy": "snapkv", "budget": 0.5}}}, "compression.kv.evict"),
        ({"kv": {"format": "fp8", "evict": {"policy": "random", "budget": 0.5}}}, "compression.kv.evict"),
        ({"kv": {"format": "int8"}}, "compression.kv.format"),
        ({"kv": {"format": "bf16"}}, "compression.kv.format"),
        ({"kv": {"format": "fp8", "residual": 16}}, "compression.kv.residual"),
        ({"kv": {"format": "fp8", "scope": "document"}}, "compression.kv.scope"),
        ({"kv": {"read": {"policy": "quest", "tokens": 64}}}, "compression.kv.read"),
        ({"kv": {"mix": {"policy": "zipcache", "format": "int8"}}}, "compression.kv.mix"),
        ({"prompt": {"policy": "selective", "keep": 0.5}}, "compression.prompt"),
        ({"on_pressure": {"format": "fp8"}}, "compression.on_pressure"),
        ({"quality": 0.9}, "compression.quality"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(plan: dict[str, Any], path: str) -> None:
    with pytest.raises(PlanNotSupported, match="vLLM") as refused:
        for_engine(Plan.parse(plan), info_of("fp8"))
    assert refused.value.param == path


def test_its_own_format_is_taken() -> None:
    asked = Plan.parse({"kv": {"format": "fp8"}})
    plan = for_engine(asked, info_of("fp8"))
    assert plan.kv.format == "fp8"
    assert (asked.kv.residual, plan.kv.residual) == (32, 0), "no token stays unquantized"
    assert for_engine(plan, info_of("fp8")) == plan
    assert for_engine(Plan.parse(plan.to_wire()), info_of("fp8")) == plan
    with pytest.raises(PlanNotSupported, match="kv_cache_dtype=fp8"):
        for_engine(asked, info_of("bf16"))


def test_nothing_is_passed_over() -> None:
    """What a plan or a submission may say is refused or done."""
    said = {f"compression.{name}" for name in set(Plan.model_fields) - {"kv"}}
    assert said | {f"compression.kv.{name}" for name in KV.model_fields} <= REFUSES.keys()
    of_refused_plans = {"lead_ins", "document"}
    done = {"request_id", "prompt", "sampling", "plan", "cache_salt", "pictures"}
    refused = of_refused_plans | REFUSES.keys() & {"speculative", "forced"}
    assert set(Submit.__struct_fields__) == done | refused


def test_no_plan_is_no_plan() -> None:
    assert for_engine(Plan(), info_of("fp8")).is_off


def test_an_engine_that_refuses_nothing_changes_nothing() -> None:
    plan = Plan.parse({"kv": {"evict": {"policy": "snapkv", "budget": 0.5}, "format": "int4"}})
    ours = EngineInfo("m", 64, 100, 2, 1, 8, "f32", 512, 16, 10, "f32")
    assert for_engine(plan, ours) is plan


# Sampling ------------------------------------------------------------------------------------------------------------


def test_every_parameter_reaches_it() -> None:
    sampling = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={5: -1.5},
        seed=11,
        max_tokens=9,
        min_tokens=2,
        ignore_eos=False,
        stop_token_ids=(7, 8),
        logprobs=4,
        n=3,
    )
    fields = sampling_fields(sampling, 2)
    same = set(SamplingParams.__struct_fields__) - {"seed", "n", "ignore_eos", "stop_token_ids"}
    assert {name: fields[name] for name in same} == {name: getattr(sampling, name) for name in same}
    assert fields["stop_token_ids"] == [7, 8]
    assert (fields["seed"], fields["n"]) == (13, 1), "a request of its own for each choice"
    assert fields["ignore_eos"], "which are among the stop tokens"
    assert not fields["detokenize"]
    assert set(fields) - set(SamplingParams.__struct_fields__) == {"detokenize"}


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_every_seed_is_one(seed: int) -> None:
    """vLLM takes -1 for none."""
    seeds = [sampling_fields(SamplingParams(seed=seed, n=3), index)["seed"] for index in range(3)]
    assert len(set(seeds)) == 3
    assert all(0 <= each < 2**63 for each in seeds)


def test_no_seed_is_none() -> None:
    assert sampling_fields(SamplingParams(), 1)["seed"] is None


@pytest.mark.parametrize(
    ("temperature", "is_taken"), [(0, True), (1e-6, True), (1e-5, False), (0.0099, False), (0.01, True)]
)
def test_temperatures_that_it_would_raise(temperature: float, is_taken: bool) -> None:
    sampling = SamplingParams(temperature=temperature)
    if is_taken:
        assert sampling_fields(sampling, 0)["temperature"] == temperature
        return
    with pytest.raises(RequestError) as refused:
        sampling_fields(sampling, 0)
    assert refused.value.param == "temperature"


@dataclass
class Said:
    logprob: float
    rank: int | None


def test_logprobs() -> None:
    likely, unlikely = {3: Said(-0.1, 1), 4: Said(-2, 2)}, {9: Said(-7, 50), 3: Said(-0.1, 1), 4: Said(-2, 2)}
    assert token_logprobs([3, 9], [likely, unlikely], 2) == [
        TokenLogprob(-0.1, 1, [(3, -0.1), (4, -2)]),
        TokenLogprob(-7, 50, [(3, -0.1), (4, -2)]),
    ]
    second = {4: Said(-2, 2), 3: Said(-0.1, 1)}
    assert token_logprobs([4], [second], 2) == [TokenLogprob(-2, 2, [(3, -0.1), (4, -2)])]
    assert token_logprobs([4], [{4: Said(-2, 2)}], 0) == [TokenLogprob(-2, 2, [])], (
        "none of the likeliest was asked for"
    )


# Arguments -----------------------------------------------------------------------------------------------------------


def test_settings_in_its_words() -> None:
    cluster = {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    settings = EngineSettings(
        engine="vllm", device="cuda", max_model_len=512, max_seqs=3, cuda_graphs=False, vllm_args=cluster
    )
    said = engine_arguments(settings, Path("/m"))
    assert said["model"] == said["tokenizer"] == "/m"
    assert (said["max_model_len"], said["max_num_seqs"], said["max_num_batched_tokens"]) == (512, 3, 2048)
    assert (said["dtype"], said["quantization"], said["enforce_eager"]) == ("bfloat16", None, True)
    assert (said["gpu_memory_utilization"], said["kv_cache_memory_bytes"]) == (0.9, None)
    assert cluster.items() <= said.items()
    on_cpu = engine_arguments(EngineSettings(engine="vllm", weights="f32", kv_memory_gib=0.5), Path("/m"))
    assert (on_cpu["dtype"], on_cpu["kv_cache_memory_bytes"]) == ("float32", 2**29)
    assert engine_arguments(EngineSettings(engine="vllm", weights="fp8"), Path("/m"))["quantization"] == "fp8"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_arguments_that_settings_stand_for(name: str) -> None:
    with pytest.raises(ModelError, match=f"vllm_args.{name}"):
        engine_arguments(EngineSettings(engine="vllm", vllm_args={name: 1}), Path("/m"))


def test_its_environment() -> None:
    plain = environment(EngineSettings(engine="vllm"))
    assert plain["VLLM_NO_USAGE_STATS"] == "1"
    assert "OMP_NUM_THREADS" not in plain and "VLLM_BATCH_INVARIANT" not in plain
    tuned = environment(EngineSettings(engine="vllm", threads=3, batch_invariant=True))
    assert (tuned["OMP_NUM_THREADS"], tuned["VLLM_BATCH_INVARIANT"]) == ("3", "1")


def test_names_of_formats() -> None:
    assert kv_format("auto", "torch.bfloat16") == "bf16"
    assert kv_format("auto", "torch.float32") == "f32"
    assert kv_format("fp8", "torch.bfloat16") == kv_format("fp8_e4m3", "torch.float32") == "fp8"
    with pytest.raises(ModelError, match="fp8_e5m2"):
        kv_format("fp8_e5m2", "torch.bfloat16")


# Memory --------------------------------------------------------------------------------------------------------------


@dataclass
class Spec:
    block_size: int
    dtype: torch.dtype
    page_size_bytes: int
    most: int

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.most


def test_bytes_are_those_of_its_blocks() -> None:
    plain, window = Spec(16, torch.uint8, 100, 10_000), Spec(16, torch.uint8, 100, 200)
    memory = BlockMemory([plain, plain, window], None, torch.bfloat16, "fp8")
    assert memory.block_bytes == 300
    report = memory.report(65)  # five blocks, of which the window's layer holds two
    assert (report.bytes_held, report.bytes_uncompressed) == (1200, 2400)
    assert report.tokens_seen == report.tokens_kept_min == report.tokens_kept_max == 65
    assert report.tokens_by_format == {"fp8": 65}
    plain_bf16 = BlockMemory([Spec(16, torch.bfloat16, 200, 10_000)], None, torch.bfloat16, "bf16").report(16)
    assert plain_bf16.bytes_held == plain_bf16.bytes_uncompressed == 200


def test_what_was_dropped_of_videos_was_never_held() -> None:
    memory = BlockMemory([Spec(16, torch.bfloat16, 200, 10_000)], None, torch.bfloat16, "bf16")
    report = memory.report(20, dropped=30)
    assert (report.tokens_seen, report.tokens_kept_min, report.tokens_kept_max) == (50, 20, 20)
    assert (report.bytes_held, report.bytes_uncompressed) == (400, 800)
