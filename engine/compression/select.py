"""From scores and budgets to keep sets: how many tokens each layer and lane keeps, and which.

Everything here is exact and stable: equal scores are decided by the lower lane index, so that what survives does not
depend on batch mates, on how a prompt was cut into chunks, or on the machine.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

HeadBudget = Literal["uniform", "adaptive"]
LayerBudget = Literal["uniform", "pyramid"]


def layer_budgets(
    budget: int, layers: int, kind: LayerBudget, seen: int, *, protected: int = 0, beta: int = 20
) -> list[int]:
    """Tokens that each lane of each layer keeps; their sum is `layers * min(budget, seen)`.

    "pyramid" (PyramidKV, Cai et al., 2024, arXiv:2406.02069) falls linearly with depth. Of the b = budget - protected
    tokens beside the protected ones, the last layer keeps b/beta and the first 2b - b/beta; a first layer that would
    keep more than there is keeps all, and the last one accordingly more. `protected` tokens come on top in every
    layer, as in the paper; without any the formula is that of kvpress with an empty window. Each layer keeps at least
    one token. Fractions are rounded down and the rest goes to the largest of them (the lower layer on ties), where
    kvpress rounds each layer by itself and misses the sum.
    """
    budget = min(budget, seen)
    if kind == "uniform" or layers == 1:
        return [budget] * layers
    protected = min(protected, budget)
    share, room = budget - protected, seen - protected
    last = Fraction(share, beta) if protected else max(Fraction(share, beta), Fraction(1))
    first = 2 * share - last
    if first > room:
        first, last = Fraction(room), Fraction(2 * share - room)
    exact = [first + (last - first) * layer / (layers - 1) for layer in range(layers)]
    whole = [int(part) for part in exact]
    rest = share * layers - sum(whole)
    by_fraction = sorted(range(layers), key=lambda layer: (whole[layer] - exact[layer], layer))
    for layer in by_fraction[:rest]:
        whole[layer] += 1
    return [protected + part for part in whole]


def keep_sets(
    scores: Tensor,
    kept: Tensor,
    budgets: Tensor,
    sinks: int,
    recent: int,
    head_budget: HeadBudget = "uniform",
    floor: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """The lane indices that survive.

    Protected are the newest `recent` and the first `sinks` tokens of a lane, in this order, within the budget; the
    rest of the budget goes to the highest scores. A lane that holds no more than its budget keeps all.

    "adaptive" is AdaKV (Feng et al., 2024, arXiv:2407.11550): the heads of a layer share kv_heads * budget tokens,
    and scores compete across them; each head is sure of its protected tokens and of `floor` of the uniform budget.

    Args
        scores   [layers, kv_heads, tokens] float; ignored beyond kept, NaN counts as the lowest
        kept     [layers, kv_heads] int64
        budgets  [layers] or [layers, kv_heads] int64, tokens a lane
    Returns
        index    [layers, kv_heads, most] int64: lane indices, ascending, padded with -1
        count    [layers, kv_heads] int64
    """
    return packed(keep_mask(scores, kept, budgets, sinks, recent, head_budget, floor))


def keep_mask(
    scores: Tensor,
    kept: Tensor,
    budgets: Tensor,
    sinks: int,
    recent: int,
    head_budget: HeadBudget = "uniform",
    floor: float = 0.2,
) -> Tensor:
    """`keep_sets` as a mask [layers, kv_heads, tokens] bool, which its device makes without the host."""
    tokens = scores.shape[-1]
    indices = torch.arange(tokens, device=scores.device)
    held = indices < kept.unsqueeze(-1)
    budgets = budgets.view(len(kept), -1).expand_as(kept)
    budget = torch.minimum(budgets, kept)

    newest = budget.clamp_max(recent)
    first = (budget - newest).clamp_max(sinks)
    protected = held & ((indices < first.unsqueeze(-1)) | (indices >= (kept - newest).unsqueeze(-1)))

    limit = torch.finfo(torch.float32).max
    priority = scores.float().nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    priority = priority.masked_fill(~held, -torch.inf).masked_fill(protected, torch.inf)

    keep = held & (_rank(priority) < budget.unsqueeze(-1))
    if head_budget == "adaptive":
        sure = torch.maximum((budgets.double() * floor).long(), newest + first)
        sure = torch.minimum(sure, budget)
        priority = priority.masked_fill(_rank(priority) < sure.unsqueeze(-1), torch.inf)
        shared = torch.minimum(budgets.sum(-1), kept.sum(-1))
        # Token by token, so that ties between heads are shared out instead of going to the first head.
        by_token = priority.transpose(1, 2)
        rank = _rank(by_token.flatten(1)).view_as(by_token).transpose(1, 2)
        keep = held & (rank < shared[:, None, None])

    return keep


def packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where `chosen` [..., n] bool is true: indices [..., most] int64, ascending, padded with -1; how many [...]."""
    places = chosen.shape[-1]
    count = chosen.sum(-1)
    most = int(count.max()) if count.numel() else 0
    indices = torch.arange(places, device=chosen.device).expand_as(chosen)
    index = indices.masked_fill(~chosen, places).sort(-1).values[..., :most]
    return index.masked_fill(index == places, -1), count


def _rank(priority: Tensor) -> Tensor:
    """Place of each entry along the last dimension, 0 for the highest; the lower index wins ties."""
    order = torch.sort(priority, dim=-1, descending=True, stable=True).indices
    places = torch.arange(priority.shape[-1], device=priority.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
