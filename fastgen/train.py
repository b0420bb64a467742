"""The training program: `accelerate launch fastgen/train.py recipe.yaml [key=value ...]`, or `fastgen train`.

A recipe becomes objects, the objects meet in one visible loop, and the run folder holds what came of it:
    recipe.yaml (resolved)  log.jsonl  tensorboard/  samples/  checkpoints/  export/
"""

import sys
from pathlib import Path

if not __package__:  # run by path: Python put fastgen/ first on sys.path, where its modules could hide installed ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from fastgen import checkpoint
from fastgen.backbones.base import Backbone
from fastgen.config import Recipe, RecipeError, changed_keys, dump_recipe, load_recipe
from fastgen.data import Stream, make_batch
from fastgen.evaluation import evaluate
from fastgen.networks import Ema, Networks, gradient_norm
from fastgen.noise import make_key
from fastgen.objectives import Loss, Objective, Turn
from fastgen.pipelines.export import export
from fastgen.pipelines.sampler import Sampler, teacher_sampler
from fastgen.report import plot_points, save_grid
from fastgen.run_log import RunLog

Optimizers = dict[str, torch.optim.Optimizer]


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what was seen and what to try."""


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its last step, from its last complete checkpoint if there is one. Returns the run folder."""
    accelerator = Accelerator(mixed_precision=recipe.train.mixed_precision)
    console = Console(quiet=not accelerator.is_main_process)
    torch.manual_seed(recipe.seed)
    folder = open_run(recipe, accelerator)
    console.print(dump_recipe(recipe), markup=False)

    objective: Objective = recipe.objective
    backbone = recipe.backbone.build(accelerator.device, dtype_of(recipe), recipe.seed)
    modules = {"student": backbone.load("student"), "teacher": backbone.load("teacher")}
    modules |= objective.auxiliary(backbone, recipe.rollout)
    networks = Networks(
        {role: m.to(accelerator.device, dtype_of(recipe)) for role, m in modules.items()}, recipe.rollout
    )
    optimizers: Optimizers = {r: recipe.optimizers[r].build(networks[r].parameters()) for r in objective.trained_roles}
    state = send_to_device(objective.init_state(), accelerator.device)
    ema = Ema(networks.student, recipe.train.ema_decay)
    console.print(role_table(recipe, networks))

    stream = recipe.data.open(backbone, recipe.seed)
    saved = {role: networks[role] for role in objective.trained_roles} | {"ema": ema.module}
    step = position = 0
    if checkpoints := checkpoint.complete(folder / "checkpoints"):
        counters = checkpoint.load(checkpoints[-1], saved, optimizers, state, accelerator.device)
        step, position, ema.updates = counters["step"], counters["position"], counters["ema_updates"]
        console.print(f"continuing from {checkpoints[-1].name}")
    elif accelerator.is_main_process:
        show_teacher(recipe, backbone, stream, folder / "samples" / "teacher.png", console)
    log = RunLog(folder, step, enabled=accelerator.is_main_process)
    bar = tqdm(total=recipe.train.steps, initial=step, desc="training", disable=not accelerator.is_main_process)
    while step < recipe.train.steps:
        for turn in objective.turns(step, state):
            reset_roles(turn, recipe, backbone, networks, optimizers)
            set_rates(recipe, optimizers, turn.roles, step)
            for inner in range(turn.updates):
                key = make_key(recipe.seed, step, turn.name, inner)
                before = snapshot(networks, turn) if step == 0 and inner == 0 else None
                terms = update(recipe, accelerator, turn, networks, optimizers, stream, backbone, state, position, key)
                position += recipe.train.batch_size * recipe.train.accumulate * accelerator.num_processes
                log.add(turn.name, terms)
                if before is not None:
                    report_moved(before, networks, turn, console)
        ema.update(networks.student)
        step += 1
        bar.update()

        if step % recipe.train.log_every == 0 or step == recipe.train.steps:
            bar.set_postfix(log.write(step, optimizers))
        sampler = Sampler(backbone, ema.module, recipe.rollout)
        if accelerator.is_main_process and due(step, recipe.train.sample_every, recipe.train.steps):
            show(recipe, sampler, stream, folder / "samples" / f"step_{step:08d}.png")
        if accelerator.is_main_process and due(step, recipe.train.eval_every, recipe.train.steps):
            log.record(step, {f"eval/{k}": v for k, v in quick_metrics(recipe, sampler).items()})
        if accelerator.is_main_process and due(step, recipe.train.checkpoint_every, recipe.train.steps):
            counters = {"position": position, "ema_updates": ema.updates}
            checkpoint.save(
                folder / "checkpoints", step, saved, optimizers, state, counters, recipe.train.keep_checkpoints
            )
        accelerator.wait_for_everyone()
    bar.close()
    log.close()
    if accelerator.is_main_process:
        facts = {"student updates": step} | quick_metrics(recipe, Sampler(backbone, ema.module, recipe.rollout))
        export(ema.module, backbone, recipe, folder / "export", facts)
        console.print(f"exported to {folder / 'export'}", markup=False)
    return folder


