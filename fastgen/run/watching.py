"""What the loop shows and checks: pictures, which tensors moved, quick metrics, the health watch."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from fastgen.data.files import replace_file
from fastgen.evaluation.evaluate import evaluate
from fastgen.evaluation.numbers import row_name
from fastgen.evaluation.results import Row
from fastgen.modules.sharding import local
from fastgen.networks import Networks
from fastgen.objectives import Turn
from fastgen.rewards import Score
from fastgen.run.build import TrainingError, TrainingRun
from fastgen.run.hacking import spreads
from fastgen.run.health import statistics
from fastgen.run.log import RunLog
from fastgen.sampling.pictures import plot_points, save_grid
from fastgen.sampling.sampler import Sampler
from fastgen.sampling.video import save_video, side_by_side


def bit_sums(networks: Networks, turn: Turn) -> dict[str, int]:
    """For every parameter of a turn's roles, a weighted sum over its bits, which changes when its elements do."""
    named = {f"{r}.{n}": local(p).detach() for r in turn.roles for n, p in networks[r].named_parameters()}
    return {name: bit_sum(p.reshape(-1).view(torch.int32)) for name, p in named.items()}


def bit_sum(bits: Tensor, chunk: int = 1 << 20) -> int:
    """sum_i (2 i + 1) bits_i, one chunk at a time. The weights differ, so that opposite changes do not cancel."""
    total = 0
    for number, part in enumerate(bits.split(chunk)):
        weights = 2 * (number * chunk + torch.arange(len(part), device=bits.device)) + 1
        total += int((part.long() * weights).sum())
    return total


def report_moved(
    run: TrainingRun, turn: Turn, before: dict[str, int], terms: dict[str, Tensor], console: Console
) -> None:
    """Prints which parameters the first update moved. Raises TrainingError for a role without gradient (weight decay
    alone may still have moved it), and for gradient that was left on a role of another turn, because it would enter
    that role's next step."""
    after = bit_sums(run.networks, turn)
    for role in turn.roles:
        parameters = dict(run.networks[role].named_parameters())
        same = [after[f"{role}.{name}"] == before[f"{role}.{name}"] for name in parameters]
        flags = torch.tensor(same, dtype=torch.int32, device=run.accelerator.device)
        if run.strategy == "fsdp":  # a tensor moved if its shard moved on any process
            dist.all_reduce(flags, dist.ReduceOp.MIN)
        still = [name for name, flag in zip(parameters, flags.tolist(), strict=True) if flag]
        if terms[f"grad_norm_{role}"] == 0 or len(still) == len(parameters):
            raise TrainingError(f"turn {turn.name} moved no parameter of {role}: its loss does not reach it")
        unmoved = f"; unmoved: {', '.join(still[:5])}{' ...' if len(still) > 5 else ''}" if still else ""
        moved = len(parameters) - len(still)
        say(f"{role}: {moved} of {len(parameters)} tensors moved{unmoved}", console)
    for role in run.networks:
        if role not in turn.roles and any(p.grad is not None for p in run.networks[role].parameters()):
            raise TrainingError(
                f"turn {turn.name} left a gradient on {role}, which it does not update; wrap the call in "
                "fastgen.networks.frozen or torch.no_grad"
            )


def say(text: str, console: Console) -> None:
    """Prints a line while there is a progress bar, and not behind it."""
    with tqdm.external_write_mode():
        console.print(text, markup=False)


def weight_marks(run: TrainingRun) -> dict[str, Tensor]:
    """A few values of every tensor of every trained role, to measure later how far they moved."""
    return {
        role: torch.cat([local(p).detach().reshape(-1)[:16].float() for p in run.networks[role].parameters()])
        for role in run.recipe.objective.trained_roles
    }


def watch(run: TrainingRun, step: int, log: RunLog, marks: Mapping[str, Tensor], console: Console) -> None:
    """Checks the student's samples and the logged terms. Logs the statistics, and prints and logs the warnings.

    Raises TrainingError at a warning if health.stop is set."""
    config, terms = run.recipe.health, log.means()
    now = weight_marks(run)
    moved = {
        role: ((now[role] - old).square().mean() / old.square().mean().clamp_min(1e-6)).sqrt().item()
        for role, old in marks.items()
        if any(name.endswith(f"/grad_norm_{role}") for name in terms)  # without roles that have had no turn yet
    }
    latents = student_latents(run, config.num_samples)
    seen, warnings = run.watch.look(step, latents, terms, moved)
    if run.recipe.rewards:
        row, reward_warnings = run.watch.look_at_rewards(step, latents, scores_of(run, latents), run.recipe.rewards)
        seen, warnings = seen | row, warnings + reward_warnings
    log.record(step, {f"health/{name}": value for name, value in seen.items()})
    for warning in warnings:
        log.warn(step, warning)
        if run.accelerator.is_main_process:
            tqdm.write(f"warning at step {step}: {warning}", file=sys.stderr)
    stop = torch.tensor(float(bool(warnings and config.stop)), device=run.accelerator.device)
    if run.accelerator.reduce(stop, "sum") > 0:
        raise TrainingError(f"health.stop: {warnings[0] if warnings else 'another process saw a warning'}")


