"""ImageReward: BLIP, reading picture and prompt together, fine-tuned on rankings of generated pictures."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.rewards import images, weights
from fastgen.rewards.aesthetic import linear_stack
from fastgen.rewards.base import CONFIG, Reward

EXAMPLE = "THUDM/ImageReward"
FILES = ("ImageReward.safetensors", "ImageReward.pt")
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, from the authors' code
LENGTH = 35  # tokens of a prompt
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


@dataclass(frozen=True, config=CONFIG)
class ImageReward(Reward):
    """r(x, prompt) = (head(h) - 0.1672) / 1.0333, mostly -2.3 to 2 (Xu et al., arXiv 2304.05977).

    h: the first output token of BLIP's text encoder, whose layers attend to all tokens of the picture's ViT-L/16; so
    nothing of a prompt but its tokens can be kept. head: aesthetic's linear stack. Input: shorter side to 224,
    bicubic, centre crop; prompts padded to, and cut at, 35 tokens. Gradient: to the pixels of the crop.

    path: the folder with ImageReward.pt and med_config.json, or the hub id THUDM/ImageReward (now zai-org's).
    tokenizer: BERT's uncased one, a folder (by default `path` where it holds one) or its hub id."""

    path: str
    tokenizer: str | None = None

    input = "pixels"
    differentiable = True

    @property
    def tokenizer_path(self) -> str:
        if self.tokenizer is not None:
            return self.tokenizer
        return self.path if (Path(self.path) / "vocab.txt").is_file() else TOKENIZER

    def ready(self) -> None:
        weights.check_files(self.path, "path", EXAMPLE, FILES, ("med_config.json",))
        if Path(self.path).exists() and self.tokenizer is None and self.tokenizer_path != self.path:
            raise ValueError(
                f"tokenizer: {self.path} has no vocab.txt; give tokenizer, a local folder or the hub id {TOKENIZER}"
            )
        weights.check_files(self.tokenizer_path, "tokenizer", TOKENIZER, ("vocab.txt",))

    def weight_files(self) -> list[Path]:
        return [weights.find(self.path, *FILES)]

    @property
    def input_size(self) -> str:
        return "shorter side to the network's (224), bicubic, centre crop"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        return load(self.path, self.tokenizer_path, x.device)(x, prompts)


class Network:
    """Transformers' BLIP encoders and the head, frozen."""

    def __init__(self, path: str, tokenizer: str, device: torch.device):
        file = weights.find(path, *FILES)
        tensors = {transformers_name(name): tensor for name, tensor in weights.read_tensors(file).items()}
        config = weights.read_json(weights.find(path, "med_config.json"))
        vision = vision_encoder(tensors)
        modules = nn.ModuleDict(
            {
                "vision": vision,
                "text": text_encoder(config, tensors),
                "mlp": nn.ModuleDict({"layers": linear_stack(config["hidden_size"])}),
            }
        )
        weights.load_strictly(modules, tensors, file, UNUSED)
        self.modules, self.device = weights.freeze(modules, device), device
        self.size: int = vision.config.image_size
        self.tokens = lru_cache(maxsize=4096)(self._tokens)
        self.tokenizer = bert_tokenizer(weights.find(tokenizer, "vocab.txt"), config["vocab_size"])

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        ids, mask = (torch.stack(rows).to(self.device) for rows in zip(*map(self.tokens, prompts), strict=True))
        x = images.center_crop(images.shortest_side(pixels, self.size), self.size, round_half=True)
        seen = self.modules["vision"](pixel_values=images.normalise(x)).last_hidden_state
        read = self.modules["text"](input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.modules["mlp"]["layers"](read[:, 0]).squeeze(1) - MEAN) / STD

    def _tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        found = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return found["input_ids"][0], found["attention_mask"][0]


@lru_cache(maxsize=2)
def load(path: str, tokenizer: str, device: torch.device) -> Network:
    """Raises ValueError if the checkpoint is not exactly the network."""
    return Network(path, tokenizer, device)


def bert_tokenizer(vocabulary: Path, size: int) -> Any:
    """BERT's, lower case, with BLIP's two tokens after its vocabulary. Raises ValueError if that is not the network's
    number of embeddings."""
    from transformers import BertTokenizer

    words = {word: number for number, word in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}
    tokenizer = BertTokenizer(vocab=words, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != size:
        raise ValueError(
            f"tokenizer: {vocabulary} and two added tokens make {len(tokenizer)}, and med_config.json "
            f"says {size}; give the tokenizer of {TOKENIZER}"
        )
    return tokenizer


def transformers_name(name: str) -> str:
    """BLIP's name of a tensor as transformers' classes have it."""
    if name.startswith("blip.text_encoder.") and name not in UNUSED:
        return "text." + name.removeprefix("blip.text_encoder.")
    if not name.startswith("blip.visual_encoder."):
        return name
    name = name.removeprefix("blip.visual_encoder.")
    top = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
    if name in top:
        return f"vision.{top[name]}"
    for old, new in (
        ("patch_embed.proj.", "embeddings.patch_embedding."),
        ("blocks.", "encoder.layers."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
    ):
        name = name.replace(old, new)
    return "vision." + (f"post_layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name)


def vision_encoder(tensors: Mapping[str, Tensor]) -> Any:
    """The ViT whose sizes the checkpoint has (published: 24 layers of width 1024, patches of 16, 224 pixels); heads
    are 64 wide and norms have BLIP's epsilon."""
    from transformers import BlipVisionConfig, BlipVisionModel

    try:
        width, _, patch, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
        places = tensors["vision.embeddings.position_embedding"].shape[1] - 1
        inner = tensors["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the checkpoint lacks {error.args[0]}: it is no ImageReward; give {EXAMPLE}'s") from None
    depth = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("vision.encoder.layers."))
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        image_size=math.isqrt(places) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )
    return BlipVisionModel(config)


def text_encoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """med_config.json's BERT, its cross-attention as wide as the picture's tokens. `is_decoder` only makes that; the
    forward pass is bidirectional."""
    from transformers import BlipTextConfig, BlipTextModel

    known = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "layer_norm_eps",
        "pad_token_id",
    )
    width = tensors["vision.embeddings.patch_embedding.weight"].shape[0]
    options = {name: config[name] for name in known} | {"attn_implementation": "eager"}
    text = BlipTextConfig(encoder_hidden_size=width, is_decoder=True, **options)
    return BlipTextModel(text, add_pooling_layer=False)
