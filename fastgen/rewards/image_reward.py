"""ImageReward: a BLIP that reads picture and prompt together, fine-tuned on rankings of generated pictures."""

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
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # statistics of the head's output, from the authors' code
LENGTH = 35  # tokens per prompt
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


@dataclass(frozen=True, config=CONFIG)
class ImageReward(Reward):
    """r(x, prompt) = (head(h) - 0.1672) / 1.0333, mostly -2.3 to 2 (Xu et al., arXiv 2304.05977).

    h: the first output token of BLIP's text encoder, whose layers attend to all tokens of the picture's ViT-L/16.
    Therefore only a prompt's tokens can be cached, not its features. head: the linear stack that aesthetic uses, too.
    Input: the shorter side is resized to 224, bicubic, and the centre is cropped. Prompts are padded to, and cut at,
    35 tokens. Gradient: to the pixels of the crop.

    path: the folder with ImageReward.pt and med_config.json, or the hub id THUDM/ImageReward (now zai-org's).
    tokenizer: the uncased BERT tokenizer, as a folder or hub id. By default it is `path` if that folder has a
    vocab.txt, and google-bert/bert-base-uncased if `path` is a hub id."""

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

    def other_files(self) -> list[Path]:
        return [weights.find(self.path, "med_config.json"), weights.find(self.tokenizer_path, "vocab.txt")]

    @property
    def input_size(self) -> str:
        return "shorter side to the network's (224), bicubic, centre crop"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        return load(self.path, self.tokenizer_path, x.device)(x, prompts)


class Network:
    """The BLIP encoders of transformers and the head, frozen."""

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
        picture = self.modules["vision"](pixel_values=images.normalise(x)).last_hidden_state
        text = self.modules["text"](
            input_ids=ids, attention_mask=mask, encoder_hidden_states=picture
        ).last_hidden_state
        return (self.modules["mlp"]["layers"](text[:, 0]).squeeze(1) - MEAN) / STD

    def _tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return tokens["input_ids"][0], tokens["attention_mask"][0]


@lru_cache(maxsize=2)
def load(path: str, tokenizer: str, device: torch.device) -> Network:
    """The network, cached. Raises ValueError unless the checkpoint has exactly its tensors."""
    return Network(path, tokenizer, device)


def bert_tokenizer(vocabulary: Path, size: int) -> Any:
    """BERT's lower-case tokenizer, with BLIP's two tokens added after its vocabulary. Raises ValueError if the number
    of tokens is not `size`, the network's number of embeddings."""
    from transformers import BertTokenizer

    words = {word: number for number, word in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}
    tokenizer = BertTokenizer(vocab=words, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != size:
        raise ValueError(
            f"tokenizer: {vocabulary} with two added tokens has {len(tokenizer)} tokens, but "
            f"med_config.json says {size}; give the tokenizer of {TOKENIZER}"
        )
    return tokenizer


def transformers_name(name: str) -> str:
    """Translates BLIP's name of a tensor to the name in transformers' classes."""
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
    """A ViT with the sizes found in the checkpoint (published: 24 layers of width 1024, patches of 16, 224 pixels).
    Heads are 64 wide, and norms have BLIP's epsilon. Raises ValueError if tensors that give the sizes are missing."""
    from transformers import BlipVisionConfig, BlipVisionModel

    try:
        width, _, patch, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
        positions = tensors["vision.embeddings.position_embedding"].shape[1] - 1
        inner = tensors["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"the checkpoint lacks {error.args[0]}, so it is not an ImageReward; give {EXAMPLE}'s"
        ) from None
    depth = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("vision.encoder.layers."))
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        image_size=math.isqrt(positions) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )
    return BlipVisionModel(config)


def text_encoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The BERT that med_config.json describes, with cross-attention to the picture's tokens. `is_decoder` only creates
    the cross-attention; the forward pass is bidirectional."""
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
