"""Measures what the training loop costs: a DMD2 update of fastgen beside the same passes written out in plain torch.

    python benchmarks/step.py train.batch_size=16

Both sides make one student update of the digits recipe. The fake score is updated `fake_updates` times, each time with
a rollout without gradient, a denoising loss, a backward pass, clipping and AdamW. Then comes the student: a rollout
with gradient, the forward passes of teacher and fake score, the surrogate loss, a backward pass, clipping, AdamW and
the moving average. The plain side draws its noise by torch.randn and has its conditioning ready.

The two sides take turns in one process. The program prints the median of the repeats of each side and the ratio of the
two medians; the median of the ratios of neighbours, which changes less on a machine that slows down and speeds up; and
the ratio of CPU seconds, which other programs change least."""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator

from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.data import make_batch
from fastgen.noise import make_key
from fastgen.recipe import Recipe
from fastgen.rollout import draw_stops
from fastgen.run.build import adamw, build
from fastgen.train import set_rates, update


def ours(recipe: Recipe) -> Callable[[int], None]:
    """A function that makes one student update as fastgen/train.py does."""
    run = build(recipe, Accelerator(cpu=True))

    def step(index: int) -> None:
        for turn in recipe.objective.turns(index, {}):
            set_rates(run, turn, index)
            for inner in range(turn.updates):
                position = recipe.train.batch_size * (index * 10 + inner)
                update(run, turn, position, make_key(index, turn.name, inner))
        run.ema.update(run.networks.student)

    return step


def stops_of(recipe: Recipe, index: int) -> list[torch.Tensor]:
    """The steps at which `ours` stops its rollouts in this update, so that both sides give the networks equally many
    rows."""
    result = []
    for turn in recipe.objective.turns(index, {}):
        for inner in range(turn.updates):
            ids = torch.arange(recipe.train.batch_size) + recipe.train.batch_size * (index * 10 + inner)
            batch = Batch(ids, make_key(index, turn.name, inner), Conditioning(), Conditioning(), ())
            shared = recipe.objective.stops == "shared"
            result.append(draw_stops(batch, recipe.rollout.num_steps, shared))
    return result


def plain(recipe: Recipe, updates: int) -> Callable[[int], None]:
    """A function that makes one student update with the same networks, written out by hand."""
    same_stops = [stops_of(recipe, index) for index in range(updates)]
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    objective, times = recipe.objective, torch.tensor(recipe.rollout.timesteps)
    size = recipe.train.batch_size
    stream = recipe.data.open(backbone, 0, size // recipe.objective.group_size)
    batch = make_batch(stream, backbone, torch.arange(size), 0, frozenset())
    both = Conditioning.cat([batch.cond, batch.uncond])
    student, teacher = backbone.load("student").network, backbone.load("teacher").network
    fake = recipe.objective.auxiliary(backbone, recipe.rollout)["fake_score"].network
    average = copy.deepcopy(student).requires_grad_(False)
    optimizers = [adamw(recipe.optimizers[r], m.parameters()) for r, m in (("student", student), ("fake_score", fake))]

    def x0(network, x, t, cond, extra=None):  # type: ignore[no-untyped-def]
        timestep = 1000 * t if extra is None else torch.stack([1000 * t, extra.float()], 1)
        out = network(
            hidden_states=x,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled"],
            timestep=timestep,
            joint_attention_kwargs={"context_log_repeats": cond["log_repeats"]},
            return_dict=False,
        )[0]
        return x - t[:, None, None, None] * out

    def noised(x, t):  # type: ignore[no-untyped-def]
        return (1 - t[:, None, None, None]) * x + t[:, None, None, None] * torch.randn_like(x)

    def rollout(stop, grad):  # type: ignore[no-untyped-def]
        x = torch.randn(size, *backbone.latent_shape)
        with torch.no_grad():
            for i in range(len(times) - 1):
                rows = (stop > i).nonzero().squeeze(1)
                if len(rows):
                    clean = x0(student, x[rows], times[i].expand(len(rows)), batch.cond.select(rows))
                    x[rows] = noised(clean, times[i + 1].expand(len(rows)))
        with torch.set_grad_enabled(grad):
            return x0(student, x, times[stop], batch.cond)

    def advance(network, optimizer, loss):  # type: ignore[no-untyped-def]
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 10.0)
        optimizer.step()
        optimizer.zero_grad()

    def step(index: int) -> None:
        stops = iter(same_stops[index])
        for _ in range(objective.fake_updates):
            stop = next(stops)
            x = rollout(stop, False)
            t = objective.fake_time(torch.rand(size))
            x_t = noised(x, t)
            extra = stop if objective.condition_on_stop else None
            error = (x0(fake, x_t, t, batch.cond, extra) - x) / t[:, None, None, None]
            advance(fake, optimizers[1], error.square().mean())
        stop = next(stops)
        x = rollout(stop, True)
        with torch.no_grad():
            t = objective.renoise_time(torch.rand(size))
            x_t = noised(x, t)
            f = x0(fake, x_t, t, batch.cond, stop if objective.condition_on_stop else None)
            if objective.guidance_scale == 1:
                real = x0(teacher, x_t, t, batch.cond)
            else:
                on, off = x0(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
                real = off + objective.guidance_scale * (on - off)
            grad = (f - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        advance(student, optimizers[0], 0.5 * (x - (x - grad).detach()).square().mean())
        torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - recipe.train.ema_decay)

    return step


def median_ratio(values: dict[str, list[float]]) -> float:
    ours, other = (statistics.median(series[2:]) for series in values.values())
    return ours / other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, for the recipe")
    arguments = parser.parse_args()
    recipe = load_recipe("recipes/digits_dmd2_4step.yaml", ["output_dir=unused", *arguments.overrides])
    steps = {"fastgen": ours(recipe), "plain torch": plain(recipe, arguments.repeats + 2)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 2):  # the first two warm up
        for name, step in steps.items():
            torch.manual_seed(repeat)
            began, used = time.perf_counter(), time.process_time()
            step(repeat)
            seconds[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    paired = [a / b for a, b in zip(seconds["fastgen"][2:], seconds["plain torch"][2:], strict=True)]
    result = {
        **medians,
        "ratio of medians": medians["fastgen"] / medians["plain torch"],
        "median of paired ratios": statistics.median(paired),
        "paired ratios": paired,
        "ratio of CPU seconds": median_ratio(processor),
        "batch_size": recipe.train.batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
