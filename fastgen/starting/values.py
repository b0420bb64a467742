"""The values of a first recipe.

Those that were tuned on a small teacher come from the recipe of the same objective for the shipped digits. Those of
large networks are of DMD2's adapter for SDXL, or ours, as the comments say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastgen.data.prompts import prompt_file, read_prompts
from fastgen.registry import shipped
from fastgen.starting.facts import Facts, Wishes

IMAGES = 64  # of an update of a large network, over all GPUs and micro-batches
# names of folders that say nothing of the pipeline in them
UNTELLING = ("teacher", "pipeline", "model", "checkpoint", "export", "diffusers", "final", "latest")
COPIES = ("student", "fake_score")  # roles that can be adapters of the teacher


def first_values(wishes: Wishes, facts: Facts) -> dict[str, Any]:
    template, large = read_template(wishes.objective), facts.large
    objective, train = dict(template["objective"]), train_of(template["train"], large)
    if large:  # as few samples at a time as the objective takes; fitted() raises it
        train["batch_size"] = objective.get("group_size", 1)
        train["accumulate"] = max(1, IMAGES // wishes.gpus // train["batch_size"])
    if "guidance_scale" in objective:
        objective["guidance_scale"] = facts.guidance
    if "phases" in objective:
        objective["phases"] = phases(wishes.steps, train["steps"])
    if large:
        for key in ("condition_on_stop", "stops"):
            objective.pop(key, None)
        if "phases" in objective:
            objective["experts"] = False  # adapters of several experts need a pipeline that has them
    name = f"{name_of(wishes.pipeline)}_{wishes.objective}_{wishes.steps}step"
    roles = list(template["optimizers"])
    copies = [role for role in COPIES if role in roles] if large else []
    values: dict[str, Any] = {
        "output_dir": f"runs/{name}",
        "seed": 0,
        "backbone": {"name": facts.config.name, "path": wishes.pipeline, **facts.settings},
        "rollout": {**template["rollout"], "timesteps": levels(wishes.steps, facts, template["rollout"])},
        "data": data_of(wishes),
        "objective": objective,
        **({"lora": {role: {"rank": 64, "alpha": 8} for role in copies}} if copies else {}),
        "optimizers": {role: optimizer(template["optimizers"][role], role in copies) for role in roles},
        "train": train,
        "eval": eval_of(wishes, facts),
    }
    return values


def name_of(pipeline: str) -> str:
    """The last part of its path or hub id; with the one before, if it says nothing of the pipeline."""
    *before, last = Path(pipeline).parts
    words = [before[-1], last] if before and last.lower() in UNTELLING else [last]
    return "_".join(words).lower().replace("-", "_")


def read_template(objective: str) -> dict[str, Any]:
    return yaml.safe_load((shipped("recipes") / f"digits_{objective}_4step.yaml").read_text())


def phases(steps: int, updates: int) -> list[dict[str, int]]:
    """Two phases of Phased DMD, the second longer, as in the recipe for the digits; one where there is one step."""
    if steps == 1:
        return [{"first": 0, "last": 1, "updates": updates}]
    first = round(0.3 * updates)
    middle = steps // 2
    return [
        {"first": 0, "last": middle, "updates": first},
        {"first": middle, "last": steps, "updates": updates - first},
    ]


def data_of(wishes: Wishes) -> dict[str, Any]:
    if wishes.images is not None:
        return {"name": "images", "folder": wishes.images}
    return {"name": "prompts", "prompts": prompts_of(wishes)}


def prompts_of(wishes: Wishes) -> str:
    """The file that was given, or the pipeline's own, or the prompts that ship for any."""
    return wishes.prompts or prompt_file(wishes.pipeline) or "neutral"


def optimizer(tuned: Mapping[str, Any], adapter: bool) -> dict[str, Any]:
    if not adapter:
        return dict(tuned)
    return {"lr": 5e-5, "betas": [0.9, 0.999], "weight_decay": 0.01, "max_grad_norm": 10.0, "warmup": 100}


def train_of(tuned: Mapping[str, Any], large: bool) -> dict[str, Any]:
    if not large:
        return dict(tuned)
    return {
        "steps": 5000,
        "batch_size": 1,
        "accumulate": 1,
        "mixed_precision": "bf16",
        "frozen_dtype": "bfloat16",
        "gradient_checkpointing": True,
        "ema_decay": 0.99,
        "sample_every": 250,
        "checkpoint_every": 250,
        "num_samples": 4,
    }


def eval_of(wishes: Wishes, facts: Facts) -> dict[str, Any]:
    count = 128 if facts.large else 1024
    values: dict[str, Any] = {
        "metrics": ["throughput"],
        "num_samples": count,
        "quick_num_samples": min(count, 256),
        "batch_size": 4 if facts.large else 64,
        "prompts": prompts_of(wishes),
        "teacher_steps": list(dict.fromkeys((facts.steps, wishes.steps))),
        "teacher_guidance_scale": facts.guidance,
    }
    if facts.config.output == "pixels":
        clip = wishes.scorers.get("clip_score", {}).get("path")
        features = {"features": "clip", "clip": clip} if clip else {"features": "latents"}
        varied = "diversity" if len(set(read_prompts(prompts_of(wishes)))) <= count // 4 else "precision_recall"
        metrics = ["fid", varied, *(["clip_retrieval"] if clip else []), *wishes.scorers, "throughput"]
        values |= {"metrics": metrics, "reference": "teacher", **features}
    if wishes.scorers:
        values["scorers"] = {name: dict(keys) for name, keys in wishes.scorers.items()}
    return values


def levels(steps: int, facts: Facts, rollout: Mapping[str, Any]) -> list[float]:
    return list(facts.config.even_levels(steps, facts.shift, rollout["transition"]))
