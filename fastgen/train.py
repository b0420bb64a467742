"""The training program: `accelerate launch fastgen/train.py recipe.yaml [key=value ...]`, or `fastgen train`.

The recipe is built into objects, one loop trains them, and the run folder holds the results:
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
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from fastgen.config import dump_recipe, load_recipe
from fastgen.data import DataError, make_batch
from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import refill
from fastgen.networks import counted
from fastgen.noise import make_key
from fastgen.objectives import Loss, Turn
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.run.build import TrainingError, TrainingRun, build, checkpoint_to_resume, open_run, resume, start_from
from fastgen.run.checkpoint import CheckpointError
from fastgen.run.distributed import average_gradients, start, stored_name
from fastgen.run.export import export, export_run
from fastgen.run.log import RunLog
from fastgen.run.watching import (
    bit_sums,
    quick_metrics,
    report_moved,
    role_table,
    set_anchor,
    show,
    show_teacher,
    teacher_metrics,
    watch,
    weight_marks,
)


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its last step, starting from a complete checkpoint if there is one. Returns the run folder."""
    accelerator = start(recipe)
    main, console = accelerator.is_main_process, Console(quiet=not accelerator.is_main_process)
    folder, config = open_run(recipe, accelerator), recipe.train
    resumed = checkpoint_to_resume(recipe, accelerator)
    console.out(dump_recipe(recipe), highlight=False)
    run = build(recipe, accelerator)
    console.print(role_table(recipe, run.networks))
    for warning in run.backbone.warnings():
        console.print(f"[yellow]warning: {warning}[/yellow]")

    step, position, good = 0, 0, 0
    per_update = config.batch_size * config.accumulate * accelerator.num_processes
    if resumed:
        counters = resume(run, resumed, per_update)
        step, position, good = counters["step"], counters["position"], counters["last_good"]
        console.print(f"continuing from {resumed.name}")
        set_anchor(run)
    else:
        console.print(f"no checkpoint: starting from {recipe.init_from or 'the pretrained weights'}")
        start_from(run)
        show_teacher(run, folder / "samples" / "teacher.png", console)
        set_anchor(run)

    log = RunLog(folder, step, enabled=main)
    bar = tqdm(total=config.steps, initial=step, desc="training", disable=not main)
    marks = weight_marks(run)
    while step < config.steps:
        student_moved = False
        for turn in recipe.objective.turns(step, run.state):
            reset_roles(run, turn, step)
            set_rates(run, turn, step)
            for inner in range(turn.updates):
                before = bit_sums(run.networks, turn) if step == 0 and inner == 0 else None
                terms, stepped = update(run, turn, position, make_key(recipe.seed, step, turn.name, inner))
                recipe.objective.finish(turn, run.networks, run.state)
                position += per_update
                student_moved |= stepped and "student" in turn.roles
                log.add(turn.name, terms)
                if before is not None and stepped:
                    report_moved(run, turn, before, terms, console)
        if student_moved:
            run.ema.update(run.networks.student)
        step += 1
        bar.update()

        if recipe.health.every and step % recipe.health.every == 0:
            watch(run, step, log, marks, console)
            marks = weight_marks(run)
        if step % config.log_every == 0 or step == config.steps:
            bar.set_postfix(log.write(step, run.optimizers))
        if run.samples_here and due(step, config.sample_every, config.steps):
            show(run, run.student, folder / "samples" / f"step_{step:08d}.png")
        if run.samples_here and due(step, config.eval_every, config.steps):
            log.record(step, {f"eval/{k}": v for k, v in quick_metrics(run).items()})
        if due(step, config.checkpoint_every, config.steps):
            good = good if run.watch.alarmed else step
            counters = {
                "step": step,
                "position": position,
                "ema_updates": run.ema.updates,
                "last_good": good,
                "samples_per_update": per_update,
                "watch": dataclasses.asdict(run.watch.memory),
            }
            if main or run.strategy == "fsdp":
                checkpoint.save(
                    folder / "checkpoints",
                    run.saved,
                    run.optimizers,
                    run.state,
                    counters,
                    config.keep_checkpoints,
                    writer=main,
                )
        accelerator.wait_for_everyone()
    bar.close()
    log.close()
    if run.samples_here:
        rows = {f"student, {recipe.rollout.num_steps} steps": quick_metrics(run)} | teacher_metrics(run)
        if main and run.strategy == "fsdp":
            export_run(folder, rows=rows)
        elif main:
            export(run.ema.module, run.backbone, recipe, folder / "export", step, rows)
        console.print(f"exported to {folder / 'export'}", markup=False)
    accelerator.wait_for_everyone()
    return folder


