"""Tiny vision-language models with random weights, made by transformers, with processor and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")
WITH_VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")

WORDS = ("user", "assistant", ":", "what", "is", "this", "?", "a", "red", "blue", "circle", "and", "two", "\n")
SPECIAL = (
    *("<unk>", "<s>", "</s>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<|video_pad|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)
IDS = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
VOCABULARY = 64

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": IDS["</s>"],
    "pad_token_id": IDS["<unk>"],
    "bos_token_id": IDS["<s>"],
    "initializer_range": 0.25,
}
"""Large weights, as in `checkpoints.SIZES`"""
VIT: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.25,
}
_PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]


def config_of(family: str) -> dict[str, Any]:
    """Of the whole model; what its parts share is above."""
    if family == "llava":
        clip = {**VIT, "model_type": "clip_vision_model"}
        return {"vision_config": clip, "text_config": {**TEXT, "model_type": "llama"}}
    if family == "llava_next":
        clip = {**VIT, "model_type": "clip_vision_model"}
        mistral = {**TEXT, "model_type": "mistral", "sliding_window": None}
        return {"vision_config": clip, "text_config": mistral, "image_grid_pinpoints": _PINPOINTS}
    if family == "llava_onevision":
        siglip = {
            **VIT,
            "image_size": 24,
            "patch_size": 8,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        }
        pinpoints = [[24 * rows, 24 * columns] for rows in range(1, 5) for columns in range(1, 5)]
        qwen = {**TEXT, "model_type": "qwen2"}
        return {
            "vision_config": siglip,
            "text_config": qwen,
            "image_grid_pinpoints": pinpoints,
            "vision_aspect_ratio": "anyres_max_4",
            "video_token_index": IDS["<video>"],
        }
    if family in ("qwen2_vl", "qwen2_5_vl"):
        vision: dict[str, Any] = {"depth": 3, "num_heads": 3, "patch_size": 4, "initializer_range": 0.25}
        if family == "qwen2_vl":
            vision |= {"embed_dim": 24, "hidden_size": 64, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": 64, "tokens_per_second": 2}
            vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        return {
            "vision_config": vision,
            "text_config": {**TEXT, "model_type": f"{family}_text", "rope_parameters": rope},
            "image_token_id": IDS["<|image_pad|>"],
            "video_token_id": IDS["<|video_pad|>"],
            "vision_start_token_id": IDS["<|vision_start|>"],
            "vision_end_token_id": IDS["<|vision_end|>"],
        }
    siglip = {**VIT, "model_type": f"{family}_vision"}
    tied = {**TEXT, "model_type": "llama"}
    return {"vision_config": siglip, "text_config": tied, "scale_factor": 2, "tie_word_embeddings": True}


def image_processor(family: str) -> Any:
    """transformers' own, on PIL."""
    if family == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    if family == "llava_next":
        edges = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        return LlavaNextImageProcessorPil(**edges, image_grid_pinpoints=_PINPOINTS)
    if family == "llava_onevision":
        pinpoints = config_of(family)["image_grid_pinpoints"]
        return LlavaOnevisionImageProcessorPil(size={"height": 24, "width": 24}, image_grid_pinpoints=pinpoints)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 8 * 8, "longest_edge": 48 * 48})
    cls = Idefics3ImageProcessorPil if family == "idefics3" else SmolVLMImageProcessorPil
    return cls(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, apart at spaces."""
    made = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s\n]+"), behavior="removed", invert=True)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def chat_template(family: str) -> str:
    image, video = ("<image>", "<video>") if family in ("idefics3", "smolvlm") else ("<image>\n", "<video>\n")
    if family in ("qwen2_vl", "qwen2_5_vl"):
        image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    part = f"{{% if part.type == 'image' %}}{image}{{% elif part.type == 'video' %}}{video}{{% else %}}"
    part += "{{ part.text }}{% endif %}"
    return (
        "<s>{% for message in messages %}{{ message.role }} : {% for part in message.content %}" + part + "{% endfor %}"
        " </s>{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )


def random_vlm(family: str, **changes: Any) -> PreTrainedModel:
    """In evaluation mode, attending eagerly."""
    stated = config_of(family) | {"image_token_id": IDS["<image>"]} | changes
    if family in ("qwen2_vl", "qwen2_5_vl"):
        stated["image_token_id"] = IDS["<|image_pad|>"]
    config = AutoConfig.for_model(family, **stated)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms are made as ones and biases as zeros, which would hide them
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def save_vlm(folder: Path, family: str, **changes: Any) -> PreTrainedModel:
    """Writes a whole checkpoint: weights, configs, tokenizer and chat template. Returns the model."""
    model = random_vlm(family, **changes)
    model.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    words = tokenizer()
    words.chat_template = chat_template(family)
    words.save_pretrained(folder)
    return model


def image_of(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise on a slope, so that no two patches are alike."""
    generator = np.random.default_rng(seed)
    slope = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    noise = generator.integers(0, 75, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))