def update(
    recipe: Recipe, accelerator: Accelerator, turn: Turn, networks: Networks, optimizers: Optimizers, stream: Stream,
    backbone: Backbone, state: dict[str, Tensor], position: int, key: int,
) -> dict[str, Tensor]:  # fmt: skip
    """One optimizer step of a turn's roles: accumulate, average over processes, clip, step.

    Sample number position + i belongs to micro-batch i // (batch_size * processes), then to the processes in order, so
    the union of samples of an update, and each sample's noise, do not depend on how it was divided."""
    config, objective = recipe.train, recipe.objective
    terms: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    for micro in range(config.accumulate):
        first = position + (micro * accelerator.num_processes + accelerator.process_index) * config.batch_size
        positions = torch.arange(first, first + config.batch_size)
        batch = make_batch(stream, backbone, positions, key, objective.needs, dtype_of(recipe))
        with accelerator.autocast():
            losses = objective.loss(turn, networks, batch, state)
            for loss in [losses] if isinstance(losses, Loss) else losses:
                (loss.total / config.accumulate).backward()
                for name, value in loss.terms.items():
                    terms[name] = terms[name] + value.detach().float() / config.accumulate
    for role in turn.roles:
        parameters = [p for p in networks[role].parameters() if p.grad is not None]
        if accelerator.num_processes > 1:
            for p in parameters:
                p.grad = accelerator.reduce(p.grad, "mean")
        norm = gradient_norm(parameters)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient of {role} is not finite in turn {turn.name}; lower optimizers.{role}.lr, or check that "
                "the teacher's samples in samples/teacher.png look right"
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, recipe.optimizers[role].max_grad_norm, norm)
        optimizers[role].step()
        optimizers[role].zero_grad()
        terms[f"grad_norm_{role}"] = norm
    return terms


def open_run(recipe: Recipe, accelerator: Accelerator) -> Path:
    """The run folder. A new one gets the resolved recipe; an existing one must have been started with the same."""
    folder = recipe.output_dir
    path = folder / "recipe.yaml"
    if path.is_file():
        if changed := changed_keys(load_recipe(path), recipe):
            raise RecipeError(
                f"{folder} was started with other values of {', '.join(changed)}; choose another output_dir, or undo "
                "the change to continue the run"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"output_dir {folder} is not empty and holds no run; choose another")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(recipe))
    return folder


def dtype_of(recipe: Recipe) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[recipe.train.dtype]


def due(step: int, every: int, last: int) -> bool:
    """Whether a scheduled event falls on this step; one that is scheduled at all also falls on the last."""
    return every > 0 and (step % every == 0 or step == last)


