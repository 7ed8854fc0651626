"""vLLM's engine with the methods that the engine's process calls.

Its scheduler runs in this process, as ours does; its workers run where vLLM puts them: here, in processes of their own,
or on other nodes through Ray. Each choice of a request is a request of vLLM's, so that it can be ended alone.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import msgspec
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError, VLLMError
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from winnow.engine.calibration.store import cache_folder, weights_hash
from winnow.engine.compression.capabilities import for_engine, for_pictures
from winnow.engine.compression.plan import Plan
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError, PromptTooLong, RequestError
from winnow.engine.messages import EngineInfo, EngineStats, Output, Shorten, Submit
from winnow.engine.messages import SamplingParams as WinnowSampling
from winnow.engine.models.export import export_directory
from winnow.engine.models.files import resolve_model
from winnow.engine.vllm.arguments import engine_arguments, kv_format
from winnow.engine.vllm.memory import BlockMemory
from winnow.engine.vllm.multimodal import Prompt, Prompts
from winnow.engine.vllm.pictures import seeing_type
from winnow.engine.vllm.positions import place_as_whole
from winnow.engine.vllm.requests import REFUSES, refusals, sampling_fields, token_logprobs


@dataclass
class Choice:
    """One choice of a request while it runs."""

    request_id: str
    index: int
    prompt: Prompt
    logprobs: int | None
    generated: int = 0
    cached_tokens: int = 0


class Counters(StatLoggerBase):
    """Sums of what vLLM says after each step."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0):
        self.clear()

    def clear(self) -> None:
        self.prompt_tokens = self.generated_tokens = self.preemptions = 0
        self.queried_tokens = self.hit_tokens = 0

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.queried_tokens += scheduler_stats.prefix_cache_stats.queries
            self.hit_tokens += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.prompt_tokens += iteration_stats.prompt_token_stats.computed
            self.generated_tokens += iteration_stats.num_generation_tokens
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        pass


