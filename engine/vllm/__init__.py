"""vLLM as the engine behind the same server: its models, and its parallelism over GPUs and nodes.

Only `engine.py` and `multimodal.py` import vllm, and only a process started with `engine: vllm` imports that.
"""
