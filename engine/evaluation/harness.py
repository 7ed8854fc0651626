"""What is asked, of whom and in which order; everything that comes out goes into a `Result`."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from winnow.engine.errors import EvalError, RequestError
from winnow.engine.evaluation.haystack import Haystack
from winnow.engine.evaluation.measures import distance, loss_of_last
from winnow.engine.evaluation.pictures import Question, Scene, Scenes, blank
from winnow.engine.evaluation.plans import BLIND, OFF, WEIGHTS, Plans
from winnow.engine.evaluation.result import Cell, Result
from winnow.engine.evaluation.targets import Answer, Ask, Target
from winnow.engine.evaluation.tasks import TASKS, sample
from winnow.engine.evaluation.text import PromptBook

Protocol = Literal["query-aware", "query-agnostic"]
PROTOCOLS: tuple[Protocol, ...] = ("query-agnostic", "query-aware")
"""Agnostic: the context is compressed before the question is read; aware: with the question in it"""

TEXT = "text"
RESERVE = 64
"""Tokens of a task's length that are kept for its question"""
Key = tuple[str, str]
"""A plan's name, and the protocol under which it was asked; empty for real text"""
GROUP = 8
"""Requests that are asked together: what they hold, and whole distributions of all of them, are in memory at once"""
IMAGE = "image"
"""Protocol of questions about pictures: the image's tokens are pruned, the question may have a part in which"""
PREFILL = "prefill"
PICTURES = 64
"""Requests about pictures that are asked together"""
ANSWER_TOKENS = 8
"""Of an answer about a picture, at most: the model ends it"""


@dataclass(frozen=True)
class Scope:
    """How much is measured."""

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    """Tokens of a task's context, question and answer"""
    samples: int = 0
    """Of each task at each length"""
    text_prompts: int = 0
    text_context: int = 0
    text_new: int = 0
    """Tokens of real text that follow the context"""
    protocols: tuple[Protocol, ...] = PROTOCOLS
    scenes: int = 0
    """Pictures, each with all its questions"""

    @property
    def contexts(self) -> list[tuple[int, int, str]]:
        """Length, number and name of each task that will be set: of a run that is cut every task has its part."""
        numbers = range(self.samples)
        return [(length, index, task) for length in self.lengths for index in numbers for task in self.tasks]

    @property
    def units(self) -> int:
        """Contexts that will be asked about."""
        return self.text_prompts + len(self.contexts) + self.scenes


