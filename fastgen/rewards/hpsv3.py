"""Human Preference Score v3: Qwen2-VL-7B with a head that gives a mean and an uncertainty."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.rewards import images, qwen, weights
from fastgen.rewards.base import CONFIG, Reward, Score

EXAMPLE, BASE = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"
TOKENS = ("<|Reward|>",)
QUESTION = ("INSTRUCTION", "prompt_with_special_token")  # the constants of hpsv3/dataset/data_collator_qwen.py
SOURCE = "hpsv3/dataset/data_collator_qwen.py of the package hpsv3"
AREA = 256 * 28 * 28


@dataclass(frozen=True, config=CONFIG)
class HPSv3(Reward):
    """r(x, prompt) = mu, from -4 to 16; good pictures score 10 to 15.6. The part `sigma` is the head's second output,
    its uncertainty as trained (arXiv 2508.03789).

    (mu, sigma) = W3 relu(W2 relu(W1 h)), with h the hidden state at <|Reward|>. The hidden layers have 1024 and 16
    units, all layers have biases, and dropout is used in training only. Input: resized (bicubic) to sides that are
    multiples of 28, with at most 200,704 pixels; a square becomes 448 x 448. Gradient: to all pixels, one sample at a
    time; activations are recomputed.

    path: the folder with HPSv3.safetensors, or the hub id MizzenAI/HPSv3. base: Qwen/Qwen2-VL-7B-Instruct, a folder or
    that id; only its config and tokenizer are used, not its weights. template: a local file with the question, see
    docs/rewards.md. dtype: that of the networks, which take 28 GB in float32. The authors computed their numbers in
    bfloat16."""

    path: str
    base: str
    template: str
    dtype: Literal["float32", "bfloat16"] = "float32"

    input = "pixels"
    differentiable = True

    def ready(self) -> None:
        weights.check_files(self.path, "path", EXAMPLE, ("HPSv3.safetensors",))
        weights.check_files(self.base, "base", BASE, *qwen.BASE_FILES)
        qwen.check_template(self.template, QUESTION, TOKENS, SOURCE)

    def weight_files(self) -> list[Path]:
        return [weights.find(self.path, "HPSv3.safetensors")]

    def other_files(self) -> list[Path]:
        return qwen.other_files(self.base, self.template)

    @property
    def input_size(self) -> str:
        return "multiples of 28, 200704 pixels at most, bicubic"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Score:
        judge = load(self.path, self.base, x.device, qwen.DTYPES[self.dtype])
        x = images.resize(x, *qwen.smart_size(x.shape[-2], x.shape[-1], AREA, AREA))
        question = qwen.read_template(self.template, QUESTION, TOKENS, SOURCE)
        rows = [
            judge(image.expand(qwen.PAIR, -1, -1, -1), question.replace("{text_prompt}", prompt), "image")[0]
            for image, prompt in zip(x, prompts, strict=True)
        ]
        mu, sigma = torch.stack(rows).unbind(1)
        return Score(mu, torch.ones_like(mu, dtype=torch.bool), {"sigma": sigma})


def head(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


@lru_cache(maxsize=1)
def load(path: str, base: str, device: torch.device, dtype: torch.dtype) -> qwen.Judge:
    """The network, cached. Raises ValueError unless the checkpoint has exactly its tensors."""
    file = weights.find(path, "HPSv3.safetensors")
    return qwen.Judge(qwen.own_names(weights.read_tensors(file)), base, head, TOKENS, device, dtype, file)
