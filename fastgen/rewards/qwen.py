"""Qwen2-VL as a judge: what hpsv3 and video_reward share.

A conversation holds the picture (or frames) and a question that ends in special tokens; a small head reads the hidden
state at each of them. As in the judges' own code the language model is told plain positions 0, 1, 2, ... (not Qwen's
three-dimensional ones), and nothing after a special token matters, since it is causal; so samples run one at a time,
unpadded, each recomputed in the backward pass instead of kept."""

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.modules.recomputation import checkpointed
from fastgen.rewards import images, weights

PATCH, MERGE, PAIR = 14, 2, 2  # pixels of a patch; patches a side, and frames, of a token
SIDE = PATCH * MERGE
BASE_FILES = ("config.json",), ("tokenizer.json", "vocab.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def smart_size(height: int, width: int, low: int, high: int) -> tuple[int, int]:
    """Qwen2-VL's size: multiples of 28 with an area of low to high pixels, near the same proportions."""
    h, w = (max(1, round(side / SIDE)) for side in (height, width))
    if h * w * SIDE**2 > high:
        shrink = math.sqrt(height * width / high)
        h, w = (max(1, math.floor(side / shrink / SIDE)) for side in (height, width))
    elif h * w * SIDE**2 < low:
        grow = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * grow / SIDE) for side in (height, width))
    return h * SIDE, w * SIDE


def patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised frames [T, 3, H, W], T even, to the vision tower's rows [T/2 H/14 W/14, 3 2 14 14] and the grid (T/2,
    H/14, W/14): views and a permutation, the 2 x 2 patches of a token adjacent."""
    t, c, h, w = frames.shape
    grid = (t // PAIR, h // PATCH, w // PATCH)
    x = frames.view(grid[0], PAIR, c, grid[1] // MERGE, MERGE, PATCH, grid[2] // MERGE, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), c * PAIR * PATCH * PATCH), grid


def check_template(file: str, names: Sequence[str], tokens: Sequence[str], source: str) -> None:
    """Raises ValueError unless the file holds the judge's question."""
    read_template(file, tuple(names), tuple(tokens), source)


@lru_cache(maxsize=8)
def read_template(file: str, names: tuple[str, ...], tokens: tuple[str, ...], source: str) -> str:
    """The judge's question with {text_prompt} and its special tokens: a text file, or the official Python file, of
    which the string constants `names` are read, joined, and nothing is run.

    Raises ValueError if they are not there. The questions are their authors'; fastgen ships none."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"template: there is no file {file}; give {source}, or a text file with the question in it")
    text = path.read_text()
    if path.suffix == ".py":
        found = {
            target.id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"template: {file} has no string {' and no '.join(missing)}; give {source}")
        text = "".join(found[name] for name in names)
    for part in ("{text_prompt}", *tokens):
        if text.count(part) != 1:
            raise ValueError(
                f"template: {file} holds {part} {text.count(part)} times, and needs it once; give {source}"
            )
    return text


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Qwen2-VL checkpoint's tensors, of any transformers version, as Judge has them. The language model's own output
    layer, which no judge uses, is left out."""
    prefixes = (
        ("model.visual.", "vision."),
        ("visual.", "vision."),
        ("model.language_model.", "language."),
        ("model.", "language."),
        ("rm_head.", "head."),
    )
    result = {}
    for name, tensor in tensors.items():
        old, new = next((p for p in prefixes if name.startswith(p[0])), ("", ""))
        if not name.startswith("lm_head."):
            result[new + name[len(old) :]] = tensor
    return result


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A PEFT checkpoint's tensors as those of its base, the adapters added: W + scale B A, in float32."""
    plain, adapters = {}, dict[str, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name = name.replace(".modules_to_save.default.", ".")
        if found := re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name):
            adapters.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor.float()
        elif ".original_module." not in name:
            plain[name] = tensor
    for name, pair in adapters.items():
        if name not in plain or len(pair) < 2:
            raise ValueError(
                f"the adapter of {name} lacks its {'layer' if name not in plain else 'other half'}; give "
                "the published checkpoint, whole"
            )
        plain[name] = plain[name].float() + scale * pair["B"] @ pair["A"]
    return plain


