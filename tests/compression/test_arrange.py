"""Where tokens go when two formats share a lane: against the rules written out one token at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from winnow.engine.compression.arrange import Arrangement, Tokens, arrange, moves

PARTS = 3


@dataclass
class Lane:
    """One lane: tokens by position."""

    index: list[int]
    part: list[int]
    important: list[bool]
    score: list[float]
    bound: list[bool]
    sealed: int
    rest: int


def lane(dice: random.Random, capacity: int, rest_capacity: int) -> Lane:
    """Two full parts of random tokens and an open one of the others, whose newest are the newest."""
    sealed, rest = dice.randint(0, 2) if capacity else 0, dice.randint(0, 2)
    newest = dice.randint(1, 5)
    count = sealed * capacity + rest * rest_capacity + dice.randint(0, 40) + newest
    old = list(range(count - newest))
    dice.shuffle(old)
    first, second = old[: sealed * capacity], old[sealed * capacity :][: rest * rest_capacity]
    others = sorted(old[sealed * capacity + rest * rest_capacity :])
    positions = [*first, *second, *others, *range(count - newest, count)]  # by lane index
    index = [positions.index(position) for position in range(count)]
    part = [0 if i < len(first) else 1 if i < len(first) + len(second) else 2 for i in index]
    return Lane(
        index=index,
        part=part,
        important=[dice.random() < 0.4 for _ in index],
        score=[dice.choice((0.1, 0.2, 0.3)) for _ in index],
        bound=[which == 0 and dice.random() < 0.5 for which in part],
        sealed=sealed,
        rest=rest,
    )


def expected(one: Lane, residual: int, capacity: int, rest_capacity: int) -> tuple[list[int], int, int]:
    """Old lane indices in their new order, and the pages of the two parts."""
    count = len(one.index)
    low = [i for i in range(count) if one.part[i] == 1]
    free = [i for i in range(count) if one.part[i] == 0 or (one.part[i] == 2 and i < count - residual)]
    ranked = sorted(free, key=lambda i: (0 if one.bound[i] else 1 if one.important[i] else 2, -one.score[i], i))
    wanted = [i for i in ranked if one.bound[i] or one.important[i]]
    pages = 0
    while capacity and pages * capacity < len(wanted) and (pages + 1) * capacity <= len(ranked):
        pages += 1
    # The least important fill pages of the second part; an important token never goes there.
    rest, behind = len(low) // rest_capacity, len(ranked)
    while behind - rest_capacity >= max(len(wanted), pages * capacity):
        behind, rest = behind - rest_capacity, rest + 1
    while capacity and (pages + 1) * capacity <= behind:
        pages += 1
    parts = (set(ranked[: pages * capacity]), set(low) | set(ranked[behind:]))
    order: list[int] = []
    for which, members in enumerate(parts):
        stayed = sorted((i for i in members if one.part[i] == which), key=lambda i: one.index[i])
        order += stayed + sorted(i for i in members if one.part[i] != which)
    order += [i for i in range(count) if i not in parts[0] | parts[1]]
    return [one.index[i] for i in order], pages, rest


def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
    most = max(map(len, rows))
    return torch.tensor([row + [value] * (most - len(row)) for row in rows])


def tokens_of(lanes: list[Lane]) -> Tokens:
    def side(name: str) -> torch.Tensor:
        return padded([[int(x) for x in getattr(one, name)] for one in lanes])

    score = padded([[round(10 * x) for x in one.score] for one in lanes]).float() / 10
    held = padded([[1] * len(one.index) for one in lanes]).bool()
    return Tokens(side("index"), held, side("part"), side("important").bool(), score, side("bound").bool())


@pytest.mark.parametrize(("capacity", "rest_capacity"), [(8, 12), (4, 16), (5, 5), (0, 8)])
@pytest.mark.parametrize("residual", [0, 3, 1000])
def test_tokens_go_where_the_rules_say(capacity: int, rest_capacity: int, residual: int) -> None:
    dice = random.Random(capacity * 100 + residual)
    lanes = [lane(dice, capacity, rest_capacity) for _ in range(60)]
    to = arrange(tokens_of(lanes), residual, capacity, rest_capacity)
    for i, one in enumerate(lanes):
        order, pages, rest = expected(one, residual, capacity, rest_capacity)
        assert (int(to.sealed[i]), int(to.rest[i]), int(to.count[i])) == (pages, rest, len(order))
        assert to.index[i].tolist() == order + [-1] * (to.index.shape[1] - len(order))
    check_moves(lanes, to, capacity, rest_capacity)


def check_moves(lanes: list[Lane], to: Arrangement, capacity: int, rest_capacity: int) -> None:
    """Pages that stay and tokens that are written together make the arrangement, and no page is written needlessly."""
    sealed, rest = (torch.tensor([getattr(one, name) for one in lanes]) for name in ("sealed", "rest"))
    way = moves(to, sealed, rest, capacity, rest_capacity)
    for i, one in enumerate(lanes):
        start, rest_start = int(way.start[i]), int(way.rest_start[i])
        assert start <= one.sealed
        assert rest_start <= one.rest
        written = way.keep[i, : int(way.written[i])].tolist()
        first = int(to.sealed[i]) * capacity - start * capacity
        low = range(one.sealed * capacity, one.sealed * capacity + rest_start * rest_capacity)
        made = [*range(start * capacity), *written[:first], *low, *written[first:]]
        assert made == to.index[i, : int(to.count[i])].tolist()
        assert rest_start == one.rest, "what is in the second part is never written again"
    same = way.is_nothing(sealed, rest)
    assert not same or torch.equal(to.sealed, sealed)


def test_lanes_that_are_as_they_should_be_are_left_alone() -> None:
    one = Lane(list(range(10)), [0] * 4 + [1] * 4 + [2] * 2, [True] * 10, [0.0] * 10, [False] * 10, 1, 1)
    to = arrange(tokens_of([one]), 2, 4, 4)
    assert moves(to, torch.tensor([1]), torch.tensor([1]), 4, 4).is_nothing(torch.tensor([1]), torch.tensor([1]))
