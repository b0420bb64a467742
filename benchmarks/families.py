"""Measures one student update of a model family at full size: seconds, peak of memory, and the share of bare networks.

    python benchmarks/families.py recipes/sdxl_dmd2_4step.yaml train.batch_size=1 --compile --output sdxl.json
    python benchmarks/families.py recipes/digits_dmd2_4step.yaml train.batch_size=2 --repeats 1   # tries the program

Nothing is downloaded: sizes come from the configurations that ship with fastgen, or from a local folder. Weights,
latents and prompt embeddings are random; text encoders and VAE are not made. The bare time is that of the networks'
own forward calls and of the backward passes. The rest is what the loop adds: noise, losses, clipping, AdamW and the
moving average. On a GPU the times are the device's; on a CPU the program is only worth trying with small networks."""

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import torch
from torch import Tensor, nn

from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Ema, Networks
from fastgen.objectives import Loss
from fastgen.recipe import Recipe
from fastgen.run.build import build_backbone, build_networks, start_networks
from fastgen.run.optimizers import adamw
from fastgen.run.update import gradient_norm

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """The seconds spent inside `timed` blocks. On a GPU they are the device's. Nested blocks count once."""

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
        """The sum. The clock starts at zero again."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.seconds = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        seconds, self.seconds, self._events = self.seconds, 0.0, []
        return seconds


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Gives parameters on the meta device memory and small random values. Buffers keep their values."""
    for parent in module.modules():
        for name, p in list(parent.named_parameters(recurse=False)):
            if p.is_meta:
                value = torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02
                setattr(parent, name, nn.Parameter(value, requires_grad=p.requires_grad))
    module.to(device)


def time_forwards(denoiser: Denoiser, clock: Clock, compiled: bool) -> None:
    """Lets the clock count every call of a network. compiled: the calls go through torch.compile."""
    call = torch.compile(denoiser.call_network) if compiled else denoiser.call_network

    def timed(x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        with clock.timed():
            return call(x_t, t, cond, inputs)

    denoiser.call_network = timed  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class Family:
    """What an update needs of a recipe, with random weights and a random batch."""

    recipe: Recipe
    networks: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema
    batch: Batch


def build(recipe: Recipe, device: torch.device, clock: Clock, compiled: bool) -> Family:
    """The recipe's networks as fastgen builds them, but with random weights, and what belongs to them."""
    backbone = build_backbone(recipe, device, deferred=True, section=recipe.backbone.unloaded())
    if not isinstance(backbone, PipelineBackbone):
        raise SystemExit(f"{recipe.backbone.name} has no networks of full size to measure")
    built = build_networks(recipe, backbone)
    for module in built.wholes:
        fill(module, device)
        if isinstance(module, Denoiser):
            for member in module.members:
                time_forwards(member, clock, compiled)
    if backbone.shared:
        backbone.shared.refresh()
    start_networks(recipe, built)
    networks = Networks(built.modules, recipe.rollout)
    return Family(
        recipe=recipe,
        networks=networks,
        optimizers={r: adamw(recipe.optimizers[r], networks[r].parameters()) for r in recipe.objective.trained_roles},
        ema=Ema(built.average, networks.student, recipe.train.ema_decay),
        batch=random_batch(recipe, backbone),
    )


def random_batch(recipe: Recipe, backbone: PipelineBackbone) -> Batch:
    """A batch of the recipe's size. Latents and prompt embeddings are standard normal."""
    count, shapes, device = recipe.train.batch_size, backbone.prompt_shapes(), backbone.device

    def condition() -> Conditioning:
        return Conditioning({k: torch.randn(count, *s, device=device) for k, s in shapes.items()})

    latents = torch.randn(count, *backbone.latent_shape, device=device)
    return Batch(
        ids=torch.arange(count, device=device),
        key=1,
        cond=condition(),
        uncond=condition(),
        latent_shape=backbone.latent_shape,
        prompts=("",) * count,
        latents=latents if "latents" in recipe.objective.needs else None,
    )


def update(family: Family, clock: Clock) -> None:
    """One student update: every turn, as the loop makes it."""
    recipe, networks, state = family.recipe, family.networks, family.recipe.objective.init_state()
    for turn in recipe.objective.turns(0, state):
        for _ in range(turn.updates):
            with recipe.train.autocast(clock.device.type):
                losses = recipe.objective.loss(turn, networks, family.batch, state)
                for loss in [losses] if isinstance(losses, Loss) else losses:
                    with clock.timed():
                        loss.total.backward()
            for role in turn.roles:
                parameters = [p for p in networks[role].parameters() if p.grad is not None]
                norm = gradient_norm(parameters)
                torch.nn.utils.clip_grads_with_norm_(parameters, recipe.optimizers[role].max_grad_norm, norm)
                family.optimizers[role].step()
                family.optimizers[role].zero_grad()
    family.ema.update(networks.student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile around every network call")
    parser.add_argument("--repeats", type=int, default=5, help="updates; the median counts")
    parser.add_argument("--output", type=Path, help="a JSON file for the result, which is also printed")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    device = torch.device(arguments.device)
    clock = Clock(device)
    torch.manual_seed(recipe.seed)
    family = build(recipe, device, clock, arguments.compile)
    for _ in range(2):  # compilation, autotuning and the optimizers' moments happen here
        update(family, clock)
    clock.read()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, bare = [], []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        update(family, clock)
        bare.append(clock.read())
        seconds.append(time.perf_counter() - started)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "latent_shape": list(family.batch.latent_shape),
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