class Judge:
    """Vision tower, language model and head, frozen; strict about what it is made of."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        base: str,
        head: Callable[[int], nn.Module],
        tokens: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        source: object,
    ):
        from accelerate import init_empty_weights
        from transformers import AutoTokenizer, Qwen2VLConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VisionTransformerPretrainedModel,
            Qwen2VLTextModel,
        )

        folder = weights.snapshot(base, "*.json", "*.txt")
        config: Any = Qwen2VLConfig.from_pretrained(folder)
        if "language.embed_tokens.weight" not in tensors:
            raise ValueError(f"{source} lacks the embeddings of its tokens; give the published checkpoint, whole")
        config.text_config.vocab_size = len(tensors["language.embed_tokens.weight"])
        with init_empty_weights(include_buffers=False):
            modules = nn.ModuleDict(
                {
                    "vision": Qwen2VisionTransformerPretrainedModel(config.vision_config),
                    "language": Qwen2VLTextModel(config.text_config),
                    "head": head(config.text_config.hidden_size),
                }
            )
        typed = {n: t.to(torch.float32 if n.startswith("head.") else dtype) for n, t in tensors.items()}
        weights.load_strictly(modules, typed, source, assign=True)
        self.modules, self.device, self.dtype = weights.freeze(modules, device), device, dtype
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        special: Any = self.tokenizer.convert_tokens_to_ids(list(tokens))
        self.special: list[int] = special
        if max(self.special) >= config.text_config.vocab_size:
            raise ValueError(
                f"{source} embeds {config.text_config.vocab_size} tokens, and base's tokenizer has more; "
                "give the base that it was trained from"
            )
        chat = folder / "chat_template.json"
        self.chat = weights.read_json(chat)["chat_template"] if chat.is_file() else None
        self.ids = lru_cache(maxsize=4096)(self._ids)

    def __call__(self, frames: Tensor, question: str, kind: str) -> Tensor:
        """frames: [T, 3, H, W] in [0, 1], T even, sides multiples of 28; kind: image or video. Returns the head's
        output at each special token, [tokens, outputs] float32, with gradient to the frames.

        Raises ValueError if the question, with its prompt, does not hold each special token exactly once."""
        count = len(frames) // PAIR * math.prod(side // SIDE for side in frames.shape[-2:])
        ids = self.ids(question, kind, count).to(self.device)
        return checkpointed(self._forward, frames, ids, self._pad(kind))

    def _forward(self, frames: Tensor, ids: Tensor, pad: int) -> Tensor:
        return self.answer(*patches(images.normalise(frames)), ids, pad)

    def answer(self, rows: Tensor, grid: tuple[int, int, int], ids: Tensor, pad: int) -> Tensor:
        """rows, grid: as `patches` gives them; ids [L] with the places of the picture, which hold `pad`."""
        thw = torch.tensor([grid], device=self.device)
        seen = self.modules["vision"](rows.to(self.dtype), grid_thw=thw).pooler_output
        embedded = self.modules["language"].embed_tokens(ids)
        embedded = embedded.masked_scatter((ids == pad)[:, None], seen)
        hidden = self.modules["language"](inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]
        places = torch.stack([(ids == token).nonzero()[0, 0] for token in self.special])
        return self.modules["head"](hidden[places].float())

    def _pad(self, kind: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")

    def _ids(self, question: str, kind: str, count: int) -> Tensor:
        """The conversation's tokens, [L], with `count` places for the picture."""
        message: dict[str, Any] = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}
        text = self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, chat_template=self.chat
        )
        pad = f"<|{kind}_pad|>"
        ids = torch.tensor(self.tokenizer(text.replace(pad, pad * count, 1))["input_ids"])
        for token, wanted in ((self._pad(kind), count), *((token, 1) for token in self.special)):
            if (found := int((ids == token).sum())) != wanted:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise ValueError(
                    f"a conversation holds {name} {found} times, and should {wanted}; take it out of the prompt"
                )
        return ids
