"""Profiles for the models of the tests: the shipped ones of the default model; tiny models are calibrated."""

from __future__ import annotations

from functools import cache

from winnow.engine.calibration.registry import CALIBRATED
from winnow.engine.calibration.run import calibrate
from winnow.engine.calibration.store import PACKAGED, Profile, load_profiles
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import resolve_model

DEFAULT_VOCABULARY = 49152


@cache
def profiles_of(model: Decoder) -> dict[str, Profile]:
    if not isinstance(model, Decoder):
        return {}  # a stand-in that only fails
    if model.config.vocab_size == DEFAULT_VOCABULARY:
        return load_profiles(resolve_model("default"), (PACKAGED,))
    text = [(7 * i * i + 3) % model.config.vocab_size for i in range(100)]
    return {method: calibrate(model, method, text) for method in CALIBRATED}
