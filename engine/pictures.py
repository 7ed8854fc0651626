"""Pictures of requests that have come in: a tower sees them between steps, and policies say what is left of them.

    submitted -> one picture after the other: encoded, pruned -> what is read of the prompt is known -> scheduled

At most one picture is looked at between two steps, so that whoever runs goes on. Each is seen alone, and what is left
of it depends on the picture, the policy and the text that came with it, on nothing else: requests share what was made
of it (picture_cache.py), and a later turn of a conversation finds in the prefix cache what an earlier one has read.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec
import numpy as np
import torch
from torch import Tensor

from winnow.engine.answers import Answers
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import whole
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.messages import Picture, Rejected, Submit
from winnow.engine.picture_cache import Album, Left
from winnow.engine.picture_rows import Indices, Look, Sight, sight_of
from winnow.engine.scheduler import Scheduler
from winnow.engine.sequence import Sequence
from winnow.engine.speculation.registry import drafter_class
from winnow.engine.speculation.speculation import Speculation
from winnow.engine.steps import refused
from winnow.engine.tower_protocol import Eyes, inputs_of

log = logging.getLogger(__name__)

KEY_BYTES = 16


@dataclass
class Waiting:
    """A request some of whose pictures have not been seen."""

    request: Submit
    vision: Vision | None
    """What prunes them before the language model reads them"""
    places: list[Indices]
    """Of each picture's placeholders in the prompt"""
    looks: list[Look] = field(default_factory=list)
    """Of its first pictures"""


@dataclass
class PictureCounters:
    seen: int = 0
    """Pictures that requests came with"""
    found: int = 0
    """Those of which all was remembered that was asked for"""
    seconds: float = 0.0
    """Spent on the others"""


