"""Runs the layers of a vision tower under a policy that takes tokens away between them.

The towers are those whose layers are `x + attention(norm(x))` and `x + mlp(norm(x))` over all tokens of an image, as
transformers has them for CLIP, SigLIP and Idefics3: where no token has been merged, the result is theirs to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.engine.compression.vision.encoder import LayerTokens
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import EncoderPolicy
from winnow.engine.compression.vision.registry import vision_policy
from winnow.engine.errors import PlanNotSupported


def run_layers(
    layers: Sequence[Any],
    embedded: Tensor,
    has_class: bool,
    vision: Vision,
    keep: int,
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the layers make of one crop.

    Args
        layers    those that are run
        embedded  [rows, width]: what the first one reads, the class token's row, if any, before those of P patches
        vision    of a plan whose policy is an `EncoderPolicy`
        keep      how many of the patches shown are left, at least one
        shown     [p] int64, ascending: the patches that the language model is shown; the others, which are padding, are
                  attended to and not touched. None: all
    Returns
        [has_class + n, width]: what is left behind the last layer of class token and patches
        [n] int64, ascending: the patches at whose places these stand
    """
    policy = vision_policy(vision.policy)
    assert isinstance(policy, EncoderPolicy)
    run = Run(embedded, has_class, len(layers), shown)
    patches = len(run.places)
    counts = policy.counts(len(layers), patches, keep, vision) if keep < patches else None
    for number, layer in enumerate(layers):
        tokens = run.attend(number, layer)
        run.go_on(layer, tokens if counts is None else _reduced(policy, tokens, counts[number], vision))
    order = run.places.sort().indices
    return torch.cat((run.states[: int(has_class)], run.states[run.lead :][order])), run.places[order]


class Run:
    """One crop on its way through the layers, each of which is run in two halves."""

    def __init__(self, embedded: Tensor, has_class: bool, layers: int, shown: Tensor | None = None):
        """As `run_layers` takes them; `layers` are counted."""
        patches = torch.arange(len(embedded) - has_class, device=embedded.device)
        self.states = embedded
        """[lead + n, width]"""
        self.places = patches if shown is None else shown.to(embedded.device)
        """[n] int64"""
        self.lead = len(embedded) - len(self.places)
        """Rows that stay whatever happens: the class token's and the padding's"""
        if shown is not None:
            is_row = torch.ones(len(embedded), dtype=torch.bool, device=embedded.device)
            is_row[self.places + has_class] = False
            self.states = torch.cat((embedded[is_row], embedded[~is_row]))
        self._sizes = torch.ones(len(self.places), device=embedded.device)
        self._has_class, self._layers = has_class, layers

    def attend(self, number: int, layer: Any) -> LayerTokens:
        """Runs a layer up to its attention. Returns the patch tokens."""
        lead = self.lead
        normed = layer.layer_norm1(self.states[None])
        bias = _bias(self._sizes, lead, normed.dtype)
        keys = _heads(layer.self_attn, layer.self_attn.k_proj(normed))
        self.states = self.states + layer.self_attn(hidden_states=normed, attention_mask=bias)[0][0]
        return LayerTokens(
            layer=number,
            layers=self._layers,
            lead=lead,
            has_class=self._has_class,
            states=self.states[lead:],
            keys=keys[0, :, lead:].transpose(0, 1),
            sizes=self._sizes,
            places=self.places,
            attend=_Attention(layer.self_attn, normed, keys, bias),
        )

    def go_on(self, layer: Any, left: LayerTokens) -> None:
        """Runs the rest of the layer on what is left of the patch tokens."""
        states = torch.cat((self.states[: self.lead], left.states))
        self.states = states + layer.mlp(layer.layer_norm2(states[None]))[0]
        self._sizes, self.places = left.sizes, left.places


def cannot(vision: Vision, model: str, why: str) -> PlanNotSupported:
    """What is raised where a tower cannot be run so.

    Args
        model: its type
        why: what it does that needs all patches
    """
    path = "compression.vision.policy"
    return PlanNotSupported(
        path, f"{path}: '{vision.policy}' takes tokens away within the vision tower, and that of {model} {why}"
    )


def _bias(sizes: Tensor, lead: int, dtype: torch.dtype) -> Tensor | None:
    """[1, 1, 1, lead + n] what is added to attention logits: log size; None where all are 1."""
    if bool((sizes == 1).all()):
        return None
    return torch.cat((sizes.new_zeros(lead), sizes.log()))[None, None, None].to(dtype)


def _reduced(policy: EncoderPolicy, tokens: LayerTokens, count: int, vision: Vision) -> LayerTokens:
    is_first = True
    while len(tokens) > 1 and (is_first or len(tokens) > count):
        tokens = tokens.reduced(policy.reduce(tokens, min(count, len(tokens)), vision))
        is_first = False
    return tokens


class _Attention:
    """Rows of a layer's attention matrix, computed where a policy asks for them."""

    def __init__(self, module: Any, normed: Tensor, keys: Tensor, bias: Tensor | None):
        self._module, self._normed, self._keys, self._bias = module, normed, keys, bias

    def __call__(self, rows: slice) -> Tensor:
        module = self._module
        queries = _heads(module, module.q_proj(self._normed[:, rows])).float()
        logits = queries @ self._keys.float().mT * module.scale
        attention: Tensor = (logits if self._bias is None else logits + self._bias).softmax(-1)[0]
        return attention


def _heads(module: Any, rows: Tensor) -> Tensor:
    """[1, n, heads * dim] -> [1, heads, n, dim]"""
    return rows.view(1, rows.shape[1], module.num_heads, -1).transpose(1, 2)
