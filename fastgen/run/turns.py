"""What happens to roles before a turn trains them: a new start from the pretrained weights, and the learning rates."""

import torch
from torch import nn

from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import refill
from fastgen.modules.stored_name import stored_name
from fastgen.noise import make_key
from fastgen.objectives import Turn
from fastgen.run.build import TrainingRun
from fastgen.run.optimizers import adamw


def reset_roles(run: TrainingRun, turn: Turn, step: int) -> None:
    """Re-initialises the roles in `turn.reset` from the pretrained weights, with fresh optimizers. The moving average
    is reset together with the student. New heads and adapters depend only on the seed and the step, so that they are
    the same after a restart."""
    if not turn.reset:
        return
    recipe, key = run.recipe, make_key(run.recipe.seed, step, "reset")
    fresh: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        torch.manual_seed(key)
        if any(not isinstance(run.networks[role], LoraDenoiser) for role in turn.reset):
            fresh = dict(recipe.objective.auxiliary(run.backbone, recipe.rollout))
        if "student" in turn.reset:
            fresh["student"] = recipe.objective.make_student(run.backbone, recipe.rollout)
    weights = run.backbone.weights() if run.strategy == "fsdp" else {}
    for role in turn.reset:
        module = run.networks[role]
        if isinstance(module, LoraDenoiser):
            module.reset(key)
        else:
            refill(module, fresh[role], weights, stored_name)
        if role in run.optimizers:
            run.optimizers[role] = adamw(recipe.optimizers[role], module.parameters())
        if role == "student":
            run.ema.move(module, 0.0)
            run.ema.updates = 0


def set_rates(run: TrainingRun, turn: Turn, step: int) -> None:
    """Sets the learning rates of the turn's roles, by `turn.progress` or else by this step of the run."""
    for role in turn.roles:
        for group in run.optimizers[role].param_groups:
            group["lr"] = run.recipe.optimizers[role].rate(*(turn.progress or (step, run.recipe.train.steps)))
