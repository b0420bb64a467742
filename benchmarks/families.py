"""One DMD2 student update at full size with random weights: seconds, peak memory, and the share of bare network time.

    python tools/benchmark_families.py recipes/sdxl_dmd2_4step.yaml train.batch_size=1 --compile --output sdxl.json

Nothing is downloaded: sizes come from the configs that ship with fastgen, or from a local folder. Weights, latents and
prompt embeddings are random; the text encoders and the VAE are not made. The bare time is that of the networks' own
forward calls and of the backward passes; the rest is what the loop adds (noise, losses, clipping, AdamW, the average).
On a GPU times are the device's; on a CPU the script is only tried small."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import torch
from torch import Tensor, nn

from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser
from fastgen.modules.lora import LoraDenoiser
from fastgen.networks import Ema, Networks
from fastgen.objectives import Loss
from fastgen.recipe import Recipe
from fastgen.run.build import DTYPES
from fastgen.train import gradient_norm


class Clock:
    """Seconds spent inside `timed` blocks, the device's where it is a GPU. Nested blocks count once."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._depth = device, 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        self._depth += 1
        outer, started = self._depth == 1, time.perf_counter()
        if outer and self.device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            self._events.append(events)
        yield
        if outer and self.device.type == "cuda":
            events[1].record()
        elif outer:
            self.seconds += time.perf_counter() - started
        self._depth -= 1

    def read(self) -> float:
        """The sum, and back to zero."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.seconds = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        seconds, self.seconds, self._events = self.seconds, 0.0, []
        return seconds


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Memory and small random values for parameters on the meta device; buffers keep theirs."""
    for parent in module.modules():
        for name, p in list(parent.named_parameters(recurse=False)):
            if p.is_meta:
                value = torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02
                setattr(parent, name, nn.Parameter(value, requires_grad=p.requires_grad))
    module.to(device)


def time_forwards(denoiser: Denoiser, clock: Clock, compiled: bool) -> None:
    """Every network call counts; compiled: through torch.compile."""
    call = torch.compile(denoiser.call_network) if compiled else denoiser.call_network

    def timed(x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        with clock.timed():
            return call(x_t, timestep, cond)

    denoiser.call_network = timed  # type: ignore[method-assign]


def build(recipe: Recipe, device: torch.device, clock: Clock, compiled: bool) -> dict[str, Any]:
    """The recipe's networks with random weights, their optimizers, the average, and a random batch."""
    config, backbone_config = recipe.train, recipe.backbone.unloaded()
    backbone = backbone_config.build(device, DTYPES[config.dtype], recipe.seed)
    backbone.adapters, backbone.deferred = recipe.lora, True
    backbone.frozen_dtype = DTYPES[config.frozen_dtype] if config.frozen_dtype else None
    modules = {"student": backbone.load("student"), "teacher": backbone.load("teacher")}
    modules |= recipe.objective.auxiliary(backbone, recipe.rollout)
    average = modules["student"].average()
    bases = [backbone.shared.denoiser] if backbone.shared else []
    for module in (*modules.values(), average, *bases):
        if isinstance(module, LoraDenoiser):
            continue
        fill(module, device)
        if isinstance(module, Denoiser):
            for part in getattr(module, "experts", [module]):
                time_forwards(part, clock, compiled)
    if backbone.shared:
        backbone.shared.refresh()
    for module in modules.values():
        if isinstance(module, LoraDenoiser) and module.role:
            module.reset(recipe.seed)
        if config.gradient_checkpointing and isinstance(module, Denoiser):
            module.enable_checkpointing()
    networks = Networks(modules, recipe.rollout)
    count, shapes = config.batch_size, backbone.prompt_shapes()

    def condition() -> Conditioning:
        return Conditioning({k: torch.randn(count, *s, device=device) for k, s in shapes.items()})

    latents = torch.randn(count, *backbone.latent_shape, device=device)
    batch = Batch(torch.arange(count, device=device), 1, condition(), condition(), backbone.latent_shape,
                  ("",) * count, latents if "latents" in recipe.objective.needs else None)  # fmt: skip
    roles = recipe.objective.trained_roles
    return {
        "networks": networks,
        "optimizers": {role: recipe.optimizers[role].build(networks[role].parameters()) for role in roles},
        "ema": Ema(average, networks.student, config.ema_decay),
        "batch": batch,
    }


def update(recipe: Recipe, parts: dict[str, Any], clock: Clock) -> None:
    """One student update: every turn, as the loop makes it."""
    networks, state = parts["networks"], recipe.objective.init_state()
    for turn in recipe.objective.turns(0, state):
        for _ in range(turn.updates):
            with torch.autocast(clock.device.type, torch.bfloat16, enabled=recipe.train.mixed_precision == "bf16"):
                losses = recipe.objective.loss(turn, networks, parts["batch"], state)
                for loss in [losses] if isinstance(losses, Loss) else losses:
                    with clock.timed():
                        loss.total.backward()
            for role in turn.roles:
                parameters = [p for p in networks[role].parameters() if p.grad is not None]
                norm = gradient_norm(parameters)
                torch.nn.utils.clip_grads_with_norm_(parameters, recipe.optimizers[role].max_grad_norm, norm)
                parts["optimizers"][role].step()
                parts["optimizers"][role].zero_grad()
    parts["ema"].update(networks.student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile around every network call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    device = torch.device(arguments.device)
    clock = Clock(device)
    torch.manual_seed(recipe.seed)
    parts = build(recipe, device, clock, arguments.compile)
    for _ in range(2):  # compilation, autotuning, the optimizer's state
        update(recipe, parts, clock)
    clock.read()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, bare = [], []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        update(recipe, parts, clock)
        bare.append(clock.read())
        seconds.append(time.perf_counter() - started)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "latent_shape": list(parts["batch"].latent_shape),
        "batch_size": recipe.train.batch_size,
        "mixed_precision": recipe.train.mixed_precision,
        "compiled": arguments.compile,
        "seconds": statistics.median(seconds),
        "bare_share": statistics.median(b / s for b, s in zip(bare, seconds, strict=True)),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "commit": git.stdout.strip(),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