def reset_roles(turn: Turn, recipe: Recipe, backbone: Backbone, networks: Networks, optimizers: Optimizers) -> None:
    """Re-initialises the roles a turn asks for, from the pretrained weights, with fresh optimizers."""
    if turn.reset:
        fresh = recipe.objective.auxiliary(backbone, recipe.rollout) | {"student": backbone.load("student")}
        for role in turn.reset:
            networks[role].load_state_dict(fresh[role].state_dict())
            optimizers[role] = recipe.optimizers[role].build(networks[role].parameters())


def set_rates(recipe: Recipe, optimizers: Optimizers, roles: Iterable[str], step: int) -> None:
    for role in roles:
        for group in optimizers[role].param_groups:
            group["lr"] = recipe.optimizers[role].rate(step, recipe.train.steps)


def snapshot(networks: Networks, turn: Turn) -> dict[str, Tensor]:
    return {f"{r}.{name}": p.detach().clone() for r in turn.roles for name, p in networks[r].named_parameters()}


def report_moved(before: dict[str, Tensor], networks: Networks, turn: Turn, console: Console) -> None:
    """Says which parameters the first update moved. A role of which none moved is an error."""
    for role in turn.roles:
        parameters = dict(networks[role].named_parameters())
        still = [name for name, p in parameters.items() if torch.equal(p, before[f"{role}.{name}"])]
        if len(still) == len(parameters):
            raise TrainingError(f"turn {turn.name} moved no parameter of {role}: its loss does not reach it")
        unmoved = f"; unmoved: {', '.join(still[:5])}{' ...' if len(still) > 5 else ''}" if still else ""
        console.print(
            f"{role}: {len(parameters) - len(still)} of {len(parameters)} tensors moved{unmoved}", markup=False
        )


def role_table(recipe: Recipe, networks: Networks) -> Table:
    """One row a network: class, parameters, trainable, bytes, dtype, learning rate."""
    table = Table("role", "network", "parameters", "trainable", "MB", "dtype", "learning rate", title="Networks")
    for role, module in networks.items():
        parameters = list(module.parameters())
        count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad) if role in recipe.optimizers else 0
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "-"
        rate = f"{recipe.optimizers[role].lr:g}" if role in recipe.optimizers else "frozen"
        inner = vars(module).get("_modules", {}).get("network", module)
        table.add_row(role, type(inner).__name__, f"{count:,}", f"{trained:,}", f"{size / 1e6:.1f}", dtypes, rate)
    return table


def show(recipe: Recipe, sampler: Sampler, stream: Stream, path: Path) -> None:
    """A picture of fixed prompts and seeds: the data stream's first prompts, seeds 0, 1, 2, ..."""
    path.parent.mkdir(exist_ok=True)
    points = sampler.backbone.output == "points"
    count = 2000 if points else recipe.train.num_samples
    samples = sampler.sample(stream.prompts(torch.arange(count)), range(count))
    if points:
        plot_points({"samples": samples}, path)
    else:
        save_grid(samples, path, columns=max(1, round(count**0.5)))


def show_teacher(recipe: Recipe, backbone: Backbone, stream: Stream, path: Path, console: Console) -> None:
    """Samples the teacher through our own wrapper, before anything is trained: if this looks wrong, stop here."""
    steps = max(recipe.eval.teacher_steps, default=50)
    show(recipe, teacher_sampler(backbone, steps, recipe.eval.teacher_guidance_scale), stream, path)
    console.print(f"the teacher at {steps} steps: {path}; if this picture is wrong, stop here", markup=False)


def quick_metrics(recipe: Recipe, sampler: Sampler) -> dict[str, float]:
    config = dataclasses.replace(recipe.eval, num_samples=recipe.eval.quick_num_samples)
    return evaluate(sampler, config, progress=False)["metrics"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the run is complete, 2 for a refused recipe, 1 for a failure while running."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: train.py RECIPE.yaml [dotted.key=value ...]", file=sys.stderr)
        return 0 if arguments else 2
    try:
        train(load_recipe(arguments[0], arguments[1:]))
    except RecipeError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