class Pictures:
    """Belongs to one engine."""

    def __init__(
        self,
        eyes: Eyes,
        embed: Callable[[Tensor], Tensor],
        begin: Callable[[Submit, Sight], Sequence],
        most_bytes: int,
        device: torch.device,
    ):
        """
        Args
            embed: of the language model, [t] int32 on `device` -> [t, hidden]
            begin: makes the sequence of a request whose prompt is what is read of it; RequestError where that cannot be
            most_bytes: of host memory, to remember pictures in
        """
        self.eyes = eyes
        self.album = Album(most_bytes)
        self.counters = PictureCounters()
        self._embed = embed
        self._begin = begin
        self._device = device
        self._waiting: OrderedDict[str, Waiting] = OrderedDict()

    @property
    def is_at_work(self) -> bool:
        return bool(self._waiting)

    @property
    def waiting(self) -> list[Submit]:
        """Requests that are not scheduled yet."""
        return [waiting.request for waiting in self._waiting.values()]

    def add(self, request: Submit, plan: Plan, speculation: Speculation | None) -> None:
        """Queues a request. RequestError where it cannot be served with pictures, or its prompt does not fit them."""
        check_pictures(request, plan, speculation, self.eyes)
        vision = plan.prunes if plan.prunes is not None and plan.prunes.shrinks_prompts else None
        self._waiting[request.request_id] = Waiting(request, vision, places_of(request, self.eyes.sees))

    def forget(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    def step(self, scheduler: Scheduler, answers: Answers) -> None:
        """Looks at a picture. Who has waited for it is added to `scheduler`; errors go to `answers`."""
        for seen in self._look():
            if isinstance(seen, Rejected):
                answers.tell([seen])
            else:
                scheduler.add(seen)

    def _look(self) -> Iterator[Sequence | Rejected]:
        """Looks at one picture more, and at all that are remembered. Yields what has become of requests all of whose
        pictures have been seen, or one of which cannot be."""
        has_looked = False
        for request_id, waiting in list(self._waiting.items()):
            try:
                while len(waiting.looks) < len(waiting.places):
                    remembered = self._remembered(waiting)
                    if remembered is None and has_looked:
                        break
                    self.counters.seen += 1
                    self.counters.found += remembered is not None
                    waiting.looks.append(self._see(waiting) if remembered is None else remembered)
                    has_looked |= remembered is None
                else:
                    self.forget(request_id)
                    yield self._sequence(waiting)
            except RequestError as error:
                self.forget(request_id)
                yield refused(request_id, error)
            except Exception:  # one picture's failure is its own request's
                log.exception("a picture of request %s could not be seen", request_id)
                self.forget(request_id)
                yield Rejected(request_id, "internal", "the engine failed to see a picture of this request")

    def _remembered(self, waiting: Waiting) -> Look | None:
        """The next picture, if neither tower nor policy has to see it again."""
        picture, vision = waiting.request.pictures[len(waiting.looks)], waiting.vision
        features = self.album.features(picture.key)
        if features is not None and (vision is None or vision.tokens(len(features.patches)) >= len(features.patches)):
            return self._looked(waiting, Left(whole(features), len(features.places), features.patches))
        left = self.album.left(digest_of(picture, vision, waiting.request.cache_salt))
        return None if left is None else self._looked(waiting, left)

    def _see(self, waiting: Waiting) -> Look:
        began = time.perf_counter()
        picture, vision = waiting.request.pictures[len(waiting.looks)], waiting.vision
        left = self._left(picture, vision, len(waiting.places[len(waiting.looks)]))
        if picture.key not in self.album or not left.is_whole:
            self.album.keep(digest_of(picture, vision, waiting.request.cache_salt), left)
        look = self._looked(waiting, left)
        self.counters.seconds += time.perf_counter() - began
        return look

    @torch.inference_mode()
    def _left(self, picture: Picture, vision: Vision | None, total: int) -> Left:
        if vision is not None and "encoder" in vision.stages:
            return Left(self.eyes.reduced(inputs_of(picture), vision), total)
        features = self.album.features(picture.key) or self.eyes.encode(inputs_of(picture))
        view = whole(features)
        if vision is not None:
            reads = vision.reads_text and picture.text
            text = self.embedded(picture.text) if reads else features.embeddings[:0]
            view = vision.view(features, text, int.from_bytes(picture.key[:8], "little"))
        self.album.keep(picture.key, features)  # behind the policy: what it asked the tower for is in its size
        return Left(view, len(features.places), features.patches)

    def embedded(self, text: list[int]) -> Tensor:
        """[t, hidden] float32, in host memory."""
        return self._embed(torch.tensor(text, dtype=torch.int32, device=self._device)).float().cpu()

    def _looked(self, waiting: Waiting, left: Left) -> Look:
        """RequestError where the prompt has another number of placeholders than the picture has tokens."""
        number = len(waiting.looks)
        picture, places = waiting.request.pictures[number], waiting.places[number]
        if left.total != len(places) or int(left.view.tokens[-1]) >= len(places):
            raise RequestError(
                "pictures", f"pictures: the prompt has {len(places)} placeholders for one that is {left.total} tokens"
            )
        digest = digest_of(picture, None if left.is_whole else waiting.vision, waiting.request.cache_salt)
        return Look(digest, places, left.view, picture.turn_end, left.patches)

    def _sequence(self, waiting: Waiting) -> Sequence:
        request, looks = waiting.request, waiting.looks
        prompt = np.array(request.prompt, np.int32)
        positions = self.eyes.positions(prompt, request.pictures)
        is_contiguous = waiting.vision is not None and waiting.vision.positions == "contiguous"
        read, sight = sight_of(prompt, looks, positions, is_contiguous)
        return self._begin(msgspec.structs.replace(request, prompt=read.tolist(), pictures=[]), sight)


def digest_of(picture: Picture, vision: Vision | None, salt: str) -> bytes:
    """16 bytes that stand for what is left of a picture under a policy; the salt counts where text has a part in it."""
    digest = blake2b(picture.key, digest_size=KEY_BYTES, person=b"picture")
    if vision is not None:
        digest.update(vision.fingerprint.encode())
        if vision.reads_text:
            digest.update(blake2b(salt.encode(), digest_size=KEY_BYTES).digest())
            digest.update(np.array(picture.text, np.int32).tobytes())
    return digest.digest()


def places_of(request: Submit, sees: Mapping[str, int]) -> list[Indices]:
    """[N] each: where the placeholders of the request's pictures stand in its prompt.

    Args
        sees: `EngineInfo.sees`
    Raises
        RequestError: pictures are not what the prompt has placeholders for
    """
    prompt, upto, places = np.array(request.prompt, np.int32), 0, []
    for i, picture in enumerate(request.pictures):
        end = picture.first + picture.span
        if picture.kind not in sees:
            raise RequestError("messages", f"messages: this model sees no {picture.kind}s")
        is_in_order = upto <= picture.first < end <= picture.turn_end <= len(prompt)
        if len(picture.key) != KEY_BYTES or not is_in_order:
            raise RequestError("pictures", f"pictures: the prompt does not have number {i} where it is said to be")
        own = np.flatnonzero(prompt[picture.first : end] == sees[picture.kind])
        places.append(picture.first + own)
        upto = end
    placeholders = np.isin(prompt, list(sees.values())).sum()
    if placeholders != sum(map(len, places)) or not all(map(len, places)):
        raise RequestError("pictures", f"pictures: the prompt's {placeholders} placeholders are not all theirs")
    return places


def check_pictures(request: Submit, plan: Plan, speculation: Speculation | None, eyes: Eyes) -> None:
    """PlanNotSupported for what does not go with pictures, or does with those of other kinds."""
    plan.check_pictures({picture.kind for picture in request.pictures})
    if request.document:
        raise PlanNotSupported("compression.kv.scope", "compression.kv.scope: a document cannot have pictures")
    if speculation is not None and drafter_class(speculation.method).needs_draft:
        path = "speculative.method"
        raise PlanNotSupported(
            path, f"{path}: '{speculation.method}' has the draft model read the prompt: not with pictures"
        )
