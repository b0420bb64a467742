"""diffusers pipelines for students with extra inputs: flow maps, which are conditioned on the level where their step
ends, and students that are conditioned on a guidance scale or on their number of steps.

Each is a stock pipeline of stock networks. Next to them, `inputs.safetensors` holds the weights of the added inputs
(`modules.inputs.ExtraInputs`). Plain diffusers does not know the class that model_index.json names, so that it cannot
sample such a folder without its inputs. To load one:

    from fastgen.pipelines.flow_map import FlowMapStableDiffusion3Pipeline
    pipeline = FlowMapStableDiffusion3Pipeline.from_pretrained(folder)
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, WanPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fastgen.pipelines.few_step  # noqa: F401 - diffusers looks its schedulers up among the imported modules
from fastgen.modules.inputs import ExtraInputs, UNetExtraInputs, WanExtraInputs, level_column
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, Schedule, VPSchedule

INPUTS = "inputs.safetensors"


def save_inputs(weights: Mapping[str, Tensor], policy: RolloutPolicy, schedule: Schedule, folder: Path) -> None:
    """Saves the branches of the networks' extra inputs, and how a sampler sets these inputs. weights:
    "<expert>.<name>" -> tensor, with the experts from high noise to low."""
    total = len(schedule.table) - 1 if isinstance(schedule, VPSchedule) else 0
    settings = {
        "names": list(policy.inputs),
        "to_zero": policy.transition not in ("ode", "tcd"),
        "eta": policy.eta if policy.transition == "tcd" else 0.0,
        "guidance": policy.embedded_guidance,
        "discrete": total,
    }
    metadata = {"format": "pt", "told": json.dumps(settings)}
    save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / INPUTS, metadata)


def read_inputs(folder: Path) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """What save_inputs wrote: how the inputs are set, and the weights of each network's branches. Raises ValueError,
    naming the file, if it cannot be read."""
    try:
        with safe_open(folder / INPUTS, framework="pt") as file:
            settings = json.loads(file.metadata()["told"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / INPUTS} cannot be read: {error}; export or download it again") from None
    parts: list[dict[str, Tensor]] = [{} for _ in range(1 + max(int(k.partition(".")[0]) for k in tensors))]
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parts[int(number)][name] = value
    return settings, parts


def extend(networks: Sequence[Any], embedder: str, wrapper: type[ExtraInputs], folder: Path) -> dict[str, Any]:
    """Wraps the time embedders of a pipeline's networks with the branches that are stored in its folder. Returns how
    the inputs are set. Raises ValueError as `read_inputs` does."""
    settings, parts = read_inputs(folder)
    for network, weights in zip(networks, parts, strict=True):
        extended = wrapper(getattr(network, embedder), next(iter(weights.values())).shape[0], {}, settings["names"])
        extended.tables.load_state_dict(weights)
        parameter = next(network.parameters())
        extended.tables.to(parameter.device, parameter.dtype)
        setattr(network, embedder, extended)
    return settings


def told_columns(settings: Mapping[str, Any], scheduler: Any, timestep: float) -> list[float]:
    """What the branches read at a scheduler's timestep, by the level t of this step and the level s where it ends."""
    steps = [float(step) for step in scheduler.timesteps]
    after, below = steps[steps.index(timestep) + 1 :], 1 - settings.get("eta", 0.0)
    if total := settings["discrete"]:  # as VPSchedule counts, and as its `lowered` rounds
        lower = float((below * torch.tensor(after[0])).floor()) if after else 0.0
        t, s = (timestep + 1) / total, (lower + 1) / total if after else 0.0
    else:
        clock = FlowSchedule().num_train_timesteps
        t, s = timestep / clock, below * after[0] / clock if after else 0.0
    values = {"s": 0.0 if settings["to_zero"] else s, "guidance": settings["guidance"], "num_steps": len(steps)}
    return [float(level_column(name, torch.tensor(values[name]), torch.tensor(t))) for name in settings["names"]]


class FlowMap:
    """What these pipelines add to the stock ones. They are made for guidance_scale 1, not for higher values."""

    networks: ClassVar[tuple[str, ...]] = ("transformer",)  # from high noise to low
    embedder: ClassVar[str]  # the networks' time embedder
    wrapper: ClassVar[type[ExtraInputs]] = ExtraInputs  # how it is extended

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Loads a pipeline from a local folder."""
        pipeline = super().from_pretrained(folder, **options)  # type: ignore[misc]
        networks = [network for name in cls.networks if (network := getattr(pipeline, name, None)) is not None]
        settings = extend(networks, cls.embedder, cls.wrapper, Path(folder))
        for network in networks:
            network.register_forward_pre_hook(partial(cls.tell, settings, pipeline), with_kwargs=True)
        return pipeline

    @staticmethod
    def tell(
        settings: Mapping[str, Any], pipeline: Any, network: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Packs the inputs into the timestep, as `fastgen.modules.inputs.ExtraInputs.pack` does."""
        timestep = kwargs["timestep"]
        columns = told_columns(settings, pipeline.scheduler, float(timestep.reshape(-1)[0]))
        extra = torch.tensor(columns, device=timestep.device, dtype=torch.float32).expand(*timestep.shape, -1)
        packed = torch.cat([timestep[..., None].float(), extra], dim=-1)
        return args, kwargs | {"timestep": packed.flatten(1)}


class FlowMapStableDiffusion3Pipeline(FlowMap, StableDiffusion3Pipeline):
    embedder = "time_text_embed"


class FlowMapWanPipeline(FlowMap, WanPipeline):
    networks = ("transformer", "transformer_2")
    embedder = "condition_embedder"
    wrapper = WanExtraInputs


class UNetFlowMap(FlowMap):
    networks = ("unet",)
    embedder = "time_embedding"
    wrapper = UNetExtraInputs

    @staticmethod
    def tell(
        settings: Mapping[str, Any], pipeline: Any, network: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Gives the inputs as `timestep_cond`, which a UNet passes to its time embedder."""
        sample, timestep = args
        columns = told_columns(settings, pipeline.scheduler, float(timestep))
        extra = torch.tensor(columns, device=sample.device, dtype=torch.float32).expand(len(sample), -1)
        return args, kwargs | {"timestep_cond": extra}


class FlowMapStableDiffusionPipeline(UNetFlowMap, StableDiffusionPipeline):
    pass


class FlowMapStableDiffusionXLPipeline(UNetFlowMap, StableDiffusionXLPipeline):
    pass
