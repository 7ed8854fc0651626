"""What is asked, of whom and in which order; everything that comes out goes into a `Result`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from winnow.engine.errors import EvalError, RequestError
from winnow.engine.evaluation.haystack import Haystack
from winnow.engine.evaluation.measures import distance
from winnow.engine.evaluation.plans import OFF, WEIGHTS, Plans
from winnow.engine.evaluation.result import Result
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
"""A plan's name, and what it is asked about"""
GROUP = 8
"""Plans that are asked together: whole distributions of all of them are held at once"""


@dataclass(frozen=True)
class Scope:
    """How much is measured."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of a task's context, question and answer"""
    samples: int
    """Of each task at each length"""
    text_prompts: int
    text_context: int
    text_new: int
    """Tokens of real text that follow the context"""
    protocols: tuple[Protocol, ...] = PROTOCOLS

    @property
    def cells(self) -> list[tuple[str, int]]:
        return [(task, length) for length in self.lengths for task in self.tasks]

    @property
    def units(self) -> int:
        """Contexts that will be asked about."""
        return self.text_prompts + len(self.cells) * self.samples


class Harness:
    """Measures plans on one target. The uncompressed model is asked first: it leaves its prefix to the others, and is
    noted in a result that has nothing of it yet."""

    def __init__(self, target: Target, text: str, plans: Plans, result: Result):
        self._target = target
        self._plans = {name: plan for name, plan in plans.items() if name != OFF}
        self._notes_off = OFF not in {cell.plan for cell in result.values}
        self._result = result
        self._book = PromptBook(target.encode, text)
        self._haystack = Haystack(text, target.encode)

    def run(self, scope: Scope, say: Callable[[str], None], save: Callable[[], None] = lambda: None) -> None:
        """`say` is told what is next, once for each context; `save` is called when a part is complete."""
        longest = max((*scope.lengths, scope.text_context + scope.text_new + 1 if scope.text_prompts else 0))
        if longest > self._target.max_model_len:
            raise EvalError(f"{longest} tokens are more than the {self._target.max_model_len} of the model's context")
        for prompt in self._prompts(scope):
            say(f"text after {scope.text_context} tokens")
            self._measure_text(prompt[: scope.text_context], prompt[scope.text_context :])
        if scope.text_prompts:
            save()
        for task, length in scope.cells:
            for index in range(scope.samples):
                say(f"{task}, {length} tokens")
                self._measure_task(task, length, index, scope.protocols)
            save()

    def compare_weights(self, exact: Target, scope: Scope, say: Callable[[str], None]) -> None:
        """How far the target's weights alone bring it from those of `exact`, on the same real text."""
        for prompt in self._prompts(scope):
            say("weights")
            ask = Ask(prompt[: scope.text_context], {}, prompt[scope.text_context :], foretells=True)
            (one,), (other,) = exact.ask([ask]), self._target.ask([ask])
            if isinstance(one, RequestError) or isinstance(other, RequestError):
                raise EvalError("the uncompressed model refuses to answer")
            self._note_text(WEIGHTS, scope.text_context, one, other)

    def _prompts(self, scope: Scope) -> list[list[int]]:
        """[prompts][text_context + text_new] tokens of real text"""
        return self._book.prompts("eval/text", scope.text_prompts, scope.text_context + scope.text_new)

    def _measure_text(self, context: list[int], text: list[int]) -> None:
        def ask(plan: dict[str, Any]) -> Ask:
            return Ask(context, plan, text, foretells=True)

        exact = self._uncompressed(ask({}))
        assert exact.foretold is not None
        for (name, _), answer in self._compressed([((name, TEXT), ask(plan)) for name, plan in self._plans.items()]):
            assert answer.foretold is not None
            self._note_text(name, len(context), exact, answer)
        if self._notes_off:
            self._note_text(OFF, len(context), exact, exact)

    def _note_text(self, name: str, length: int, exact: Answer, answer: Answer) -> None:
        assert exact.foretold is not None and answer.foretold is not None
        far = distance(exact.foretold, answer.foretold)
        self._result.add(name, TEXT, length, "", kl=far.kl, agreement=far.agreement, loss=far.loss, **_memory(answer))

    def _measure_task(self, task: str, length: int, index: int, protocols: tuple[Protocol, ...]) -> None:
        new = TASKS[task].new
        one = sample(task, self._haystack, length - RESERVE - new, index)
        context, question = self._target.encode(one.context), self._target.encode(one.question)
        asks: dict[Protocol, Callable[[dict[str, Any]], Ask]] = {
            "query-agnostic": lambda plan: Ask(context, plan, question, new),
            # The token after a prompt is foretold before its memory is compressed: the last one of the question must
            # follow, or an answer of one token would cost nothing.
            "query-aware": lambda plan: Ask(context + question[:-1], plan, question[-1:], new),
        }
        exact = self._uncompressed(asks["query-agnostic"]({}))
        for protocol in protocols if self._notes_off else ():
            self._result.add(OFF, task, length, protocol, score=one.score(exact.text), **_memory(exact))
        for protocol in protocols:
            wanted: list[tuple[Key, Ask]] = [
                ((name, protocol), asks[protocol](plan)) for name, plan in self._plans.items()
            ]
            for (name, _), answer in self._compressed(wanted):
                self._result.add(name, task, length, protocol, score=one.score(answer.text), **_memory(answer))

    def _uncompressed(self, ask: Ask) -> Answer:
        (answer,) = self._target.ask([ask])
        if isinstance(answer, RequestError):
            raise EvalError(f"the uncompressed model refuses to answer: {answer.message}")
        return answer

    def _compressed(self, asks: list[tuple[Key, Ask]]) -> Iterator[tuple[Key, Answer]]:
        """Answers under plans. What is refused is noted, and not asked for again."""
        for start in range(0, len(asks), GROUP):
            group = asks[start : start + GROUP]
            for (key, _), answer in zip(group, self._target.ask([ask for _, ask in group]), strict=True):
                if isinstance(answer, RequestError):
                    self._result.refused[key[0]] = answer.message
                    self._plans.pop(key[0], None)
                else:
                    yield key, answer


def _memory(answer: Answer) -> dict[str, float]:
    read = {} if answer.read is None else {"read": answer.read}
    return {"held_mib": answer.held / 2**20, "held": answer.share, **read}
