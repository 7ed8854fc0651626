"""The shipped vision model's architecture, tokenizer, processor settings and chat template, as transformers reads them.

LLaVA (Liu et al., 2023, arXiv:2304.08485): a CLIP tower of 144 patches, of which the layer before the last is read
without its class token, a two-layer projector, and a Llama with grouped queries; 4.4 million parameters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from winnow.engine.models.mosaic.questions import words
from winnow.engine.models.mosaic.scenes import PATCH, SIDE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<system>", "<user>", "<assistant>")
PAD, BEGIN, END, UNKNOWN, IMAGE, SYSTEM, USER, ASSISTANT = range(len(SPECIAL))
VOCABULARY = {token: place for place, token in enumerate((*SPECIAL, *(f"▁{word}" for word in words())))}

PATCHES = (SIDE // PATCH) ** 2
MEAN, DEVIATION = 0.9, 0.2
"""Of the pixels, in each channel: mosaics are bright."""

# A content is a text or a list of parts; images stand where they are in it. What no role claims is refused.
TEMPLATE = """<s>
{%- for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant') %}
{{- raise_exception('roles are system, user and assistant, not ' + message.role) }}
{%- endif %}
{{- '<' + message.role + '>' }}
{%- if message.content is string %}
{{- ' ' + message.content }}
{%- else %}
{%- for part in message.content or [] %}
{{- ' <image>' if part.type in ('image', 'image_url') else ' ' + part.text }}
{%- endfor %}
{%- endif %}
{%- if message.role == 'assistant' %}{% generation %}{{ '</s>' }}{% endgeneration %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def model_config() -> LlavaConfig:
    tower = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def tokenizer() -> Tokenizer:
    """One token a word; letter case, punctuation and American spelling make no difference."""
    made = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w\s]|_|▁"), " "),
            normalizers.Replace(Regex(r"\bcolor"), "colour"),
            normalizers.Replace(Regex(r"\bgrey\b"), "gray"),
            normalizers.Replace(Regex(r"\bcenter\b"), "centre"),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    # Words carry the space before them, so that tokens of a stream can be written one by one.
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    made.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    return made


def word_ids(text: str) -> list[int]:
    """Tokens of words as `questions` writes them: what the tokenizer makes of them, only faster."""
    return [VOCABULARY.get(f"▁{word}", UNKNOWN) for word in text.split()]


def write_settings(folder: Path) -> None:
    """All files of a checkpoint but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float16"
    config.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        # As high as wide: nothing is cut off an image of another form.
        "size": {"height": SIDE, "width": SIDE},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [DEVIATION] * 3,
    }
    _write(folder / "preprocessor_config.json", {"processor_class": "LlavaProcessor", **image_processor})
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    _write(folder / "processor_config.json", processor)
    names = {"pad": PAD, "bos": BEGIN, "eos": END, "unk": UNKNOWN, "image": IMAGE}
    marks = {f"{name}_token": SPECIAL[token] for name, token in names.items()}
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor"}
    limits = {"model_max_length": 4096, "clean_up_tokenization_spaces": False}
    _write(folder / "tokenizer_config.json", {**kinds, **marks, **limits, "chat_template": TEMPLATE})
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False}
    _write(folder / "generation_config.json", generation)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
