"""The vision policies by name. A new one is a file in `policies/` and a line here; nothing else names it.

The request schema, the OpenAPI page, `/v1/models`, METHODS.md and the conformance tests follow from this table.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from winnow.engine.compression.vision.policy import VisionPolicy

VISION: dict[str, str] = {
    "random": "winnow.engine.compression.vision.policies.random:Random",
    "uniform": "winnow.engine.compression.vision.policies.uniform:Uniform",
    "avg_pool": "winnow.engine.compression.vision.policies.avg_pool:AvgPool",
    "downsample": "winnow.engine.compression.vision.policies.downsample:Downsample",
    "vtc_cls": "winnow.engine.compression.vision.policies.vtc_cls:VTCCLS",
    "div_prune": "winnow.engine.compression.vision.policies.div_prune:DivPrune",
    "vision_zip": "winnow.engine.compression.vision.policies.vision_zip:VisionZip",
    "vis_pruner": "winnow.engine.compression.vision.policies.vis_pruner:VisPruner",
    "holo_v": "winnow.engine.compression.vision.policies.holo_v:HoloV",
    "apet": "winnow.engine.compression.vision.policies.apet:ApET",
    "flash_vlm": "winnow.engine.compression.vision.policies.flash_vlm:FlashVLM",
    "id_pruner": "winnow.engine.compression.vision.policies.id_pruner:IDPruner",
    "to_dre": "winnow.engine.compression.vision.policies.to_dre:ToDRE",
    "global_com2": "winnow.engine.compression.vision.policies.global_com2:GlobalCom2",
    "token_corr": "winnow.engine.compression.vision.policies.token_corr:TokenCorr",
    "to_me": "winnow.engine.compression.vision.policies.to_me:ToMe",
    "pi_to_me": "winnow.engine.compression.vision.policies.pi_to_me:PiToMe",
    "diff_rate": "winnow.engine.compression.vision.policies.diff_rate:DiffRate",
    "dy_mu": "winnow.engine.compression.vision.policies.dy_mu:DyMU",
    "zero_tprune": "winnow.engine.compression.vision.policies.zero_tprune:ZeroTPrune",
    "evs": "winnow.engine.compression.vision.policies.evs:EVS",
    "flash_vid": "winnow.engine.compression.vision.policies.flash_vid:FlashVID",
    "aot": "winnow.engine.compression.vision.policies.aot:AOT",
    "stc": "winnow.engine.compression.vision.policies.stc:STC",
    "fast_v": "winnow.engine.compression.vision.policies.fast_v:FastV",
    "pyramid_drop": "winnow.engine.compression.vision.policies.pyramid_drop:PyramidDrop",
    "sparse_vlm": "winnow.engine.compression.vision.policies.sparse_vlm:SparseVLM",
    "adsc": "winnow.engine.compression.vision.policies.adsc:ADSC",
    "must_drop": "winnow.engine.compression.vision.policies.must_drop:MustDrop",
    "duet_vlm": "winnow.engine.compression.vision.policies.duet_vlm:DuetVLM",
    "zipvl": "winnow.engine.compression.vision.policies.zipvl:ZipVL",
}


@cache
def vision_policy(name: str) -> VisionPolicy:
    """The one instance of the policy; KeyError if there is none of this name."""
    module, attribute = VISION[name].split(":")
    policy: VisionPolicy = getattr(import_module(module), attribute)()
    return policy