class Harness:
    """Measures plans on one target, as far as the result does not have them. The uncompressed model is asked first: it
    leaves its prefix to the others."""

    def __init__(self, target: Target, text: str, plans: Plans, result: Result, scenes: Scenes | None = None):
        self._target = target
        self._plans: Plans = {OFF: {}} | plans
        self._refused: set[Key] = set()
        self._result = result
        self._text = text
        self._scenes = scenes

    @cached_property
    def _book(self) -> PromptBook:
        return PromptBook(self._target.encode, self._text)

    @cached_property
    def _haystack(self) -> Haystack:
        return Haystack(self._text, self._target.encode)

    def run(self, scope: Scope, say: Callable[[str], None], save: Callable[[], None] = lambda: None) -> None:
        """`say` is told what is next, once for each context; `save` is called when something was measured."""
        longest = max((*scope.lengths, scope.text_context + scope.text_new + 1 if scope.text_prompts else 0))
        if longest > self._target.max_model_len:
            raise EvalError(f"{longest} tokens are more than the {self._target.max_model_len} of the model's context")
        for index, prompt in enumerate(self._prompts(scope)):
            say(f"text after {scope.text_context} tokens")
            if lacking := self._lacking(TEXT, scope.text_context, "", index):
                self._measure_text(lacking, prompt[: scope.text_context], prompt[scope.text_context :])
                save()
        for length, index, task in scope.contexts:
            say(f"{task}, {length} tokens")
            lacks = {protocol: self._lacking(task, length, protocol, index) for protocol in scope.protocols}
            if any(lacks.values()):
                self._measure_task(lacks, task, length, index)
                save()
        for index in range(scope.scenes):
            say("pictures")
            assert self._scenes is not None
            pictured = self._scenes.scene(index)
            asks = {
                question: names
                for question in pictured.questions
                if (names := self._lacking(question.kind, 0, IMAGE, question.index))
            }
            if asks:
                self._measure_scene(pictured, asks)
                save()

    def time_prefills(self, count: int, say: Callable[[str], None], save: Callable[[], None]) -> None:
        """How long each plan alone takes from an ask to its first token, of pictures that nobody has asked about. In
        turns: what else the machine does meets all of them."""
        assert self._scenes is not None
        seed = secrets.randbits(32)
        for turn in range(count):
            say("prefill")
            for name in self._plans:
                cell = Cell(name, PREFILL, 0, IMAGE)
                is_timed = len(self._result.values.get(cell, {}).get("seconds", ())) > turn
                if is_timed or name == BLIND or name in self._result.refused:
                    continue
                seed += 1
                new = self._scenes.fresh(seed)
                ask = Ask([], self._plans[name], image=new.image, question=new.questions[0].text)
                began = time.perf_counter()
                (said,) = self._target.ask([ask])
                if isinstance(said, RequestError):
                    self._result.refused[name] = said.message
                else:
                    self._result.add(*cell, seconds=time.perf_counter() - began)
            save()

    def compare_weights(self, exact: Target, scope: Scope, say: Callable[[str], None]) -> None:
        """How far the target's weights alone bring it from those of `exact`, on the same real text."""
        for index, prompt in enumerate(self._prompts(scope)):
            say("weights")
            if self._result.contexts(Cell(WEIGHTS, TEXT, scope.text_context, "")) > index:
                continue
            ask = Ask(prompt[: scope.text_context], {}, prompt[scope.text_context :], foretells=True)
            (one,), (other,) = exact.ask([ask]), self._target.ask([ask])
            if isinstance(one, RequestError) or isinstance(other, RequestError):
                raise EvalError("the uncompressed model refuses to answer")
            self._note_text(WEIGHTS, scope.text_context, one, other)

    def _lacking(self, part: str, length: int, protocol: str, index: int) -> list[str]:
        """Plans that were not measured on so many contexts."""
        return [
            name
            for name in self._plans
            if (name, protocol) not in self._refused
            and self._result.contexts(Cell(name, part, length, protocol)) <= index
        ]

    def _prompts(self, scope: Scope) -> list[list[int]]:
        """[prompts][text_context + text_new] tokens of real text"""
        if not scope.text_prompts:
            return []
        return self._book.prompts("eval/text", scope.text_prompts, scope.text_context + scope.text_new)

    def _measure_text(self, names: list[str], context: list[int], text: list[int]) -> None:
        ask = Ask(context, {}, text, foretells=True, context=self._target.decode(context))
        (exact,) = self._uncompressed([ask])
        for name, _, (answer,) in self._compressed([(name, "", [ask]) for name in names if name != OFF]):
            self._note_text(name, len(context), exact, answer)
        if OFF in names:
            self._note_text(OFF, len(context), exact, exact)

    def _note_text(self, name: str, length: int, exact: Answer, answer: Answer) -> None:
        assert exact.foretold is not None and answer.foretold is not None
        far = distance(exact.foretold, answer.foretold)
        memory = _memory(answer, exact)
        self._result.add(name, TEXT, length, "", kl=far.kl, agreement=far.agreement, loss=far.loss, **memory)

    def _measure_task(self, lacks: dict[Protocol, list[str]], task: str, length: int, index: int) -> None:
        """Each plan is asked twice: what it says, and how likely it finds the right answer."""
        new = TASKS[task].new
        one = sample(task, self._haystack, length - RESERVE - new, index)
        context, question, right = map(self._target.encode, (one.context, one.question, one.right))
        free = {
            "query-agnostic": Ask(context, {}, question, new, context=one.context),
            # The token after a prompt is foretold before its memory is compressed: the last one of the question must
            # follow, or an answer of one token would cost nothing.
            "query-aware": Ask(
                context + question[:-1],
                {},
                question[-1:],
                new,
                context=one.context,
                question=self._target.decode(question[:-1]),
            ),
        }
        asks = {
            protocol: [ask, replace(ask, forced=ask.forced + right, new=1, foretells=True)]
            for protocol, ask in free.items()
        }
        exact, told = self._uncompressed(asks["query-agnostic"])

        def note(name: str, protocol: str, said: Answer, told: Answer) -> None:
            assert told.foretold is not None
            loss = loss_of_last(told.foretold, len(right))
            memory = _memory(said, exact)
            self._result.add(name, task, length, protocol, score=one.score(said.text), loss=loss, **memory)

        wanted = []
        for protocol, names in lacks.items():
            if OFF in names:
                note(OFF, protocol, exact, told)
            wanted += [(name, protocol, asks[protocol]) for name in names if name != OFF]
        for name, kind, (said, told) in self._compressed(wanted):
            note(name, kind, said, told)

    def _measure_scene(self, pictured: Scene, lacking: dict[Question, list[str]]) -> None:
        """Each plan is asked what the scene has of the questions that it lacks, all of them together."""
        asks = {
            question: Ask([], {}, image=pictured.image, question=question.text, new=ANSWER_TOKENS)
            for question in lacking
        }
        exact = dict(zip(asks, self._uncompressed(list(asks.values())), strict=True))

        def note(name: str, question: Question, said: Answer) -> None:
            held = said.held / exact[question].uncompressed
            score = question.score(said.text)
            self._result.add(name, question.kind, 0, IMAGE, score=score, kept=said.image_kept, held=held)

        mine: dict[str, list[Question]] = defaultdict(list)
        for question, names in lacking.items():
            for name in names:
                mine[name].append(question)
        for question in mine.pop(OFF, ()):
            note(OFF, question, exact[question])
        shown = {BLIND: blank(pictured.image)}
        wanted = [
            (name, IMAGE, [replace(asks[question], image=shown.get(name, pictured.image)) for question in questions])
            for name, questions in mine.items()
        ]
        for name, _, answers in self._compressed(wanted, PICTURES):
            for question, said in zip(mine[name], answers, strict=True):
                note(name, question, said)

    def _uncompressed(self, asks: list[Ask]) -> list[Answer]:
        answers = []
        for answer in self._target.ask(asks):
            if isinstance(answer, RequestError):
                raise EvalError(f"the uncompressed model refuses to answer: {answer.message}")
            answers.append(answer)
        return answers

    def _compressed(
        self, wanted: Sequence[tuple[str, str, list[Ask]]], most: int = GROUP
    ) -> Iterator[tuple[str, str, list[Answer]]]:
        """Answers of plans to what they are asked, by plan and protocol. What is refused is noted, and not asked again
        under that protocol."""
        while wanted:
            count = max(1, most // len(wanted[0][2]))
            group, wanted = wanted[:count], wanted[count:]
            asks = [replace(ask, plan=self._plans[name]) for name, _, asks in group for ask in asks]
            answers = iter(self._target.ask(asks))
            for name, protocol, asks in group:
                mine = [next(answers) for _ in asks]
                refusal = next((answer for answer in mine if isinstance(answer, RequestError)), None)
                if refusal is None:
                    yield name, protocol, [answer for answer in mine if isinstance(answer, Answer)]
                else:
                    why = refusal.message
                    self._result.refused[name] = f"{protocol}: {why}" if protocol in PROTOCOLS else why
                    self._refused.add((name, protocol))


def _memory(answer: Answer, exact: Answer) -> dict[str, float]:
    read = {} if answer.read is None else {"read": answer.read}
    return {"held_mib": answer.held / 2**20, "held": answer.held / exact.uncompressed, **read}