def update(run: TrainingRun, turn: Turn, position: int, key: int) -> tuple[dict[str, Tensor], bool]:
    """One optimizer step for the roles of a turn: accumulate, average over processes, clip, step.

    Returns the mean terms, and whether the step was made. It is skipped if a gradient is not finite.

    Sample number position + i belongs to micro-batch i // (batch_size * processes), which is split over the processes
    in order. So the samples of an update, and the noise of each of them, do not depend on how the update is divided.
    Raises TrainingError if too many updates in a row were skipped."""
    config, objective, accelerator = run.recipe.train, run.recipe.objective, run.accelerator
    terms: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    for micro in range(config.accumulate):
        first = position + (micro * accelerator.num_processes + accelerator.process_index) * config.batch_size
        positions = torch.arange(first, first + config.batch_size)
        batch = make_batch(run.stream, run.backbone, positions, key, objective.needs, objective.group_size)
        with config.autocast(accelerator.device.type), counted(run.networks) as rows:
            losses = objective.loss(turn, run.networks, batch, run.state)
            for loss in [losses] if isinstance(losses, Loss) else losses:
                (loss.total / config.accumulate).backward()
                for name, value in loss.terms.items():
                    terms[name] = terms[name] + value.detach().float() / config.accumulate
        terms["evaluations"] = terms["evaluations"] + sum(rows) / len(positions) / config.accumulate
    trained = {role: [p for g in run.optimizers[role].param_groups for p in g["params"]] for role in turn.roles}
    if accelerator.num_processes > 1:
        for parameters in trained.values():
            average_gradients(parameters, accelerator)
        terms = {name: accelerator.reduce(value, "mean") for name, value in terms.items()}
    norms = {role: gradient_norm(parameters) for role, parameters in trained.items()}
    finite = all(bool(norm.isfinite()) for norm in norms.values())
    for role, parameters in trained.items():
        if finite:
            with_grad = [p for p in parameters if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(with_grad, run.recipe.optimizers[role].max_grad_norm, norms[role])
            run.optimizers[role].step()
            terms[f"grad_norm_{role}"] = norms[role]
        run.optimizers[role].zero_grad()
    if not finite:
        bad = ", ".join(role for role, norm in norms.items() if not norm.isfinite())
        if run.watch.skip() > run.recipe.health.max_skipped:
            raise TrainingError(
                f"the gradient of {bad} was not finite in {run.recipe.health.max_skipped + 1} updates in a row; "
                f"lower optimizers.{turn.roles[0]}.lr, continue from an earlier checkpoint (train.resume_from), and "
                "check that the teacher's samples in samples/teacher.png look right"
            )
        return {"skipped": torch.ones((), device=accelerator.device), "evaluations": terms["evaluations"]}, False
    run.watch.skipped_in_a_row = 0
    return terms | {"skipped": torch.zeros((), device=accelerator.device)}, True


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients of a role, over all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def due(step: int, every: int, last: int) -> bool:
    """Whether an event that happens every `every` steps, and at the last step, falls on this one. 0: never."""
    return every > 0 and (step % every == 0 or step == last)


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
            run.optimizers[role] = recipe.optimizers[role].build(module.parameters())
        if role == "student":
            run.ema.move(module, 0.0)
            run.ema.updates = 0


def set_rates(run: TrainingRun, turn: Turn, step: int) -> None:
    """Sets the learning rates of the turn's roles, by `turn.progress` or else by this step of the run."""
    for role in turn.roles:
        for group in run.optimizers[role].param_groups:
            group["lr"] = run.recipe.optimizers[role].rate(*(turn.progress or (step, run.recipe.train.steps)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if the run is complete, 2 if the recipe is refused, 1 if the run fails."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: train.py RECIPE.yaml [dotted.key=value ...]", file=sys.stderr)
        return 0 if arguments else 2
    try:
        train(load_recipe(arguments[0], arguments[1:]))
    except RecipeError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except (TrainingError, CheckpointError, DataError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
