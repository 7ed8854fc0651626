"""Draft models for the models of the tests: their own first layers, which agree with them now and then."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from winnow.engine.models.decoder import Decoder


@cache
def first_layers(model: Decoder, layers: int = 2) -> Decoder:
    """A model of as many of its layers, with its embedding, norm and head."""
    config = replace(model.config, layers=layers, windows=model.config.windows[:layers])
    return Decoder(config, model._ops, model._embedding, model._blocks[:layers], model._norm, model._head)
