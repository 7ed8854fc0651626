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


def run_layers(layers: Sequence[Any], embedded: Tensor, lead: int, vision: Vision) -> tuple[Tensor, Tensor]:
    """What the layers make of one image.

    Args
        layers   those that are run
        embedded [lead + P, width]: what the first one reads
        lead     tokens before the P patches: 1 in towers with a class token, else 0
        vision   of a plan whose policy is an `EncoderPolicy`
    Returns
        [lead + n, width]: what is left behind the last one
        [n] int64, ascending: the patches at whose places its patch tokens stand
    """
    policy, patches = vision_policy(vision.policy), len(embedded) - lead
    assert isinstance(policy, EncoderPolicy)
    keep = vision.tokens(patches)
    counts = policy.counts(len(layers), patches, keep, vision) if keep < patches else None
    run = Run(embedded, lead, len(layers))
    for number, layer in enumerate(layers):
        tokens = run.attend(number, layer)
        run.go_on(layer, tokens if counts is None else _reduced(policy, tokens, counts[number], vision))
    order = run.places.sort().indices
    return torch.cat((run.states[:lead], run.states[lead:][order])), run.places[order]


class Run:
    """One image on its way through the layers, each of which is run in two halves."""

    def __init__(self, embedded: Tensor, lead: int, layers: int):
        """As `run_layers` takes them; `layers` are counted."""
        patches = len(embedded) - lead
        self.states = embedded
        """[lead + n, width]"""
        self.places = torch.arange(patches, device=embedded.device)
        """[n] int64"""
        self._sizes = torch.ones(patches, device=embedded.device)
        self._lead, self._layers = lead, layers

    def attend(self, number: int, layer: Any) -> LayerTokens:
        """Runs a layer up to its attention. Returns the patch tokens."""
        lead = self._lead
        normed = layer.layer_norm1(self.states[None])
        bias = _bias(self._sizes, lead, normed.dtype)
        self.states = self.states + layer.self_attn(hidden_states=normed, attention_mask=bias)[0][0]
        return LayerTokens(
            layer=number,
            layers=self._layers,
            lead=lead,
            states=self.states[lead:],
            keys=_heads(layer.self_attn, layer.self_attn.k_proj(normed[:, lead:]))[0].transpose(0, 1),
            sizes=self._sizes,
            places=self.places,
            attend=_Attention(layer.self_attn, normed, bias),
        )

    def go_on(self, layer: Any, left: LayerTokens) -> None:
        """Runs the rest of the layer on what is left of the patch tokens."""
        states = torch.cat((self.states[: self._lead], left.states))
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
    """The attention matrix of a layer, computed where a policy asks for it."""

    def __init__(self, module: Any, normed: Tensor, bias: Tensor | None):
        self._module, self._normed, self._bias = module, normed, bias

    def __call__(self) -> Tensor:
        module = self._module
        queries, keys = (_heads(module, project(self._normed)).float() for project in (module.q_proj, module.k_proj))
        logits = queries @ keys.mT * module.scale
        attention: Tensor = (logits if self._bias is None else logits + self._bias).softmax(-1)[0]
        return attention


def _heads(module: Any, rows: Tensor) -> Tensor:
    """[1, n, heads * dim] -> [1, heads, n, dim]"""
    return rows.view(1, rows.shape[1], module.num_heads, -1).transpose(1, 2)
