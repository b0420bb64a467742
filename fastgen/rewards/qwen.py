"""Qwen2-VL as a judge: what hpsv3 and video_reward share.

A conversation consists of the picture (or frames) and a question that ends in special tokens. A small head reads the
hidden state at each special token. As in the judges' own code, the language model is given plain positions (0, 1,
2, ...) instead of Qwen's three-dimensional ones. The model is causal, so what follows a special token does not affect
it. Samples run one at a time and without padding. The activations of each are not stored but recomputed in the
backward pass."""

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

PATCH, MERGE, PAIR = 14, 2, 2  # a patch's side in pixels; a token's side in patches; frames per token
SIDE = PATCH * MERGE
BASE_FILES = ("config.json",), ("tokenizer.json", "vocab.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def smart_size(height: int, width: int, low: int, high: int) -> tuple[int, int]:
    """Qwen2-VL's size for a picture: multiples of 28, `low` to `high` pixels in all, nearly the same proportions."""
    h, w = (max(1, round(side / SIDE)) for side in (height, width))
    if h * w * SIDE**2 > high:
        shrink = math.sqrt(height * width / high)
        h, w = (max(1, math.floor(side / shrink / SIDE)) for side in (height, width))
    elif h * w * SIDE**2 < low:
        grow = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * grow / SIDE) for side in (height, width))
    return h * SIDE, w * SIDE


def patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Rearranges normalised frames [T, 3, H, W], T even, into the vision tower's rows [T/2 H/14 W/14, 3 2 14 14], and
    returns them with the grid (T/2, H/14, W/14). The 2 x 2 patches of a token are adjacent rows."""
    t, c, h, w = frames.shape
    grid = (t // PAIR, h // PATCH, w // PATCH)
    x = frames.view(grid[0], PAIR, c, grid[1] // MERGE, MERGE, PATCH, grid[2] // MERGE, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), c * PAIR * PATCH * PATCH), grid


def check_template(file: str, names: Sequence[str], tokens: Sequence[str], source: str) -> None:
    """Raises ValueError unless the file contains the judge's question."""
    read_template(file, tuple(names), tuple(tokens), source)


@lru_cache(maxsize=8)
def read_template(file: str, names: tuple[str, ...], tokens: tuple[str, ...], source: str) -> str:
    """The judge's question, with {text_prompt} and the special tokens. The file is a text file, or the authors' Python
    file. Of the latter, the string constants `names` are read and joined; its code is not run.

    Raises ValueError if a part is missing. The questions belong to their authors, so fastgen ships none."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f"template: there is no file {file}; give {source}, or a text file that contains the question"
        )
    text = path.read_text()
    if path.suffix == ".py":
        constants = {
            target.id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        if missing := [name for name in names if name not in constants]:
            raise ValueError(f"template: {file} has no string {' and no '.join(missing)}; give {source}")
        text = "".join(constants[name] for name in names)
    for part in ("{text_prompt}", *tokens):
        if text.count(part) != 1:
            raise ValueError(
                f"template: {file} contains {part} {text.count(part)} times, but must contain it once; give {source}"
            )
    return text


def other_files(base: str, template: str) -> list[Path]:
    """What a judge reads besides weights: config, tokenizer and the form of a conversation of its base; the
    question."""
    folder = weights.snapshot(base, "*.json", "*.txt")
    names = ("config.json", *weights.TOKENIZER, "chat_template.json")
    return [*weights.present(folder, *names), Path(template)]


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Qwen2-VL checkpoint, from any transformers version, under the names that Judge uses. The
    language model's own output layer is left out, because no judge uses it."""
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
    """The tensors of a PEFT checkpoint under the names of its base model, with the adapters added: W + scale B A, in
    float32. Raises ValueError if an adapter is incomplete."""
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
                "the complete published checkpoint"
            )
        plain[name] = plain[name].float() + scale * pair["B"] @ pair["A"]
    return plain


class Judge:
    """A frozen vision tower, language model and head. `tensors` must be exactly theirs."""

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
            raise ValueError(f"{source} lacks the token embeddings; give the complete published checkpoint")
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
                f"{source} embeds {config.text_config.vocab_size} tokens, but the tokenizer of base has more; "
                "give the base that the checkpoint was trained from"
            )
        chat = folder / "chat_template.json"
        self.chat = weights.read_json(chat)["chat_template"] if chat.is_file() else None
        self.ids = lru_cache(maxsize=4096)(self._ids)

    def __call__(self, frames: Tensor, question: str, kind: str) -> Tensor:
        """frames: [T, 3, H, W] in [0, 1], T even, sides multiples of 28; kind: image or video. Returns the head's
        output at each special token, [tokens, outputs] float32, with gradient to the frames.

        Raises ValueError if the question, with its prompt, does not contain each special token exactly once."""
        count = len(frames) // PAIR * math.prod(side // SIDE for side in frames.shape[-2:])
        ids = self.ids(question, kind, count).to(self.device)
        return checkpointed(self._forward, frames, ids, self._pad(kind))

    def _forward(self, frames: Tensor, ids: Tensor, pad: int) -> Tensor:
        return self.answer(*patches(images.normalise(frames)), ids, pad)

    def answer(self, rows: Tensor, grid: tuple[int, int, int], ids: Tensor, pad: int) -> Tensor:
        """The head's output. rows, grid: from `patches`. ids: [L], with `pad` at the positions of the picture."""
        thw = torch.tensor([grid], device=self.device)
        picture = self.modules["vision"](rows.to(self.dtype), grid_thw=thw).pooler_output
        embedded = self.modules["language"].embed_tokens(ids)
        embedded = embedded.masked_scatter((ids == pad)[:, None], picture)
        hidden = self.modules["language"](inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]
        positions = torch.stack([(ids == token).nonzero()[0, 0] for token in self.special])
        return self.modules["head"](hidden[positions].float())

    def _pad(self, kind: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")

    def _ids(self, question: str, kind: str, count: int) -> Tensor:
        """The conversation's tokens, [L], with `count` positions for the picture."""
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
                    f"a conversation contains {name} {found} times instead of {wanted}; remove it from the prompt"
                )
        return ids
