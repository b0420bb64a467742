"""VideoReward (VideoAlign): Qwen2-VL-2B judges a video's visual quality, its motion, and how well it matches its
prompt."""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.rewards import images, qwen, weights
from fastgen.rewards.base import CONFIG, Reward, Score

EXAMPLE, BASE = "KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"
Axis = Literal["VQ", "MQ", "TA"]
AXES: tuple[Axis, ...] = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{axis}_reward|>" for axis in AXES)
QUESTION = ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)
SOURCE = "prompt_template.py of KwaiVGI/VideoAlign"
MIN_AREA = 128 * 28 * 28  # pixels per frame, from the authors' vision_process.py
MIN_FRAMES, MAX_FRAMES = 4, 768
EXPECTED: dict[str, dict[str, Any]] = {
    "data_config": {"prompt_template_type": "detailed_special", "sample_type": "uniform"},
    "model_config": {"use_special_tokens": True, "reward_token": "special"},
}


@dataclass(frozen=True, config=CONFIG)
class VideoReward(Reward):
    """r(x, prompt) = sum of the chosen axes. Each axis is (W h - mean) / std with h the hidden state at the axis's own
    token, mostly -3 to 3 (Liu et al., arXiv 2501.13918). The parts vq, mq and ta are always returned. mean and std
    come from `inference_config` in model_config.json; without that section an axis is W h itself.

    Input: two frames per second (model_config.json's fps), evenly spaced from the first to the last. Their number is
    even, and at least 4 if the video has that many. Each frame is resized (bicubic) to sides that are multiples of 28,
    with 100,352 to max_frame_pixels pixels. Gradient: to the frames that are read.

    path: the folder with model_config.json and checkpoint-N, of which the highest N is used, or the hub id
    KwaiVGI/VideoReward. A checkpoint is either model.pth, or adapter_model.safetensors with non_lora_state_dict.pth.
    base: Qwen/Qwen2-VL-2B-Instruct, as a folder or that id; its config and tokenizer are used, and its weights if the
    checkpoint has adapters only. template: a local file with the question, see docs/rewards.md. fps: the frame rate of
    the scored videos, 16 for Wan 2.1. axes: Reward Forcing, which trains on motion alone, uses [MQ]."""

    path: str
    base: str
    template: str
    fps: float = Field(gt=0)
    axes: Annotated[tuple[Axis, ...], Field(min_length=1)] = AXES
    dtype: Literal["float32", "bfloat16"] = "float32"

    input = "frames"
    differentiable = True

    def ready(self) -> None:
        if len(set(self.axes)) < len(self.axes):
            raise ValueError(f"axes: name each axis at most once, got {', '.join(self.axes)}")
        layouts = ("checkpoint-*/model.pth", "checkpoint-*/adapter_model.safetensors")
        weights.check_files(self.path, "path", EXAMPLE, ("model_config.json",), layouts)
        weights.check_files(self.base, "base", BASE, *qwen.BASE_FILES)
        qwen.check_template(self.template, QUESTION, TOKENS, SOURCE)
        if (folder := Path(self.path)).is_dir():
            read_config(folder)
            if (newest(folder) / "adapter_model.safetensors").is_file():
                weights.check_files(str(newest(folder)), "path", EXAMPLE, ("non_lora_state_dict.pth",))
                weights.check_files(self.base, "base", BASE, ("*.safetensors",))

    def weight_files(self) -> list[Path]:
        return checkpoint_files(self.path, self.base)

    def other_files(self) -> list[Path]:
        config = weights.snapshot(self.path, "model_config.json") / "model_config.json"
        return [config, *qwen.other_files(self.base, self.template)]

    @property
    def input_size(self) -> str:
        return "2 frames a second, multiples of 28, bicubic"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Score:
        judge = load(self.path, self.base, x.device, qwen.DTYPES[self.dtype])
        config = read_config(weights.snapshot(self.path, "model_config.json"))
        data, calibration = config["data_config"], config.get("inference_config")
        question = qwen.read_template(self.template, QUESTION, TOKENS, SOURCE)
        chosen = x[:, frame_indices(x.shape[1], self.fps, data["fps"])]
        size = qwen.smart_size(x.shape[-2], x.shape[-1], MIN_AREA, data["max_frame_pixels"])
        rows = []
        for frames, prompt in zip(chosen, prompts, strict=True):
            out = judge(images.resize(frames, *size), question.replace("{text_prompt}", prompt), "video")
            rows.append(out.diagonal() if out.shape[1] == len(AXES) else out[:, 0])
        values = dict(zip(AXES, torch.stack(rows).unbind(1), strict=True))
        if calibration is not None:
            values = {a: (v - calibration[f"{a}_mean"]) / calibration[f"{a}_std"] for a, v in values.items()}
        total = torch.stack([values[axis] for axis in self.axes]).sum(0)
        parts = {axis.lower(): value for axis, value in values.items()}
        return Score(total, torch.ones_like(total, dtype=torch.bool), parts)


def frame_indices(total: int, fps: float, wanted: float) -> list[int]:
    """The indices of the frames to read out of `total`: `wanted` per second, evenly spaced, including the first and
    the last. Their number is even, and at least 4 if there are that many. Raises ValueError if `total` < 2."""
    if total < qwen.PAIR:
        raise ValueError(f"video_reward reads frames in pairs, but the video has {total}; use a video model")
    most = min(MAX_FRAMES, total) // qwen.PAIR * qwen.PAIR
    count = min(max(total / fps * wanted, MIN_FRAMES), most)
    count = min(round(count / qwen.PAIR) * qwen.PAIR, total)
    return torch.linspace(0, total - 1, count).round().long().tolist()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of model_config.json. Raises ValueError for a judge whose question or reward tokens are set up
    differently from the published one."""
    config = weights.read_json(folder / "model_config.json")
    for section, expected in EXPECTED.items():
        for key, value in expected.items():
            if (given := config.get(section, {}).get(key)) != value:
                raise ValueError(
                    f"path: {folder}/model_config.json has {section}.{key}: {given}, but only {value} is supported"
                )
    return config


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def local_checkpoint(path: str) -> Path:
    return newest(weights.snapshot(path, "model_config.json", "checkpoint-*"))


def checkpoint_files(path: str, base: str) -> list[Path]:
    """The weight files: model.pth alone, or the base's files, the other trained tensors, and the adapters."""
    folder = local_checkpoint(path)
    if (folder / "model.pth").is_file():
        return [folder / "model.pth"]
    trained = [folder / "non_lora_state_dict.pth", folder / "adapter_model.safetensors"]
    return [*sorted(weights.snapshot(base, "*.json", "*.txt", "*.safetensors").glob("*.safetensors")), *trained]


@lru_cache(maxsize=1)
def load(path: str, base: str, device: torch.device, dtype: torch.dtype) -> qwen.Judge:
    """The network, cached. Raises ValueError unless the checkpoint has exactly its tensors."""
    folder = local_checkpoint(path)
    config = read_config(folder.parent)
    lora = config["peft_lora_config"]
    scale = lora["lora_alpha"] / (math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"])
    tensors: dict[str, Tensor] = {}
    for file in checkpoint_files(path, base):
        tensors |= {n.removeprefix("base_model.model."): t for n, t in weights.read_tensors(file).items()}
    named = qwen.own_names(qwen.merged(tensors, scale))
    outputs = config["model_config"]["output_dim"]
    return qwen.Judge(named, base, partial(head, outputs=outputs), TOKENS, device, dtype, folder)


def head(width: int, outputs: int) -> nn.Module:
    return nn.Linear(width, outputs, bias=False)
