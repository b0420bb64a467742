"""What a run prints before it begins: a summary of its recipe, and the table of its networks."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from rich.table import Table

from fastgen.config.stored import registered_name, to_dict
from fastgen.modules.lora import LoraDenoiser
from fastgen.networks import Networks
from fastgen.recipe import Recipe
from fastgen.run.distributed import strategy_of


def summary(recipe: Recipe, folder: Path, accelerator: Accelerator) -> str:
    """A few lines about a recipe. The whole of it is in recipe.yaml, in the run folder."""
    config, rollout, processes = recipe.train, recipe.rollout, accelerator.num_processes
    backbone, objective, data = (registered_name(type(s)) for s in (recipe.backbone, recipe.objective, recipe.data))
    path = to_dict(recipe.backbone).get("path")
    adapters = f"; adapters: {', '.join(recipe.lora)}" if recipe.lora else ""
    rewards = f", with the rewards {', '.join(recipe.rewards.used(grad=False))}" if recipe.rewards else ""
    divided = [f"{n} {what}" for n, what in ((config.accumulate, "micro-batches"), (processes, "processes")) if n > 1]
    product = f" ({' x '.join([str(config.batch_size), *divided])})" if divided else ""
    strategy = f", {strategy_of(recipe, accelerator)}" if processes > 1 else ""
    precision = "bf16 forward passes, " if config.mixed_precision == "bf16" else ""
    lines = {
        "recipe": f"{folder / 'recipe.yaml'} has all values, with defaults",
        "backbone": backbone + (f", {path}" if path else ""),
        "objective": objective + rewards,
        "trained": ", ".join(recipe.objective.trained_roles) + adapters,
        "student": f"{rollout.num_steps} steps at {', '.join(f'{t:.4g}' for t in rollout.timesteps)}",
        "data": data,
        "updates": f"{config.steps:,}, each of {config.batch_size * config.accumulate * processes} samples{product}",
        "devices": f"{processes} x {accelerator.device.type}{strategy}, {precision}{config.dtype} weights",
        "seed": str(recipe.seed),
    }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def time_left(seconds: Sequence[float], updates: int) -> str:
    """How long the rest of a run takes, in words, by the seconds of some of its updates."""
    each = sum(seconds) / len(seconds)
    said = f"{each:.0f}" if each >= 100 else f"{each:.2g}"
    left = f"the {updates:,} updates that are left" if updates > 1 else "the one update that is left"
    on_top = "pictures, evaluations and checkpoints come on top"
    return f"about {duration(each * updates)} for {left}, at {said} s each; {on_top}"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def role_table(recipe: Recipe, networks: Networks) -> Table:
    """One row per network: class, parameters, trainable, bytes, dtype, learning rate."""
    table = Table("role", "network", "parameters", "trainable", "MB", "dtype", "learning rate", title="Networks")
    for role, module in networks.items():
        parameters = list(module.parameters())
        if isinstance(module, LoraDenoiser) and module.role is None:
            parameters = module.shared.base_parameters()
        count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad) if role in recipe.optimizers else 0
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "-"
        rate = f"{recipe.optimizers[role].lr:g}" if role in recipe.optimizers else "frozen"
        inner = vars(module).get("_modules", {}).get("network", module)
        table.add_row(role, type(inner).__name__, f"{count:,}", f"{trained:,}", f"{size / 1e6:.1f}", dtypes, rate)
    return table
