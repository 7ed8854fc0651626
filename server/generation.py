"""The one path of chat and completions: tokenize, admit, submit, and give out text as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from uuid import uuid4

from winnow.engine.compression.capabilities import for_pictures
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.reach import dropped_tokens, longest_text
from winnow.engine.compression.vision.policy import Kind
from winnow.engine.errors import EngineDied, PlanNotSupported, PromptTooLong, RequestError
from winnow.engine.messages import EngineInfo, Output, Picture, Submit
from winnow.engine.speculation.speculation import Speculation
from winnow.server.admission import Flight
from winnow.server.choice import Choice, Piece
from winnow.server.marks import HOW_TO_MARK, MarkedPrompt, PromptSource, Tokenize
from winnow.server.pictures import check_unmarked
from winnow.server.plans import described, labels
from winnow.server.protocol.common import GenerationRequest
from winnow.server.service import Service
from winnow.server.shortening import shorten_request
from winnow.server.stops import StopStrings
from winnow.server.usage import Usage


@dataclass(frozen=True)
class ReadPrompt:
    """What the model reads of a prompt."""

    tokens: list[int]
    question: int = 0
    """The last tokens, read when the document before them has been compressed; 0: all are read at once"""
    pictures: list[Picture] = field(default_factory=list)

    @property
    def document(self) -> int:
        return len(self.tokens) - self.question if self.question else 0


class Generation:
    """One request to generate. Iterate `pieces()` once; `usage` is complete afterwards.

    Choice i * n + j is choice j of prompt i.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        prompts: Sequence[PromptSource],
        prompt_param: str,
        default_output: int | None = None,
        prefixes: Sequence[str | None] | None = None,
    ):
        """
        Args
            prompt_param: the field that holds the prompts, for errors
            default_output: tokens to generate when the request says nothing; None: all that the context leaves
            prefixes: for each prompt the text that its choices begin with; None: the prompt's own, decoded
        Raises
            RequestError: a limit of this server is exceeded
        """
        request.check_limits(service.settings)
        self.service = service
        self.request = request
        self.prompts = prompts
        self.prompt_param = prompt_param
        self.default_output = default_output
        self.prefixes = None if prefixes is None else list(prefixes)
        self.arrived = time.monotonic()
        self.forced: Tokenize | None = None
        """Makes the tokens that the output of each prompt begins with"""
        self.usage = Usage()
        self.has_plan = False
        self.vision_policy = "none"
        """As metrics name it"""

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is new, choice by choice, until each has its finish reason. Closing it early aborts the request.

        Raises (before the first piece: nothing was generated yet)
            RequestError, Overloaded, EngineDied, ApiError
        """
        service, request = self.service, self.request
        with service.admission.board(len(self.prompts)) as flight:
            info = service.engine()
            request.check_vocabulary(info.vocab_size)
            plan = service.plans.resolve(request.compression, info, service.settings.model_to_name)
            kinds = frozenset[Kind]().union(*(prompt.kinds for prompt in self.prompts))
            seen = [kind for kind in kinds if kind in info.sees]
            plan = for_pictures(plan, seen, info, request.compression is not None)
            speculation = service.speculations.resolve(request.speculative, plan, info, bool(kinds))
            self.usage.speculates = speculation is not None
            self.has_plan = not plan.is_off
            self.usage.plan = described(plan) if self.has_plan else None
            self.vision_policy = "none" if plan.prunes is None else plan.prunes.policy
            prompts = [await self._read(i, plan, flight, info) for i in range(len(self.prompts))]
            forced = await flight.wait(service.in_thread(self.forced)) if self.forced is not None else []
            submits = [self._submit(prompt, forced, info, plan, speculation) for prompt in prompts]
            self.usage.prompt_tokens = sum(len(submit.prompt) for submit in submits)
            flight.take(self.usage.prompt_tokens + len(forced) * len(submits))
            self._observe_request(submits)
            async with aclosing(merge([service.client.generate(submit) for submit in submits])) as outputs:
                async for piece in self._follow(outputs, submits, flight, labels(plan, info.compute_format)):
                    yield piece

    async def _read(self, index: int, plan: Plan, flight: Flight, info: EngineInfo) -> ReadPrompt:
        prompt = self.prompts[index]
        if prompt.pictured is not None:
            self._check_images(plan)
            pictured = await prompt.pictured(info, flight)
            return ReadPrompt(pictured.tokens, pictures=pictured.pictures)
        read = await self._read_text(index, plan, flight, info)
        check_unmarked(read.tokens, info.sees, self.prompt_param)
        return read

    def _check_images(self, plan: Plan) -> None:
        """Refuses what goes by marked text, of which the tokens are not known where images are among it. The server's
        own plan does without."""
        if self.request.compression is None:
            return
        for path, is_asked in (("compression.prompt", plan.shortens), ("compression.kv.scope", plan.kv.scope)):
            if is_asked is not None:
                raise PlanNotSupported(path, f"{path}: not for prompts with images or videos")

    async def _read_text(self, index: int, plan: Plan, flight: Flight, info: EngineInfo) -> ReadPrompt:
        prompt, request = self.prompts[index], self.request
        looks_at_marks = plan.shortens is not None or plan.kv.scope is not None
        # The server's own plan does what it can with marks; a request that asks for it must mark something.
        if not looks_at_marks or (request.compression is None and not prompt.is_marked):
            return ReadPrompt(await flight.wait(self.service.in_thread(prompt.tokens)))
        marked = await flight.wait(self.service.in_thread(prompt.marked))
        question = 0 if plan.kv.scope is None else len(marked.tokens) - self._document(marked)
        if plan.shortens is None:
            return ReadPrompt(marked.tokens, question)
        asked = shorten_request(
            marked, plan.shortens, info, self.service.settings, self.prompt_param, request.cache_salt
        )
        flight.take(len(marked.tokens))
        shortened = await flight.wait(self.service.client.shorten(asked))
        self.usage.shortened.append((len(marked.tokens), shortened))
        self.service.metrics.shortened(plan.shortens.policy, shortened)
        if self.prefixes is not None:
            self.prefixes[index] = None  # an echo is of what was read
        return ReadPrompt(shortened.prompt, question)

    def _document(self, marked: MarkedPrompt) -> int:
        if not marked.document:
            path = "compression.kv.scope"
            raise RequestError(path, f"{path}: no token is marked as context: {HOW_TO_MARK[self.prompt_param]}")
        return marked.document

    async def _follow(
        self,
        outputs: AsyncGenerator[tuple[int, Output], None],
        submits: list[Submit],
        flight: Flight,
        plan_labels: tuple[str, str],
    ) -> AsyncGenerator[Piece, None]:
        request, metrics = self.request, self.service.metrics
        choices = [self._choice(i, len(submits[i // request.n].forced)) for i in range(len(submits) * request.n)]
        first, heard = [0.0] * len(choices), [0.0] * len(choices)
        while not all(choice.is_over for choice in choices):
            try:
                prompt, output = await flight.wait(anext(outputs))
            except StopAsyncIteration as end:
                raise EngineDied("the engine ended a request without finishing it") from end
            if output.finish_reason == "abort":
                raise EngineDied("the engine gave the request up")
            choice = choices[prompt * request.n + output.index]
            is_first, was_stopped = not heard[choice.index], choice.was_stopped
            flight.leave_queue()
            now = time.monotonic()
            if is_first:
                first[choice.index] = now
                metrics.ttft.observe(now - self.arrived)
            elif output.token_ids:
                metrics.inter_token.observe(now - heard[choice.index])
            piece = choice.push(output)
            if choice.was_stopped and not was_stopped and not choice.is_over:
                self.service.client.finish(submits[prompt].request_id, output.index)
            if choice.is_over:
                self._end(choice, output, piece.finish_reason or "", plan_labels)
                metrics.e2e.observe(now - self.arrived)
                if choice.tokens > 1:
                    metrics.per_output_token.observe((now - first[choice.index]) / (choice.tokens - 1))
            if is_first and self.prefixes is not None:
                piece = self._with_prefix(piece, prompt, submits)
            heard[choice.index] = now
            yield piece

    def _submit(
        self, prompt: ReadPrompt, forced: list[int], info: EngineInfo, plan: Plan, speculation: Speculation | None
    ) -> Submit:
        dropped = dropped_tokens(prompt.tokens, prompt.pictures, plan, info)
        limit = self._output_tokens(len(prompt.tokens), dropped, len(forced), info, plan)
        if self.request.min_tokens > limit:
            message = f"min_tokens is {self.request.min_tokens}, and at most {limit} tokens can be generated"
            raise RequestError("min_tokens", message, "invalid_value")
        return Submit(
            request_id=uuid4().hex,
            prompt=prompt.tokens,
            pictures=prompt.pictures,
            document=0 if plan.is_off else prompt.document,
            sampling=self.request.sampling(self.service.sampling_defaults, self.service.tokenizer.eos_token_ids, limit),
            plan={} if plan.is_off else plan.to_wire(),
            forced=forced,
            cache_salt=self.request.cache_salt,
            speculative={} if speculation is None else speculation.model_dump(),
            lead_ins=self.service.lead_ins if plan.evict is not None and plan.evict.recital_chunk else [],
        )

    def _output_tokens(self, prompt: int, dropped: int, forced: int, info: EngineInfo, plan: Plan) -> int:
        """Tokens to generate at most, of which the first are forced; no more than a context where no end is given. Of
        the prompt's tokens as many as `dropped` may take no room."""
        longest, asked = longest_text(plan, info), self.request.output_limit
        if not prompt:
            raise RequestError(self.prompt_param, f"{self.prompt_param} has no tokens", "invalid_value")
        left = longest - prompt
        if left < (asked or 1):
            prompt -= dropped
            left = longest - prompt
        if left < 1 or (asked is not None and asked > left):
            wanted = f" and {asked} for the output" if asked is not None else ""
            holds = "this model's context holds" if longest == info.max_model_len else "a stream holds"
            message = f"{holds} {longest} tokens, but there are {prompt} in the prompt{wanted}"
            raise PromptTooLong(self.prompt_param, message)
        if asked is None:
            most = info.max_model_len if self.default_output is None else self.default_output + forced
            asked = min(most, left)
        if asked <= forced:
            message = (
                f"max_tokens: {asked} tokens can be generated, and {forced} are forced; at least one more is needed"
            )
            raise RequestError("max_tokens", message, "invalid_value")
        return asked

    def _choice(self, index: int, forced: int) -> Choice:
        request = self.request
        continues = self.prompt_param == "prompt"  # a chat answer begins anew
        return Choice(
            index,
            self.service.tokenizer.stream(request.skip_special_tokens, continues),
            StopStrings(request.stop, request.include_stop_str_in_output),
            max(request.min_tokens, forced + 1 if forced else 0),  # what the caller says does not end the answer
        )

    def _with_prefix(self, piece: Piece, prompt: int, submits: list[Submit]) -> Piece:
        assert self.prefixes is not None
        prefix = self.prefixes[prompt]
        if prefix is None:
            prefix = self.service.tokenizer.decode(submits[prompt].prompt, self.request.skip_special_tokens)
        return Piece(piece.choice, prefix + piece.text, piece.entries, piece.finish_reason, piece.report)

    def _observe_request(self, submits: list[Submit]) -> None:
        for submit in submits:
            self.service.metrics.prompt_length.observe(len(submit.prompt))
            self.service.metrics.params_n.observe(submit.sampling.n)
            self.service.metrics.params_max_tokens.observe(submit.sampling.max_tokens)

    def _end(self, choice: Choice, output: Output, reason: str, plan_labels: tuple[str, str]) -> None:
        metrics, usage = self.service.metrics, self.usage
        usage.completion_tokens += choice.tokens
        usage.accepted_tokens += output.accepted_tokens
        usage.rejected_tokens += output.rejected_tokens
        if output.index == 0:  # the other choices share the first one's prompt
            usage.cached_tokens += output.cached_tokens
            if output.compression is not None:
                usage.image_tokens += output.compression.image_tokens
                usage.image_tokens_kept += output.compression.image_tokens_kept
                metrics.images_kept(self.vision_policy, output.compression)
        if output.compression is not None:
            usage.reports.append(output.compression)
            metrics.kept(*plan_labels, output.compression)
        metrics.choice_ended(reason, choice.tokens)


async def merge(sources: list[AsyncGenerator[Output, None]]) -> AsyncGenerator[tuple[int, Output], None]:
    """Outputs of several requests as they come, each with the number of its source."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for output in source:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

    async def drain(i: int, source: AsyncGenerator[Output, None]) -> None:
        try:
            async with aclosing(source):
                async for output in source:
                    queue.put_nowait((i, output))
        except Exception as error:  # raised where the outputs are read
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(drain(i, source)) for i, source in enumerate(sources)]
    try:
        running = len(tasks)
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case (i, output):
                    yield i, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