def set_reference(run: TrainingRun) -> None:
    """Measures what the watch compares the student's samples with, by all processes alike, unless the run's checkpoint
    has it: a continued run may be watched for the first time."""
    health, memory = run.recipe.health, run.watch.memory
    if health.every and not memory.reference:
        sampler = run.teacher(max(run.recipe.eval.teacher_steps, default=50))
        memory.reference = statistics(fixed_latents(run, sampler, health.num_samples))


def set_anchor(run: TrainingRun) -> None:
    """Sets what the watch compares rewards with: the teacher's samples and, before the first update, the spread of
    their rewards and a first look at the student. Every process computes the same."""
    recipe, watch = run.recipe, run.watch
    if not recipe.rewards or not recipe.health.every:
        return
    count = recipe.health.num_samples
    watch.anchor = fixed_latents(run, run.teacher(max(recipe.eval.teacher_steps, default=50)), count)
    if not watch.memory.rewards:
        watch.memory.reward_spread = spreads(scores_of(run, watch.anchor))
        latents = student_latents(run, count)
        watch.look_at_rewards(0, latents, scores_of(run, latents), recipe.rewards)


def scores_of(run: TrainingRun, latents: Tensor) -> dict[str, Score]:
    """Scores samples of the fixed prompts by every reward, optimised and held out, one batch at a time."""
    assert run.networks.scorer is not None
    size, chunks = run.recipe.train.batch_size, list[dict[str, Score]]()
    for i in range(0, len(latents), size):
        rows = latents[i : i + size]
        chunks.append(run.networks.scorer.each(rows, run.prompts[i : i + len(rows)]))
    return {
        name: Score(torch.cat([c[name].value for c in chunks]), torch.cat([c[name].valid for c in chunks]))
        for name in chunks[0]
    }


def student_latents(run: TrainingRun, count: int) -> Tensor:
    """Samples of the student with its current weights, for fixed prompts and seeds."""
    sampler = Sampler(run.backbone, run.networks.student, run.recipe.rollout)
    return fixed_latents(run, sampler, count)


def fixed_latents(run: TrainingRun, sampler: Sampler, count: int) -> Tensor:
    """Latents [count, ...] of fixed prompts, with seeds 0, 1, 2, ..., one batch at a time."""
    size = run.recipe.train.batch_size
    chunks = [range(i, min(i + size, count)) for i in range(0, count, size)]
    return torch.cat(
        [sampler.latents([run.prompts[i] for i in chunk], chunk, images=run.first_images(chunk)) for chunk in chunks]
    )


def show(run: TrainingRun, sampler: Sampler, path: Path) -> None:
    """Saves a picture, or a picture and a video, of the data stream's first prompts with seeds 0, 1, 2, ..."""
    points = sampler.backbone.output == "points"
    count = len(run.prompts) if points else run.recipe.train.num_samples
    samples = sampler.sample(run.prompts[:count], range(count), run.first_images(range(count)))
    if not run.accelerator.is_main_process:
        return
    path.parent.mkdir(exist_ok=True)
    if points:
        exact = run.stream.latents(torch.arange(count))
        plot_points({"samples": samples} | ({} if exact is None else {"exact": exact.flatten(1)}), path)
    else:
        save_grid(samples, path, columns=max(1, round(count**0.5)), captions=run.prompts[:count])
    if sampler.backbone.fps:
        save_video(side_by_side(samples), path.with_suffix(".mp4"), sampler.backbone.fps)


def shown_prompts(run: TrainingRun) -> list[str]:
    """The prompts of all the run's pictures, in their order; none for a picture of points."""
    return [] if run.backbone.output == "points" else run.prompts[: run.recipe.train.num_samples]


def show_teacher(run: TrainingRun, path: Path, console: Console) -> None:
    """Samples the teacher through our own wrapper before anything is trained, and saves a picture, and in prompts.txt
    the prompts of all the run's pictures. If this one looks wrong, the run should be stopped here."""
    sampler = run.teacher(max(run.recipe.eval.teacher_steps, default=50))
    if run.samples_here:
        show(run, sampler, path)
        if run.accelerator.is_main_process and (prompts := shown_prompts(run)):
            replace_file(path.with_name("prompts.txt"), "".join(f"{prompt}\n" for prompt in prompts))
    steps = sampler.policy.num_steps
    console.print(f"the teacher at {steps} steps: {path}; if this picture is wrong, stop here", markup=False)


def quick_metrics(run: TrainingRun) -> dict[str, float]:
    """The numbers of the student's moving average, of the quick evaluation."""
    numbers: dict[str, float] = student_row(run, progress=False)["metrics"]
    return numbers


def student_row(run: TrainingRun, progress: bool) -> Row:
    name = row_name("student", run.recipe.rollout.num_steps)
    with run.ema.on(run.accelerator.device):
        return {"name": name, **measured(run, run.student, progress)}


def teacher_rows(run: TrainingRun, progress: bool) -> list[Row]:
    """The teacher at each of `eval.teacher_steps`, measured as the student is."""
    steps = run.recipe.eval.teacher_steps
    return [{"name": row_name("teacher", k), **measured(run, run.teacher(k), progress)} for k in steps]


def measured(run: TrainingRun, sampler: Sampler, progress: bool) -> Row:
    return evaluate(sampler, run.recipe.eval.quick(), progress, reference=run.teacher_reference)
