"""The engine's settings in vLLM's words. Nothing here imports vllm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError
from winnow.engine.vllm.pictures import PRUNES_VIDEOS, seeing_type

DTYPES = {"f32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
"""What vLLM computes in, by how weights are held"""
MOST_LOGPROBS = 128

REFUSED = {
    "model": "is the setting model",
    "dtype": "follows from the setting weights",
    "max_model_len": "is the setting max_model_len",
    "max_num_seqs": "is the setting max_seqs",
    "max_num_batched_tokens": "is the setting max_step_tokens",
    "enable_prefix_caching": "is the setting prefix_caching",
    "enforce_eager": "is the opposite of the setting cuda_graphs",
    "gpu_memory_utilization": "is the setting memory_utilization",
    "kv_cache_memory_bytes": "is the setting kv_memory_gib",
    "served_model_name": "is the setting served_model_name",
    "tokenizer": "has no effect: the server tokenizes",
    "skip_tokenizer_init": "follows from the model: the server tokenizes",
    "language_model_only": "follows from the model: all but Qwen2-VL and Qwen2.5-VL read text only",
    "mm_processor_kwargs": "has no effect: the server's image processor is asked, not vLLM's",
    "mm_device_do_normalize": "must stay: the server's image processor has normalized pixels",
    "media_io_kwargs": "has no effect: the server decodes images and videos",
    "max_logprobs": "is the setting max_logprobs",
    "logprobs_mode": "must stay: logprobs are those before any change to them",
    "video_pruning_method": "must stay: it is the policy evs, the only one that plans have a name for",
    "data_parallel_size": "has no effect: a server runs one replica",
}
"""Arguments that others stand for, and why"""

KV_FORMATS = {"auto": None, "bfloat16": "bf16", "fp8": "fp8", "fp8_e4m3": "fp8"}
"""What plans call vLLM's kv_cache_dtype; auto is what the model computes in"""
TORCH_FORMATS = {"torch.float32": "f32", "torch.bfloat16": "bf16"}


def engine_arguments(settings: EngineSettings, model: Path) -> dict[str, Any]:
    """Fields of vLLM's EngineArgs.

    Raises
        ModelError: it names an entry of `vllm_args` that another setting stands for, or that has no effect
    """
    for name in settings.vllm_args:
        if name in REFUSED:
            raise ModelError(f"vllm_args.{name} {REFUSED[name]}")
    kind = seeing_type(model)
    if "video_pruning_rate" in settings.vllm_args and kind not in PRUNES_VIDEOS:
        raise ModelError(
            "vllm_args.video_pruning_rate: of the models that this server reads videos for, vLLM prunes "
            "those of Qwen2.5-VL alone"
        )
    memory = settings.kv_memory_gib
    return {
        "model": str(model),
        "tokenizer": str(model),
        "skip_tokenizer_init": kind is None,  # vLLM makes up pictures with it, to see what memory they take
        "language_model_only": kind is None,
        "mm_device_do_normalize": False,  # the server's image processor has
        "dtype": DTYPES[settings.weights],
        "quantization": "fp8" if settings.weights == "fp8" else None,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_seqs,
        "max_num_batched_tokens": settings.max_step_tokens,
        "enable_prefix_caching": settings.prefix_caching,
        "enforce_eager": not settings.cuda_graphs,
        "gpu_memory_utilization": settings.memory_utilization,
        "kv_cache_memory_bytes": None if memory is None else int(memory * 2**30),
        "max_logprobs": MOST_LOGPROBS,
        **settings.vllm_args,
    }


def environment(settings: EngineSettings) -> dict[str, str]:
    """Variables that vLLM reads when it is imported and when it starts its workers."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process is the engine's own
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings.batch_invariant:
        variables["VLLM_BATCH_INVARIANT"] = "1"
    if settings.threads is not None:
        variables |= {"OMP_NUM_THREADS": str(settings.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return variables


def kv_format(kv_cache_dtype: str, dtype: str) -> str:
    """What plans call the format of keys and values.

    Args
        dtype: what the model computes in, as torch prints it
    Raises
        ModelError: they have no name for it
    """
    if kv_cache_dtype not in KV_FORMATS:
        known = ", ".join(KV_FORMATS)
        raise ModelError(f"vllm_args.kv_cache_dtype: plans have no name for {kv_cache_dtype}; they have for {known}")
    return KV_FORMATS[kv_cache_dtype] or TORCH_FORMATS[dtype]
