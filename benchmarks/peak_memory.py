"""Measures the peak of memory in one update of every turn of a recipe, beside the peak that `fastgen plan` expects.

    python benchmarks/peak_memory.py recipes/digits_dmd2_4step.yaml train.gradient_checkpointing=true
    python benchmarks/peak_memory.py recipe.yaml --lora            # a LoRA run, beside the least memory it needs
    python benchmarks/peak_memory.py recipe.yaml --device cuda     # has not been tried yet

The recipe's real weights are loaded. On a CPU, live bytes are counted by storage, as the plan counts them
(fastgen/planning/weightless.py); neither sees what kernels use inside. On a GPU the CUDA allocator counts.

`--lora` takes the peak of a whole student update over all turns, and compares it with what the run cannot do without:
the base's weights, the adapters' gradients and moments, and the activations of one student pass, forward and
backward."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from torch import nn

from fastgen.config import load_recipe
from fastgen.data import make_batch
from fastgen.noise import make_key
from fastgen.planning.plan import Plan, first_turns, plan
from fastgen.planning.weightless import LiveBytes, size, tensors
from fastgen.recipe import Recipe
from fastgen.rollout import predict_x0
from fastgen.run.build import TrainingRun, build
from fastgen.train import update


def networks_bytes(run: TrainingRun) -> int:
    """The bytes of all roles, of the average and of the base that adapters share. Every storage counts once."""
    modules: list[nn.Module] = [*run.networks.values(), run.ema.module]
    if run.backbone.shared is not None:
        modules.append(run.backbone.shared.denoiser)
    return size(list({t.untyped_storage()._cdata: t for m in modules for t in tensors(m)}.values()))


def moments_bytes(run: TrainingRun) -> int:
    """The bytes of the moments that all optimizers hold now."""
    states = (s for o in run.optimizers.values() for s in o.state.values())
    return size([t for s in states for t in s.values() if isinstance(t, torch.Tensor) and t.dim()])


def make_moments(run: TrainingRun) -> None:
    """Lets every optimizer make one step with gradients of zero, for AdamW makes its moments in its first step."""
    for optimizer in run.optimizers.values():
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()


def per_update(recipe: Recipe) -> int:
    return recipe.train.batch_size * recipe.train.accumulate


def measure(recipe: Recipe, draws: int = 1) -> tuple[dict[str, int], TrainingRun]:
    """The peak bytes of an update of every turn: networks, moments (all of them are there) and what lives beside them.

    draws: how many updates are tried; the largest peak counts, as the step at which a rollout stops decides what is
    alive. Text encoders and VAE are not counted, and `planned` leaves them out, too."""
    run = build(recipe, Accelerator(cpu=True))
    make_moments(run)
    run.backbone.encode_prompts([*run.stream.prompts(torch.arange(per_update(recipe))), ""])
    held = networks_bytes(run) + moments_bytes(run)
    peaks = dict[str, int]()
    for turn in first_turns(recipe):
        for draw in range(draws):
            with LiveBytes() as live:
                update(run, turn, 0, make_key(draw, turn.name))
            peaks[turn.name] = max(peaks.get(turn.name, 0), held + live.peak())
    return peaks, run


def measure_cuda(recipe: Recipe) -> dict[str, int]:
    """The same by the CUDA allocator. Text encoders are loaded and count. This has not been tried yet."""
    run = build(recipe, Accelerator())
    make_moments(run)
    run.backbone.encode_prompts([*run.stream.prompts(torch.arange(per_update(recipe))), ""])
    peaks = {}
    for turn in first_turns(recipe):
        torch.cuda.reset_peak_memory_stats()
        update(run, turn, 0, make_key(1, turn.name))
        peaks[turn.name] = torch.cuda.max_memory_allocated()
    return peaks


def planned(found: Plan, encoders: bool = False) -> dict[str, int]:
    """The peak that a plan expects in an update of every turn, with the step of its optimizers."""
    other = 0 if encoders else sum(c.held for c in found.components)
    moments = found.moments
    return {
        p.turn.name: max(moments[f"turn {p.turn.name}"], moments[f"step of {p.turn.name}"]) - other
        for p in found.turns
    }


def lora_ratio(recipe: Recipe) -> dict[str, float]:
    """The peak of a student update of a LoRA recipe over all turns, and the least it could take."""
    peaks, run = measure(recipe)
    adapters = [m for role, m in run.networks.items() if role in recipe.lora]
    positions, objective = torch.arange(recipe.train.batch_size), recipe.objective
    batch = make_batch(run.stream, run.backbone, positions, 0, objective.needs, objective.group_size)
    noise = batch.normal("initial")
    t = torch.full((len(noise),), recipe.rollout.timesteps[0])
    with LiveBytes() as live:
        hooks = live.own_gradients([p for m in adapters for p in m.parameters()])
        with recipe.train.autocast("cpu"):
            predict_x0(run.networks.student, noise, t, batch.cond, recipe.rollout).square().mean().backward()
    for remove in hooks:
        remove()
    run.optimizers["student"].zero_grad()
    assert run.backbone.shared is not None
    base = run.backbone.shared.denoiser
    result = {
        "base weights": size([t for n, t in (*base.named_parameters(), *base.named_buffers()) if ".lora_" not in n]),
        "adapters' gradients": sum(size(list(m.parameters())) for m in adapters),
        "adapters' moments": moments_bytes(run),
        "activations of one student pass": max(bytes_ for bytes_, _ in live.history),
    }
    least, peak = sum(result.values()), max(peaks.values())
    return result | {"least": least, "peak of an update": peak, "ratio": peak / least}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lora", action="store_true", help="compare a LoRA run with the least it needs")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, f"train.device={arguments.device}"])
    if arguments.lora:
        for name, value in lora_ratio(recipe).items():
            print(f"{name:32} {value:,.3f}" if name == "ratio" else f"{name:32} {value / 1e6:12,.1f} MB")
        return
    on_gpu = arguments.device == "cuda"
    peaks = measure_cuda(recipe) if on_gpu else measure(recipe)[0]
    for turn, expected in planned(plan(recipe, gpu=on_gpu), encoders=on_gpu).items():
        ratio = expected / peaks[turn]
        print(f"{turn:16} planned {expected / 1e6:10.1f} MB  measured {peaks[turn] / 1e6:10.1f} MB  {ratio:.3f}")


if __name__ == "__main__":
    main()
