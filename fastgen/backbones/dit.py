"""DiT: a discrete diffusion as Stable Diffusion's, a transformer on 2 x 2 patches, conditioned on one of 1000 classes.

A prompt is the name of a class, as the pipeline's id2label gives it, or its number. The empty prompt is the null
class, which guidance leads away from. Half of the network's outputs are learned variances, which the stock pipeline
drops, and so do we."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.flow_image import TransformerDenoiser
from fastgen.backbones.folder import read_index
from fastgen.backbones.sd import SD, SDConfig
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.registry import nearest
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import PredictionType, VPSchedule

NULL_CLASS = 1000  # of DiTPipeline's call; the classes are 0 to 999


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DiTConfig(SDConfig):
    """resolution: only that of the transformer, which is the default. negative_prompt: only the empty one, which is
    the null class."""

    name: Literal["dit"] = "dit"  # type: ignore[assignment]

    pipelines: ClassVar[tuple[str, ...]] = ("DiTPipeline",)
    takes_added_inputs: ClassVar[bool] = False

    def check(self) -> None:
        if self.negative_prompt:
            raise ValueError(
                "negative_prompt: DiTPipeline guides away from its null class and from nothing else; leave it out"
            )
        super().check()

    def check_export(self, policy: RolloutPolicy) -> None:
        if policy.transition == "tcd":
            raise ValueError(
                "transition: tcd cannot be exported: DiTPipeline's call has no eta for TCDScheduler; use renoise or "
                "ode"
            )
        super().check_export(policy)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if (folder := self.local_folder()) is not None:
            class_ids(prompts, read_index(folder).get("id2label"))

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "DiT":
        return DiT(self, device, dtype, roles)


def class_ids(prompts: Sequence[str], id2label: Mapping[str, str] | None) -> list[int]:
    """The class of each prompt: a number, the whole text of a label, or one of its names, as in DiTPipeline's
    `get_label_ids`. Raises ValueError for a prompt that is none of them."""
    found = {name.strip(): int(i) for i, text in (id2label or {}).items() for name in text.split(",")}
    found |= {text.strip(): int(i) for i, text in (id2label or {}).items()} | {"": NULL_CLASS}
    for prompt in prompts:
        if prompt.isdecimal() and int(prompt) < NULL_CLASS:
            found[prompt] = int(prompt)
        elif prompt not in found:
            known = [name for name in found if name]
            hint = nearest(prompt, known).split("; valid")[0] if known else "; its id2label is missing"
            raise ValueError(
                f"prompt {prompt!r} is no class of this pipeline: give a label of its model_index.json, or a number "
                f"from 0 to {NULL_CLASS - 1}{hint}"
            )
    return [found[prompt] for prompt in prompts]


class DiTDenoiser(TransformerDenoiser):
    """A DiTTransformer2DModel behind the contract. Its label embeddings replace labels by the null class at random in
    training mode; here they never do, because what a network is conditioned on is the objective's choice."""

    def __init__(self, network: Any, schedule: VPSchedule, prediction_type: PredictionType):
        super().__init__(network, network.inner_dim, schedule, prediction_type)
        for block in network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        output = self.network(
            x_t.to(self.weight_dtype),
            timestep=self.timestep(t, inputs),
            class_labels=cond["label"].long(),
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]  # without the learned variances

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.transformer_blocks[0].norm1.emb

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        """Raises ValueError: each block has a time embedding of its own, so that there is no one place for them."""
        raise ValueError(f"a DiT network takes no added inputs, got {[*counts, *levels]}: each block embeds the time")


class DiT(SD):
    """The backbone of recipes with `backbone: {name: dit, path: ...}`."""

    config: DiTConfig
    network_class = "DiTTransformer2DModel"
    block_lists: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    head_keys = ("num_attention_heads",)
    subfolder = "transformer"
    stores_adapters = False  # the stock pipeline loads none

    def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        raise ValueError("DiTPipeline makes images of one size")

    def check(self) -> None:
        """Also raises ValueError for a null class, a size or a scheduler that DiTPipeline's call does not have."""
        classes = self.network_config.get("num_embeds_ada_norm", NULL_CLASS)
        if classes != NULL_CLASS:
            raise ValueError(f"path: this transformer has {classes} classes; DiTPipeline's null class is {NULL_CLASS}")
        super().check()
        own = self.network_config["sample_size"] * self.pixels_per_latent
        if self.image_size != own:
            raise ValueError(f"resolution: DiTPipeline makes images of {own} x {own} only; leave it out")
        scheduler = self.scheduler()
        if (sigma := float(scheduler.init_noise_sigma)) != 1:
            raise ValueError(
                f"path: {type(scheduler).__name__} starts from noise of size {sigma:.3g}, and "
                "DiTPipeline starts from size 1; make the scheduler a DDIMScheduler"
            )

    def wrap(self, network: Any) -> Denoiser:
        self.check()
        return DiTDenoiser(network, self.schedule, self.scheduler().config.prediction_type)

    @property
    def call(self) -> str:  # type: ignore[override]
        """The stock pipeline gives its scheduler no generator, so that it draws from the global one."""
        return """torch.manual_seed(0)
classes = [207]  # or pipeline.get_label_ids([a name of a class])
image = pipeline(classes, num_inference_steps={num_steps}, guidance_scale=1).images[0]"""

    def plain_call(self, policy: RolloutPolicy, adapter: bool) -> str:
        return super().plain_call(policy, adapter).replace('"a prompt"', "classes")

    def time_width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    @cached_property
    def labels(self) -> Mapping[str, str] | None:
        return self.components.get("id2label")

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """label [B], int64."""
        return Conditioning({"label": torch.tensor(class_ids(prompts, self.labels), device=self.device)})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"label": ()}

    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """The stock pipeline does not save its labels; they are put back into model_index.json."""
        super().save_pipeline(student, policy, folder)
        path = folder / "model_index.json"
        if self.labels is not None and path.is_file():
            index = json.loads(path.read_text()) | {"id2label": dict(self.labels)}
            path.write_text(json.dumps(index, indent=2) + "\n")
