"""The training program: `accelerate launch fastgen/train.py recipe.yaml [key=value ...]`, or `fastgen train`.

A recipe becomes objects, the objects meet in one visible loop, and the run folder holds what came of it:
    recipe.yaml (resolved)  log.jsonl  tensorboard/  samples/  checkpoints/  export/
"""

import sys
from pathlib import Path

if not __package__:  # run by path: Python put fastgen/ first on sys.path, where its modules could hide installed ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import checkpoint
from fastgen.backbones.base import Backbone
from fastgen.config import Recipe, RecipeError, changed_keys, dump_recipe, load_recipe
from fastgen.data import Stream, make_batch
from fastgen.evaluation import evaluate
from fastgen.networks import Ema, Networks
from fastgen.noise import make_key
from fastgen.objectives import Loss, Turn
from fastgen.pipelines.export import export
from fastgen.pipelines.sampler import Sampler, teacher_sampler
from fastgen.report import plot_points, save_grid
from fastgen.run_log import RunLog


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what was seen and what to try."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a recipe became. The loop's functions take it whole; only the modules and tensors in it change."""

    recipe: Recipe
    accelerator: Accelerator
    backbone: Backbone
    networks: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    state: dict[str, Tensor]
    ema: Ema
    stream: Stream

    @property
    def saved(self) -> dict[str, nn.Module]:
        """What a checkpoint holds: every role but the frozen teacher, and the average."""
        return {role: self.networks[role] for role in self.networks if role != "teacher"} | {"ema": self.ema.module}

    @property
    def student(self) -> Sampler:
        """The average of the student, sampling as it will be exported."""
        return Sampler(self.backbone, self.ema.module, self.recipe.rollout)


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its last step, from its last complete checkpoint if there is one. Returns the run folder."""
    accelerator = start(recipe)
    console = Console(quiet=not accelerator.is_main_process)
    folder, config = open_run(recipe, accelerator), recipe.train
    console.out(dump_recipe(recipe), highlight=False)
    parts = build(recipe, accelerator)
    console.print(role_table(recipe, parts.networks))

    step = position = 0
    if checkpoints := checkpoint.complete(folder / "checkpoints"):
        counters = checkpoint.load(checkpoints[-1], parts.saved, parts.optimizers, parts.state, accelerator.device)
        step, position, parts.ema.updates = counters["step"], counters["position"], counters["ema_updates"]
        console.print(f"continuing from {checkpoints[-1].name}")
    elif accelerator.is_main_process:
        console.print("no checkpoint: starting from the pretrained weights")
        show_teacher(parts, folder / "samples" / "teacher.png", console)

    log = RunLog(folder, step, enabled=accelerator.is_main_process)
    bar = tqdm(total=config.steps, initial=step, desc="training", disable=not accelerator.is_main_process)
    while step < config.steps:
        for turn in recipe.objective.turns(step, parts.state):
            reset_roles(parts, turn, step)
            set_rates(parts, turn.roles, step)
            for inner in range(turn.updates):
                before = snapshot(parts.networks, turn) if step == 0 and inner == 0 else None
                terms = update(parts, turn, position, make_key(recipe.seed, step, turn.name, inner))
                recipe.objective.finish(turn, parts.networks, parts.state)
                position += config.batch_size * config.accumulate * accelerator.num_processes
                log.add(turn.name, terms)
                if before is not None:
                    report_moved(parts, turn, before, terms, console)
        parts.ema.update(parts.networks.student)
        step += 1
        bar.update()

        if step % config.log_every == 0 or step == config.steps:
            bar.set_postfix(log.write(step, parts.optimizers))
        if accelerator.is_main_process and due(step, config.sample_every, config.steps):
            show(parts, parts.student, folder / "samples" / f"step_{step:08d}.png")
        if accelerator.is_main_process and due(step, config.eval_every, config.steps):
            log.record(step, {f"eval/{k}": v for k, v in quick_metrics(parts).items()})
        if accelerator.is_main_process and due(step, config.checkpoint_every, config.steps):
            counters = {"step": step, "position": position, "ema_updates": parts.ema.updates}
            checkpoint.save(folder / "checkpoints", parts.saved, parts.optimizers, parts.state, counters,
                            config.keep_checkpoints)  # fmt: skip
        accelerator.wait_for_everyone()
    bar.close()
    log.close()
    if accelerator.is_main_process:
        rows = {f"student, {recipe.rollout.num_steps} steps": quick_metrics(parts)} | teacher_metrics(parts)
        export(parts.ema.module, parts.backbone, recipe, folder / "export", step, rows)
        console.print(f"exported to {folder / 'export'}", markup=False)
    return folder


def start(recipe: Recipe) -> Accelerator:
    """The processes this program was launched with, all of them. On a machine without a GPU, accelerate would take a
    torchrun of two processes for two runs of one, unless it is told that the CPU is meant. Mixed precision is the
    recipe's business, in `update`, not the launcher's."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise TrainingError(f"{asked} processes were asked for and accelerate started {accelerator.num_processes}")
    return accelerator


