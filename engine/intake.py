"""What comes in: requests are checked, and become sequences. Bounds that the server has checked are checked again."""

from __future__ import annotations

import os
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import numpy as np

from winnow.engine.calibration.frontier import resolve_quality
from winnow.engine.calibration.registry import check_profiles
from winnow.engine.compression.layer_choice import image_rows, stages_of
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.reach import longest_text
from winnow.engine.compression.timeline import Timeline
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.document import document_seed, document_tokens
from winnow.engine.errors import PlanNotSupported, PromptTooLong, RequestError
from winnow.engine.messages import Shorten, Submit
from winnow.engine.picture_rows import Sight
from winnow.engine.recital import Recital, parts_of
from winnow.engine.sampling import check_sampling, choice_seed
from winnow.engine.sequence import Sequence, reading, room_for
from winnow.engine.speculation.speculation import Speculation, check_combination, check_draft, parse_speculation
from winnow.engine.staging import Stages

if TYPE_CHECKING:
    from winnow.engine.engine import Engine


class Intake:
    """Makes the sequences of one engine."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._arrivals = 0

    def sequence(self, request: Submit, sight: Sight | None = None) -> Sequence:
        """The first choice of a request, with the others on it. RequestError where it cannot be served.

        Args
            sight: what its prompt shows of pictures; the prompt is what is to be read
        """
        engine, sampling, length = self._engine, request.sampling, len(request.prompt)
        plan, speculation = self.check(request)
        self._check_length(plan, length, sampling.max_tokens, sight)
        stages = self._stages(plan, request.prompt, sight)
        tokens = room_for(request.prompt, sampling.max_tokens, request.forced)
        document = tokens[: document_tokens(request, plan)]
        parts = parts_of(plan.evict, document, request.lead_ins, engine.max_model_len - len(document))
        timeline = Timeline.of(plan, length, engine.arena.layout, len(document))
        longest = max([len(tokens), *(len(document) + len(part) for part in parts)])
        engine.side.check_room(timeline, longest, stages)
        seed = sampling.seed
        if seed is None:
            seed = int.from_bytes(engine.arena.ranks.told(os.urandom(8)), "little")
        self._arrivals += 1
        first, *siblings = [
            Sequence(
                request_id=request.request_id,
                index=index,
                arrival=self._arrivals,
                sampling=sampling,
                plan=plan,
                timeline=timeline,
                tokens=tokens.copy(),
                length=length + len(request.forced),
                prompt_tokens=length,
                seed=choice_seed(seed, index),
                plan_seed=document_seed(document) if request.document else seed & (1 << 64) - 1,
                salt=request.cache_salt,
                speculation=speculation,
                sight=sight,
                forced=len(request.forced),
                stages=stages,
                recital=Recital(parts) if parts else None,
            )
            for index in range(sampling.n)
        ]
        if engine.cache is not None:
            keys = engine.cache.keys(tokens[:length], first.salt, sight)
            document_key = b""
            if request.document and not timeline.never_acts:
                document_key = engine.cache.document_key(document, plan.fingerprint, first.salt, parts)
            for seq in (first, *siblings):
                seq.block_keys, seq.document_key = keys, document_key
        first.siblings = siblings
        return first

    def reader(self, request: Shorten) -> Sequence | None:
        """A sequence that reads a prompt which is to be shortened; None where none has to. RequestError as above."""
        engine = self._engine
        self._check_tokens("prompt", request.prompt)
        job = engine.shortener.open(request)
        if job.probe is None:
            return None
        length = job.probe.tokens_to_read
        if length > engine.max_model_len:
            engine.shortener.forget(request.request_id)
            raise PromptTooLong(
                "prompt", f"{length} prompt tokens exceed the {engine.max_model_len} of the model that is to rank them"
            )
        self._arrivals += 1
        tokens = np.array(request.prompt[:length], np.int32)
        seq = reading(request.request_id, tokens, length, self._arrivals, engine.arena.layout, job.probe)
        if engine.cache is not None:
            seq.block_keys = engine.cache.keys(seq.tokens, request.cache_salt)
        return seq

    def check(self, request: Submit) -> tuple[Plan, Speculation | None]:
        """What a request asks for, if it can be had for a prompt that is short enough; RequestError otherwise."""
        engine = self._engine
        self._check(request)
        plan, speculation = self._plan(request), parse_speculation(request.speculative)
        check_draft(speculation, engine.draft is not None)
        check_combination(speculation, plan)
        check_profiles(plan, engine.profiles, engine.name)
        if plan.read is not None:
            engine.reader.check(plan.read)
        return plan, speculation

    def _check(self, request: Submit) -> None:
        """What must hold whatever the plan is."""
        engine, sampling = self._engine, request.sampling
        self._check_tokens("prompt", request.prompt)
        self._check_tokens("forced", request.forced)
        self._check_tokens("lead_ins", [token for part in request.lead_ins for token in part])
        self._check_tokens("pictures", [token for picture in request.pictures for token in picture.text])
        check_sampling(sampling, engine.config.vocab_size)
        if sampling.max_tokens < 1 + len(request.forced):
            least = 1 + len(request.forced)
            raise RequestError("max_tokens", f"max_tokens must be at least {least}, one more than tokens are forced")
        if request.forced and sampling.n > 1:
            raise RequestError("n", "n must be 1 where tokens are forced")
        if not 1 <= sampling.n <= engine.settings.max_seqs:
            raise RequestError("n", f"n must be from 1 to {engine.settings.max_seqs}")

    def _check_tokens(self, name: str, tokens: Many[int]) -> None:
        vocab_size = self._engine.config.vocab_size
        if name == "prompt" and not tokens:
            raise RequestError(name, "the prompt has no tokens")
        if not all(0 <= token < vocab_size for token in tokens):
            raise RequestError(name, f"token ids must be below {vocab_size}")

    def _plan(self, request: Submit) -> Plan:
        engine = self._engine
        plan = resolve_quality(Plan.parse(request.plan), engine.frontier, engine.name)
        plan.check_windows(engine.has_windows)
        plan.check_formats(engine.formats)
        plan.check_draft(engine.draft is not None)
        if plan.mix is not None:
            plan.mix.layer_merge(engine.config.layers)
        if plan.drops_between_layers is not None:
            self._check_layers(plan.drops_between_layers)
        if plan.shortens is not None:
            raise PlanNotSupported("compression.prompt", "compression.prompt: shorten a prompt before it is submitted")
        return plan

    def _check_length(self, plan: Plan, length: int, new: int, sight: Sight | None) -> None:
        longest = longest_text(plan, self._engine.info)
        if length + new > longest:
            raise PromptTooLong("max_tokens", f"{length} prompt tokens and {new} new ones exceed the model's {longest}")
        if sight is None or sight.axes is None:
            return
        end, positions = length + new + sight.ahead, self._engine.config.max_position
        if end > positions:
            message = f"with {new} new tokens the text comes to position {end}, and the model has {positions}"
            raise PromptTooLong("max_tokens", message)
        plans = [each for each in (plan, plan.under_pressure) if each is not None]
        why = (
            "turns keys by their rows, and pictures have moved these: ask for compression.vision.positions 'contiguous'"
        )
        if sight.has_axes:
            why = "turns keys by one position, and this model's pictures have three"
        if any(each.goes_by_position for each in plans):
            named = next(fmt.label for each in plans for fmt in (each.format, each.rest_format) if fmt is not None)
            raise PlanNotSupported("compression.kv.format", f"compression.kv.format: '{named}' {why}")
        if plan.evict is not None and plan.evict.is_compact:
            path = "compression.kv.evict.positions"
            raise PlanNotSupported(path, f"{path}: 'compact' {why}")

    def _check_layers(self, vision: Vision) -> None:
        """What must hold of a policy that drops image tokens between layers."""
        engine, path = self._engine, "compression.vision.policy"
        vision.choices(engine.config.layers)
        if engine.has_windows:
            raise PlanNotSupported(path, f"{path}: prompts of a model with sliding windows are not read in stages")
        if engine.arena.ranks.size > 1:
            why = f"'{vision.policy}' goes by all heads of a layer, and tensor_parallel keeps them apart"
            raise PlanNotSupported(path, f"{path}: {why}")

    def _stages(self, plan: Plan, prompt: list[int], sight: Sight | None) -> Stages | None:
        engine, vision = self._engine, plan.drops_between_layers
        if vision is not None and sight is not None and engine.pictures is not None:
            images = image_rows(vision, sight, prompt, engine.pictures.embedded)
            return stages_of(vision, engine.config.layers, images)
        bounds = () if plan.evict is None else plan.evict.stage_bounds(self._engine.config.layers)
        if bounds and self._engine.has_windows:
            path = "compression.kv.evict.policy"
            raise PlanNotSupported(path, f"{path}: prompts of a model with sliding windows are not read in stages")
        return Stages(bounds) if bounds else None