class VllmEngine:
    def __init__(self, settings: EngineSettings):
        """
        Raises
            ModelError: vLLM cannot run the model as the settings ask
        """
        path = resolve_model(settings.model)
        if not path.is_dir():
            path = export_directory(settings.model, cache_folder().parent / "exported" / weights_hash(path))
        if (there := current_platform.device_type) != settings.device:
            raise ModelError(f"device {settings.device}: the vLLM that is installed is for {there}")
        arguments = engine_arguments(settings, path)
        if unknown := sorted(set(settings.vllm_args) - {field.name for field in dataclasses.fields(EngineArgs)}):
            raise ModelError(f"vllm_args.{unknown[0]}: this vLLM has no such argument")
        try:
            config = EngineArgs(**arguments).create_engine_config()
            label = kv_format(config.cache_config.cache_dtype, str(config.model_config.dtype))
            counters = Counters(config)
            self._llm = LLMEngine.from_vllm_config(config, stat_loggers=[lambda config, index: counters])
        except (VLLMError, ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
            raise ModelError(f"vLLM cannot run {settings.model}: {error}") from error
        self._counters = counters
        self._scheduler = self._llm.engine_core.engine_core.scheduler
        specs = [spec for worker in self._llm.collective_rpc("get_kv_cache_spec") for spec in worker.values()]
        self._memory = BlockMemory(specs, config, config.model_config.dtype, label)
        self._prompts = Prompts(config.model_config, seeing_type(path))
        if self._prompts.video_keep is not None:
            self._llm.collective_rpc(place_as_whole)
        self._choices: dict[str, Choice] = {}
        self._steps, self._step_s = 0, 0.0
        self.info = EngineInfo(
            model=settings.model,
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            layers=config.model_config.get_total_num_hidden_layers(),
            kv_heads=config.model_config.get_total_num_kv_heads(),
            head_dim=config.model_config.get_head_size(),
            compute_format=label,
            page_bytes=self._memory.block_bytes,
            page_tokens=config.cache_config.block_size,
            total_pages=config.cache_config.num_gpu_blocks - 1,  # one stands for none
            weights=settings.weights,
            device=settings.device,
            max_stream_len=config.model_config.max_model_len,
            refuses=refusals(self._prompts.video_keep),
            formats=(label,),
            sees=self._prompts.sees,
            video_keep=self._prompts.video_keep,
        )
        self._warm_up()

    # What the process calls ------------------------------------------------------------------------------------------

    @property
    def can_step(self) -> bool:
        return bool(self._choices)

    @property
    def is_idle(self) -> bool:
        return not self._choices

    @property
    def stats(self) -> EngineStats:
        running, waiting = self._scheduler.get_request_counts()
        return EngineStats(
            running=running,
            waiting=waiting,
            waiting_tokens=sum(request.num_tokens for request in self._scheduler.waiting),
            pages_free=self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            pages_total=self.info.total_pages,
            prompt_tokens_total=self._counters.prompt_tokens,
            generated_tokens_total=self._counters.generated_tokens,
            prefix_hit_tokens_total=self._counters.hit_tokens,
            prefix_query_tokens_total=self._counters.queried_tokens,
            preemptions_total=self._counters.preemptions,
            steps_total=self._steps,
            step_seconds_total=self._step_s,
        )

    def submit(self, request: Submit) -> None:
        """Queues a request. RequestError where it cannot be served; bounds are checked again here."""
        sampling, length = request.sampling, len(request.prompt)  # all of it needs a position
        if not request.prompt or not 0 <= min(request.prompt) <= max(request.prompt) < self.info.vocab_size:
            raise RequestError("prompt", f"prompt must be token ids below {self.info.vocab_size}")
        if length + sampling.max_tokens > (longest := self.info.max_model_len):
            raise PromptTooLong(
                "max_tokens", f"{length} prompt tokens and {sampling.max_tokens} new ones exceed the model's {longest}"
            )
        for name, asked in (("speculative", request.speculative), ("forced", request.forced)):
            if asked:
                raise RequestError(name, f"{name}: {REFUSES[name]}", "not_supported")
        plan = for_engine(Plan.parse(request.plan), self.info)
        for_pictures(plan, {picture.kind for picture in request.pictures}, self.info)
        prompt = self._prompts.read(request)
        fields = [sampling_fields(sampling, index) for index in range(sampling.n)]
        try:
            for index, of_choice in enumerate(fields):
                params = SamplingParams(**of_choice, output_kind=RequestOutputKind.DELTA)
                name = _name(request.request_id, index)
                self._llm.add_request(name, prompt.input, params)
                self._choices[name] = Choice(request.request_id, index, prompt, sampling.logprobs)
        except (VLLMClientError, ValueError) as error:  # vLLM's own checks
            self.abort(request.request_id)
            raise RequestError(getattr(error, "parameter", None), str(error), "invalid_value") from error

    def shorten(self, request: Shorten) -> None:
        path = "compression.prompt"
        raise RequestError(path, f"{path}: {REFUSES[path]}", "compression_not_supported")

    def abort(self, request_id: str) -> None:
        """Ends all choices; nothing is heard of them any more."""
        names = [name for name, choice in self._choices.items() if choice.request_id == request_id]
        self._llm.abort_request(names)
        for name in names:
            del self._choices[name]

    def finish(self, request_id: str, index: int) -> list[Output]:
        """Ends one choice whose text is complete; its last output, or none if it is over."""
        name = _name(request_id, index)
        if name not in self._choices:
            return []
        self._llm.abort_request([name])
        return [self._last(name, Output(request_id, index, []), "stop", None)]

    def step(self) -> list[Output]:
        """One step of vLLM; nothing where nothing runs."""
        if not self._choices:
            return []
        began = time.monotonic()
        said = self._llm.step()
        self._steps += 1
        self._step_s += time.monotonic() - began
        return [self._output(result) for result in said if result.request_id in self._choices]

    def stop(self) -> None:
        """Ends the workers. vLLM's own way also collects garbage, for seconds, in a process that ends with this."""
        self._llm.engine_core._finalizer.detach()
        self._llm.model_executor.shutdown()

    def _warm_up(self) -> None:
        """Runs what is compiled when it is first used, which takes longer than a server may be silent."""
        sampling = WinnowSampling(
            temperature=0.5,
            top_p=0.9,
            top_k=2,
            min_p=0.01,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            frequency_penalty=0.1,
            logit_bias={0: 1.0},
            seed=0,
            max_tokens=2,
            min_tokens=2,
            logprobs=1,
        )
        self.submit(Submit("warm-up", [0], sampling))
        while self._choices:
            self.step()
        self._llm.reset_prefix_cache()
        self._counters.clear()
        self._steps, self._step_s = 0, 0.0

    # Outputs ---------------------------------------------------------------------------------------------------------

    def _output(self, result: RequestOutput) -> Output:
        choice, (new,) = self._choices[result.request_id], result.outputs
        tokens, logprobs = list(new.token_ids), None
        if choice.logprobs is not None:
            logprobs = token_logprobs(tokens, new.logprobs, choice.logprobs)
        choice.generated += len(tokens)
        choice.cached_tokens = result.num_cached_tokens or choice.cached_tokens
        output = Output(choice.request_id, choice.index, tokens, logprobs)
        if new.finish_reason is None:
            return output
        reason = new.finish_reason if new.finish_reason in ("stop", "length") else "abort"
        return self._last(result.request_id, output, reason, new.stop_reason if reason == "stop" else None)

    def _last(self, name: str, output: Output, reason: str, stop_token: int | None) -> Output:
        choice = self._choices.pop(name)
        # The last token is not read any more: it has no keys and values.
        prompt, read = choice.prompt, choice.prompt.tokens + max(choice.generated - 1, 0)
        report = self._memory.report(read, prompt.dropped)
        return Output(
            output.request_id,
            output.index,
            output.token_ids,
            output.logprobs,
            finish_reason=reason,
            stop_token=stop_token,
            cached_tokens=choice.cached_tokens,
            compression=msgspec.structs.replace(
                report, image_tokens=prompt.image_tokens, image_tokens_kept=prompt.image_tokens_kept
            ),
        )


def _name(request_id: str, index: int) -> str:
    """Of a choice, to vLLM."""
    return f"{request_id}-{index}"