def build(recipe: Recipe, accelerator: Accelerator) -> Parts:
    """Networks, optimizers, state and data of a recipe; random initialisations come from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    dtype = {"float32": torch.float32, "float64": torch.float64}[recipe.train.dtype]
    backbone = recipe.backbone.build(accelerator.device, dtype, recipe.seed)
    modules = {"student": backbone.load("student"), "teacher": backbone.load("teacher")}
    modules |= recipe.objective.auxiliary(backbone, recipe.rollout)
    modules = {role: module.to(accelerator.device, dtype) for role, module in modules.items()}
    networks = Networks(modules, recipe.rollout)
    roles = recipe.objective.trained_roles
    return Parts(
        recipe=recipe,
        accelerator=accelerator,
        backbone=backbone,
        networks=networks,
        optimizers={role: recipe.optimizers[role].build(networks[role].parameters()) for role in roles},
        state=send_to_device(recipe.objective.init_state(), accelerator.device),
        ema=Ema(networks.student, recipe.train.ema_decay),
        stream=recipe.data.open(backbone, recipe.seed),
    )


def update(parts: Parts, turn: Turn, position: int, key: int) -> dict[str, Tensor]:
    """One optimizer step of a turn's roles: accumulate, average over processes, clip, step. Returns the mean terms.

    Sample number position + i belongs to micro-batch i // (batch_size * processes), then to the processes in order, so
    the union of samples of an update, and each sample's noise, do not depend on how it was divided."""
    config, objective, accelerator = parts.recipe.train, parts.recipe.objective, parts.accelerator
    terms: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    for micro in range(config.accumulate):
        first = position + (micro * accelerator.num_processes + accelerator.process_index) * config.batch_size
        positions = torch.arange(first, first + config.batch_size)
        batch = make_batch(parts.stream, parts.backbone, positions, key, objective.needs)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            losses = objective.loss(turn, parts.networks, batch, parts.state)
            for loss in [losses] if isinstance(losses, Loss) else losses:
                (loss.total / config.accumulate).backward()
                for name, value in loss.terms.items():
                    terms[name] = terms[name] + value.detach().float() / config.accumulate
    if accelerator.num_processes > 1:
        average_gradients(parts, turn)
        terms = {name: accelerator.reduce(value, "mean") for name, value in terms.items()}
    for role in turn.roles:
        parameters = [p for p in parts.optimizers[role].param_groups[0]["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient of {role} is not finite in turn {turn.name}; lower optimizers.{role}.lr, or check that "
                "the teacher's samples in samples/teacher.png look right"
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, parts.recipe.optimizers[role].max_grad_norm, norm)
        parts.optimizers[role].step()
        parts.optimizers[role].zero_grad()
        terms[f"grad_norm_{role}"] = norm
    return terms


def average_gradients(parts: Parts, turn: Turn) -> None:
    """The mean over processes. Gradients are reduced by hand, not by a DDP wrapper: one module is called several times
    in an update, by several players, and keeps its own attributes."""
    for role in turn.roles:
        for p in parts.networks[role].parameters():
            if p.grad is not None:
                p.grad = parts.accelerator.reduce(p.grad, "mean")


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
        if (folder / "export").exists() and not checkpoint.complete(folder / "checkpoints"):
            raise RecipeError(
                f"{folder} is a finished run without checkpoints to continue from; choose another output_dir"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"output_dir {folder} is not empty and holds no run; choose another")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(recipe))
    return folder


def due(step: int, every: int, last: int) -> bool:
    """Whether a scheduled event falls on this step; one that is scheduled at all also falls on the last."""
    return every > 0 and (step % every == 0 or step == last)


