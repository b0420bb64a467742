"""CLIP in transformers' format. Scorers that use the same checkpoint share one copy of it and of its text features."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.rewards import images, weights

CLIP_FILES = (("config.json",), ("*.safetensors",))
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PATTERNS = ("*.json", "merges.txt", "vocab.txt", "*.safetensors")
MAX_TEXTS = 4096  # number of text features that are kept
TEXT_BATCH = 256  # texts that are encoded at once


class Texts:
    """Features of prompts, [B, D]. Each is encoded once and kept on the CPU; beyond MAX_TEXTS the oldest go."""

    def __init__(self) -> None:
        self.known: dict[str, Tensor] = {}

    def __call__(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Tensor], device: torch.device
    ) -> Tensor:
        """encode: maps prompts to [N, D]. It is called under no_grad, and only for new prompts, a batch at a time."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        found = {prompt: self.known[prompt] for prompt in prompts if prompt in self.known}
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            with torch.no_grad():
                found |= dict(zip(batch, encode(batch).cpu(), strict=True))
        self.known |= found
        for prompt in list(self.known)[: max(0, len(self.known) - MAX_TEXTS)]:
            del self.known[prompt]
        return torch.stack([found[prompt] for prompt in prompts]).to(device)


class Clip:
    """A frozen CLIP of any size. Features are float32 and have length 1."""

    def __init__(self, path: str, tokenizer: str, device: torch.device):
        from transformers import AutoTokenizer, CLIPModel

        self.device = device
        self.model = weights.freeze(weights.pretrained(CLIPModel, str(weights.snapshot(path, *PATTERNS))), device)
        self.tokenizer = AutoTokenizer.from_pretrained(str(weights.snapshot(tokenizer, "*.json", "*.txt")))
        self.size: int = self.model.config.vision_config.image_size
        self.scale = float(self.model.logit_scale.detach().exp())
        self.texts = Texts()

    def image(self, pixels: Tensor, round_half: bool = False) -> Tensor:
        """Features [B, D], of length 1, of pixels [B, 3, H, W] in [0, 1], with gradient."""
        return F.normalize(self.embedding(pixels, round_half), dim=-1)

    def embedding(self, pixels: Tensor, round_half: bool = False) -> Tensor:
        """The features before they are given length 1. The shorter side is resized to the network's size, the centre
        is cropped, and the pixels are normalised."""
        x = images.center_crop(images.shortest_side(pixels, self.size), self.size, round_half)
        pooled = self.model.vision_model(pixel_values=images.normalise(x)).pooler_output
        return self.model.visual_projection(pooled)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Features [B, D] of prompts, which are cut at the network's length, 77 tokens."""
        return self.texts(prompts, self._encode, self.device)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


@lru_cache(maxsize=4)
def load_clip(path: str, tokenizer: str, device: torch.device) -> Clip:
    """The network, cached. Raises ValueError unless the checkpoint has exactly the tensors of a CLIP."""
    return Clip(path, tokenizer, device)


def config_files(path: str) -> list[Path]:
    """What the network for pictures is made from, besides its weights."""
    return [weights.snapshot(path, *PATTERNS) / "config.json"]


def text_files(path: str, tokenizer: str) -> list[Path]:
    """The same of the network for texts, with its tokenizer."""
    folder = weights.snapshot(tokenizer, "*.json", "*.txt")
    return [*config_files(path), *weights.present(folder, *weights.TOKENIZER)]


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a folder or hub id."""
    return sorted(weights.snapshot(path, *PATTERNS).glob("*.safetensors"))