def reset_roles(parts: Parts, turn: Turn, step: int) -> None:
    """Re-initialises the roles a turn asks for from the pretrained weights, with fresh optimizers; a student's average
    starts anew with it. Fresh heads depend on the seed and the step alone, also after a restart."""
    if not turn.reset:
        return
    recipe = parts.recipe
    with torch.random.fork_rng():
        torch.manual_seed(make_key(recipe.seed, step, "reset"))
        fresh = recipe.objective.auxiliary(parts.backbone, recipe.rollout) | {
            "student": parts.backbone.load("student")
        }
    for role in turn.reset:
        parts.networks[role].load_state_dict(fresh[role].state_dict())
        if role in parts.optimizers:
            parts.optimizers[role] = recipe.optimizers[role].build(parts.networks[role].parameters())
        if role == "student":
            parts.ema.module.load_state_dict(fresh[role].state_dict())
            parts.ema.updates = 0


def set_rates(parts: Parts, roles: Iterable[str], step: int) -> None:
    for role in roles:
        for group in parts.optimizers[role].param_groups:
            group["lr"] = parts.recipe.optimizers[role].rate(step, parts.recipe.train.steps)


def snapshot(networks: Networks, turn: Turn) -> dict[str, Tensor]:
    return {f"{r}.{name}": p.detach().clone() for r in turn.roles for name, p in networks[r].named_parameters()}


def report_moved(
    parts: Parts, turn: Turn, before: dict[str, Tensor], terms: dict[str, Tensor], console: Console
) -> None:
    """Says which parameters the first update moved. An error: a role without gradient (weight decay alone may still
    have moved it), or gradient left on a role of another turn, which would enter that role's next step."""
    for role in turn.roles:
        parameters = dict(parts.networks[role].named_parameters())
        still = [name for name, p in parameters.items() if torch.equal(p, before[f"{role}.{name}"])]
        if terms[f"grad_norm_{role}"] == 0 or len(still) == len(parameters):
            raise TrainingError(f"turn {turn.name} moved no parameter of {role}: its loss does not reach it")
        unmoved = f"; unmoved: {', '.join(still[:5])}{' ...' if len(still) > 5 else ''}" if still else ""
        moved = len(parameters) - len(still)
        console.print(f"{role}: {moved} of {len(parameters)} tensors moved{unmoved}", markup=False)
    for role in parts.networks:
        if role not in turn.roles and any(p.grad is not None for p in parts.networks[role].parameters()):
            raise TrainingError(
                f"turn {turn.name} left a gradient on {role}, which it does not update; wrap the call in "
                "fastgen.networks.frozen or torch.no_grad"
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


def show(parts: Parts, sampler: Sampler, path: Path) -> None:
    """A picture of fixed prompts and seeds: the data stream's first prompts, seeds 0, 1, 2, ..."""
    path.parent.mkdir(exist_ok=True)
    points = sampler.backbone.output == "points"
    count = 2000 if points else parts.recipe.train.num_samples
    positions = torch.arange(count)
    samples = sampler.sample(parts.stream.prompts(positions), range(count))
    if points:
        exact = parts.stream.latents(positions)
        plot_points({"samples": samples} | ({} if exact is None else {"exact": exact}), path)
    else:
        save_grid(samples, path, columns=max(1, round(count**0.5)))


def show_teacher(parts: Parts, path: Path, console: Console) -> None:
    """Samples the teacher through our own wrapper, before anything is trained: if this looks wrong, stop here."""
    config = parts.recipe.eval
    steps = max(config.teacher_steps, default=50)
    show(parts, teacher_sampler(parts.backbone, steps, config.teacher_guidance_scale), path)
    console.print(f"the teacher at {steps} steps: {path}; if this picture is wrong, stop here", markup=False)


def quick_metrics(parts: Parts) -> dict[str, float]:
    return evaluate(parts.student, parts.recipe.eval.quick(), progress=False)["metrics"]


def teacher_metrics(parts: Parts) -> dict[str, dict[str, float]]:
    """The teacher at `eval.teacher_steps`, measured as the student is: what the card compares with."""
    config = parts.recipe.eval
    samplers = {k: teacher_sampler(parts.backbone, k, config.teacher_guidance_scale) for k in config.teacher_steps}
    return {f"teacher, {k} steps": evaluate(s, config.quick(), progress=False)["metrics"] for k, s in samplers.items()}


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
