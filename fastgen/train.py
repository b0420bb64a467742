"""The training program: `accelerate launch fastgen/train.py recipe.yaml [key=value ...]`, or `fastgen train`.

A recipe becomes objects, the objects meet in one visible loop, and the run folder holds what came of it:
    recipe.yaml (resolved)  log.jsonl  tensorboard/  samples/  checkpoints/  export/
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run by path: Python put fastgen/ first on sys.path, where its modules could hide installed ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from fastgen import checkpoint
from fastgen.backbones.base import Backbone
from fastgen.checkpoint import CheckpointError
from fastgen.config import Recipe, RecipeError, changed_keys, dump_recipe, load_recipe
from fastgen.data import DataError, Stream, make_batch
from fastgen.denoiser import Denoiser, carried_names
from fastgen.distributed import Strategy, average_gradients, divide, start, stored_name, strategy_of
from fastgen.evaluation import evaluate
from fastgen.hacking import spreads
from fastgen.health import Watch, statistics
from fastgen.lora import LoraDenoiser
from fastgen.networks import Ema, Networks
from fastgen.noise import make_key
from fastgen.objectives import Loss, Turn
from fastgen.pipelines.export import export, export_run
from fastgen.pipelines.sampler import Sampler, teacher_sampler
from fastgen.pipelines.video import save_video, side_by_side
from fastgen.report import plot_points, save_grid
from fastgen.rewards import Score, Scorer
from fastgen.run_log import RunLog
from fastgen.sharding import local, refill

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what was seen and what to try."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a recipe became. The loop's functions take it whole; only its modules, tensors and watch change."""

    recipe: Recipe
    accelerator: Accelerator
    strategy: Strategy
    backbone: Backbone
    networks: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    state: dict[str, Tensor]
    ema: Ema
    stream: Stream
    prompts: list[str]  # the first of the stream, for pictures and the watch
    watch: Watch

    @property
    def saved(self) -> dict[str, nn.Module]:
        """What a checkpoint holds: every role but the frozen teacher, and the average."""
        return {role: self.networks[role] for role in self.networks if role != "teacher"} | {"ema": self.ema.module}

    @property
    def student(self) -> Sampler:
        """The average of the student, sampling as it will be exported."""
        return Sampler(self.backbone, self.ema.module, self.recipe.rollout)

    def teacher(self, num_steps: int) -> Sampler:
        """The teacher as its stock pipeline samples it."""
        scale = self.recipe.eval.teacher_guidance_scale
        return teacher_sampler(self.backbone, num_steps, scale, self.networks.teacher)

    @property
    def samples_here(self) -> bool:
        """Whether this process samples: the first one, and all where networks are divided."""
        return self.accelerator.is_main_process or self.strategy == "fsdp"


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its last step, from its last complete checkpoint if there is one. Returns the run folder."""
    accelerator = start(recipe)
    main, console = accelerator.is_main_process, Console(quiet=not accelerator.is_main_process)
    folder, config = open_run(recipe, accelerator), recipe.train
    resumed = checkpoint_to_resume(recipe, accelerator)
    console.out(dump_recipe(recipe), highlight=False)
    parts = build(recipe, accelerator)
    console.print(role_table(recipe, parts.networks))
    for warning in parts.backbone.warnings():
        console.print(f"[yellow]warning: {warning}[/yellow]")

    step, position, good = 0, 0, 0
    per_update = config.batch_size * config.accumulate * accelerator.num_processes
    if resumed:
        counters = resume(parts, resumed, per_update)
        step, position, good = counters["step"], counters["position"], counters["last_good"]
        console.print(f"continuing from {resumed.name}")
        set_anchor(parts)
    else:
        console.print(f"no checkpoint: starting from {recipe.init_from or 'the pretrained weights'}")
        start_from(parts)
        show_teacher(parts, folder / "samples" / "teacher.png", console)
        set_anchor(parts)

    log = RunLog(folder, step, enabled=main)
    bar = tqdm(total=config.steps, initial=step, desc="training", disable=not main)
    marks = weight_marks(parts)
    while step < config.steps:
        student_moved = False
        for turn in recipe.objective.turns(step, parts.state):
            reset_roles(parts, turn, step)
            set_rates(parts, turn, step)
            for inner in range(turn.updates):
                before = bit_sums(parts.networks, turn) if step == 0 and inner == 0 else None
                terms, stepped = update(parts, turn, position, make_key(recipe.seed, step, turn.name, inner))
                recipe.objective.finish(turn, parts.networks, parts.state)
                position += per_update
                student_moved |= stepped and "student" in turn.roles
                log.add(turn.name, terms)
                if before is not None and stepped:
                    report_moved(parts, turn, before, terms, console)
        if student_moved:
            parts.ema.update(parts.networks.student)
        step += 1
        bar.update()

        if recipe.health.every and step % recipe.health.every == 0:
            watch(parts, step, log, marks, console)
            marks = weight_marks(parts)
        if step % config.log_every == 0 or step == config.steps:
            bar.set_postfix(log.write(step, parts.optimizers))
        if parts.samples_here and due(step, config.sample_every, config.steps):
            show(parts, parts.student, folder / "samples" / f"step_{step:08d}.png")
        if parts.samples_here and due(step, config.eval_every, config.steps):
            log.record(step, {f"eval/{k}": v for k, v in quick_metrics(parts).items()})
        if due(step, config.checkpoint_every, config.steps):
            good = good if parts.watch.alarmed else step
            counters = {
                "step": step, "position": position, "ema_updates": parts.ema.updates, "last_good": good,
                "samples_per_update": per_update, "watch": dataclasses.asdict(parts.watch.memory),
            }  # fmt: skip
            if main or parts.strategy == "fsdp":
                checkpoint.save(folder / "checkpoints", parts.saved, parts.optimizers, parts.state, counters,
                                config.keep_checkpoints, writer=main)  # fmt: skip
        accelerator.wait_for_everyone()
    bar.close()
    log.close()
    if parts.samples_here:
        rows = {f"student, {recipe.rollout.num_steps} steps": quick_metrics(parts)} | teacher_metrics(parts)
        if main and parts.strategy == "fsdp":
            export_run(folder, rows=rows)
        elif main:
            export(parts.ema.module, parts.backbone, recipe, folder / "export", step, rows)
        console.print(f"exported to {folder / 'export'}", markup=False)
    accelerator.wait_for_everyone()
    return folder


def build(recipe: Recipe, accelerator: Accelerator) -> Parts:
    """Networks, optimizers, state and data of a recipe; random initialisations come from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config, strategy = recipe.train, strategy_of(recipe, accelerator)
    dtype = DTYPES[config.dtype]
    backbone = recipe.backbone.build(accelerator.device, dtype, recipe.seed)
    backbone.adapters, backbone.deferred = recipe.lora, strategy == "fsdp"
    backbone.frozen_dtype = DTYPES[config.frozen_dtype] if config.frozen_dtype else None
    student = recipe.objective.make_student(backbone, recipe.rollout)
    modules: dict[str, nn.Module] = {"student": student, "teacher": backbone.load("teacher")}
    modules |= recipe.objective.auxiliary(backbone, recipe.rollout)
    modules = {role: m if role == "teacher" else m.to(dtype) for role, m in modules.items()}
    average = modules["student"].average()  # type: ignore[operator]
    if strategy == "fsdp":
        divide(modules | {"average": average}, backbone, accelerator)
    else:
        modules = {role: m.to(accelerator.device) for role, m in modules.items()}
    for role, module in modules.items():
        if isinstance(module, LoraDenoiser) and module.role:
            module.reset(recipe.seed)
        elif role in recipe.lora:
            raise RecipeError(f"lora.{role}: this objective's {role} is not a copy of the teacher")
        if config.gradient_checkpointing and isinstance(module, Denoiser):
            module.enable_checkpointing()
    scorer = Scorer(recipe.rewards, backbone.decode) if recipe.rewards else None
    networks = Networks(modules, recipe.rollout, scorer)
    roles = recipe.objective.trained_roles
    stream = recipe.data.open(backbone, recipe.seed)
    shown = 2000 if backbone.output == "points" else max(config.num_samples, recipe.health.num_samples)
    return Parts(
        recipe=recipe,
        accelerator=accelerator,
        strategy=strategy,
        backbone=backbone,
        networks=networks,
        optimizers={role: recipe.optimizers[role].build(networks[role].parameters()) for role in roles},
        state=send_to_device(recipe.objective.init_state(), accelerator.device),
        ema=Ema(average, networks.student, config.ema_decay),
        stream=stream,
        prompts=stream.prompts(torch.arange(shown)),
        watch=Watch(recipe.health),
    )


def checkpoint_to_resume(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """The checkpoint `train.resume_from` names, later ones set aside; else the newest complete one, if there is any.

    Raises RecipeError if the named one is not there, CheckpointError if it is damaged; before weights load."""
    folder, name = recipe.output_dir / "checkpoints", recipe.train.resume_from
    found = checkpoint.complete(folder)
    if name is None:
        if found:
            checkpoint.counters_of(found[-1])
        return found[-1] if found else None
    if name not in [c.name for c in found]:
        have = f"complete there are {', '.join(c.name for c in found)}" if found else "there is no complete one"
        raise RecipeError(f"train.resume_from: {folder} has no checkpoint {name}; {have}")
    checkpoint.counters_of(folder / name)
    later = [c for c in found if c.name > name]
    if later and accelerator.is_main_process:
        aside = recipe.output_dir / "set_aside"
        aside.mkdir(exist_ok=True)
        for c in later:
            if (aside / c.name).exists():
                raise RecipeError(f"train.resume_from: {aside / c.name} is in the way of a later checkpoint; move it")
            c.rename(aside / c.name)
    accelerator.wait_for_everyone()
    return folder / name


def start_from(parts: Parts) -> None:
    """The student of `init_from`, and its fake score and other trained roles where a run has them."""
    if parts.recipe.init_from is None:
        return
    path, networks = Path(parts.recipe.init_from), parts.networks
    if checkpoints := checkpoint.complete(path / "checkpoints"):
        checkpoint.read_student(checkpoints[-1] / "ema.safetensors", networks.student.state_dict())
        for role in parts.recipe.objective.trained_roles:
            if role != "student" and (checkpoints[-1] / f"{role}.safetensors").is_file():
                checkpoint.read_into(checkpoints[-1] / f"{role}.safetensors", networks[role].state_dict())
    else:
        own, given = networks.student.state_dict(), parts.backbone.load_exported(path).state_dict()
        networks.student.load_state_dict(own | {n: given[g] for n, g in carried_names(own, given).items()})
    parts.ema.move(networks.student, 0.0)


def resume(parts: Parts, path: Path, per_update: int) -> dict[str, Any]:
    """Everything a checkpoint holds, into the parts. Raises RecipeError if an update would be of another size."""
    counters = checkpoint.counters_of(path)
    if counters["samples_per_update"] != per_update:
        raise RecipeError(
            f"train.batch_size x train.accumulate x processes is {per_update}, and the run was started with "
            f"{counters['samples_per_update']} samples an update; keep the product"
        )
    checkpoint.load(path, parts.saved, parts.optimizers, parts.state, parts.accelerator.device)
    parts.ema.updates = counters["ema_updates"]
    parts.watch.recall(counters["watch"])
    return counters


def update(parts: Parts, turn: Turn, position: int, key: int) -> tuple[dict[str, Tensor], bool]:
    """One optimizer step of a turn's roles: accumulate, average over processes, clip, step. Returns the mean terms and
    whether the step was made: not if a gradient is not finite.

    Sample number position + i belongs to micro-batch i // (batch_size * processes), then to the processes in order, so
    the union of samples of an update, and each sample's noise, do not depend on how it was divided.
    Raises TrainingError when too many updates in a row could not be made."""
    config, objective, accelerator = parts.recipe.train, parts.recipe.objective, parts.accelerator
    terms: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    for micro in range(config.accumulate):
        first = position + (micro * accelerator.num_processes + accelerator.process_index) * config.batch_size
        positions = torch.arange(first, first + config.batch_size)
        batch = make_batch(parts.stream, parts.backbone, positions, key, objective.needs, objective.group_size)
        with config.autocast(accelerator.device.type):
            losses = objective.loss(turn, parts.networks, batch, parts.state)
            for loss in [losses] if isinstance(losses, Loss) else losses:
                (loss.total / config.accumulate).backward()
                for name, value in loss.terms.items():
                    terms[name] = terms[name] + value.detach().float() / config.accumulate
    trained = {role: [p for g in parts.optimizers[role].param_groups for p in g["params"]] for role in turn.roles}
    if accelerator.num_processes > 1:
        for parameters in trained.values():
            average_gradients(parameters, accelerator)
        terms = {name: accelerator.reduce(value, "mean") for name, value in terms.items()}
    norms = {role: gradient_norm(parameters) for role, parameters in trained.items()}
    finite = all(bool(norm.isfinite()) for norm in norms.values())
    for role, parameters in trained.items():
        if finite:
            with_grad = [p for p in parameters if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(with_grad, parts.recipe.optimizers[role].max_grad_norm, norms[role])
            parts.optimizers[role].step()
            terms[f"grad_norm_{role}"] = norms[role]
        parts.optimizers[role].zero_grad()
    if not finite:
        bad = ", ".join(role for role, norm in norms.items() if not norm.isfinite())
        if parts.watch.skip() > parts.recipe.health.max_skipped:
            raise TrainingError(
                f"the gradient of {bad} was not finite in {parts.recipe.health.max_skipped + 1} updates in a row; "
                f"lower optimizers.{turn.roles[0]}.lr, continue from an earlier checkpoint (train.resume_from), and "
                "check that the teacher's samples in samples/teacher.png look right"
            )
        return {"skipped": torch.ones((), device=accelerator.device)}, False
    parts.watch.skipped_in_a_row = 0
    return terms | {"skipped": torch.zeros((), device=accelerator.device)}, True


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients of a role, over all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
    accelerator.wait_for_everyone()
    return folder


def due(step: int, every: int, last: int) -> bool:
    """Whether a scheduled event falls on this step; one that is scheduled at all also falls on the last."""
    return every > 0 and (step % every == 0 or step == last)


def reset_roles(parts: Parts, turn: Turn, step: int) -> None:
    """Re-initialises the roles a turn asks for from the pretrained weights, with fresh optimizers; a student's average
    starts anew with it. Fresh heads and adapters depend on the seed and the step alone, also after a restart."""
    if not turn.reset:
        return
    recipe, key = parts.recipe, make_key(parts.recipe.seed, step, "reset")
    fresh: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        torch.manual_seed(key)
        if any(not isinstance(parts.networks[role], LoraDenoiser) for role in turn.reset):
            fresh = dict(recipe.objective.auxiliary(parts.backbone, recipe.rollout))
        if "student" in turn.reset:
            fresh["student"] = recipe.objective.make_student(parts.backbone, recipe.rollout)
    weights = parts.backbone.weights() if parts.strategy == "fsdp" else {}
    for role in turn.reset:
        module = parts.networks[role]
        if isinstance(module, LoraDenoiser):
            module.reset(key)
        else:
            refill(module, fresh[role], weights, stored_name)
        if role in parts.optimizers:
            parts.optimizers[role] = recipe.optimizers[role].build(module.parameters())
        if role == "student":
            parts.ema.move(module, 0.0)
            parts.ema.updates = 0


def set_rates(parts: Parts, turn: Turn, step: int) -> None:
    for role in turn.roles:
        for group in parts.optimizers[role].param_groups:
            group["lr"] = parts.recipe.optimizers[role].rate(*(turn.progress or (step, parts.recipe.train.steps)))


def bit_sums(networks: Networks, turn: Turn) -> dict[str, int]:
    """A weighted sum over the bits of every parameter of a turn's roles, which changes when its elements do."""
    named = {f"{r}.{n}": local(p).detach() for r in turn.roles for n, p in networks[r].named_parameters()}
    return {name: bit_sum(p.reshape(-1).view(torch.int32)) for name, p in named.items()}


def bit_sum(bits: Tensor, chunk: int = 1 << 20) -> int:
    """sum_i (2 i + 1) bits_i, so that opposite changes of two elements do not cancel; a chunk at a time."""
    total = 0
    for number, part in enumerate(bits.split(chunk)):
        weights = 2 * (number * chunk + torch.arange(len(part), device=bits.device)) + 1
        total += int((part.long() * weights).sum())
    return total


def report_moved(parts: Parts, turn: Turn, before: dict[str, int], terms: dict[str, Tensor], console: Console) -> None:
    """Says which parameters the first update moved. An error: a role without gradient (weight decay alone may still
    have moved it), or gradient left on a role of another turn, which would enter that role's next step."""
    after = bit_sums(parts.networks, turn)
    for role in turn.roles:
        parameters = dict(parts.networks[role].named_parameters())
        same = [after[f"{role}.{name}"] == before[f"{role}.{name}"] for name in parameters]
        flags = torch.tensor(same, dtype=torch.int32, device=parts.accelerator.device)
        if parts.strategy == "fsdp":  # a part that moved on any process
            dist.all_reduce(flags, dist.ReduceOp.MIN)
        still = [name for name, flag in zip(parameters, flags.tolist(), strict=True) if flag]
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


def weight_marks(parts: Parts) -> dict[str, Tensor]:
    """A few values of every tensor of every trained role, to see later whether they moved."""
    return {
        role: torch.cat([local(p).detach().reshape(-1)[:16].float() for p in parts.networks[role].parameters()])
        for role in parts.recipe.objective.trained_roles
    }


def watch(parts: Parts, step: int, log: RunLog, marks: Mapping[str, Tensor], console: Console) -> None:
    """Looks at the student's samples and the run's terms; writes what it sees, and warns in words.

    Raises TrainingError at a warning if health.stop says so."""
    config, terms = parts.recipe.health, log.means()
    now = weight_marks(parts)
    moved = {
        role: ((now[role] - old).square().mean() / old.square().mean().clamp_min(1e-6)).sqrt().item()
        for role, old in marks.items()
        if any(name.endswith(f"/grad_norm_{role}") for name in terms)  # not a role whose turn has not come yet
    }
    latents = student_latents(parts, config.num_samples)
    seen, warnings = parts.watch.look(step, latents, terms, moved)
    if parts.recipe.rewards:
        rewarded, more = parts.watch.look_at_rewards(step, latents, scores_of(parts, latents), parts.recipe.rewards)
        seen, warnings = seen | rewarded, warnings + more
    log.record(step, {f"health/{name}": value for name, value in seen.items()})
    for warning in warnings:
        log.warn(step, warning)
        tqdm.write(f"warning at step {step}: {warning}", file=sys.stderr)
    stop = torch.tensor(float(bool(warnings and config.stop)), device=parts.accelerator.device)
    if parts.accelerator.reduce(stop, "sum") > 0:
        raise TrainingError(f"health.stop: {warnings[0] if warnings else 'another process saw a warning'}")


def set_anchor(parts: Parts) -> None:
    """What the watch compares rewards with: the teacher's samples, and, before the first update, their rewards'
    spread and a first look at the student. On all processes alike."""
    recipe, watch = parts.recipe, parts.watch
    if not recipe.rewards or not recipe.health.every:
        return
    count = recipe.health.num_samples
    watch.anchor = fixed_latents(parts, parts.teacher(max(recipe.eval.teacher_steps, default=50)), count)
    if not watch.memory.rewards:
        watch.memory.reward_spread = spreads(scores_of(parts, watch.anchor))
        latents = student_latents(parts, count)
        watch.look_at_rewards(0, latents, scores_of(parts, latents), recipe.rewards)


def scores_of(parts: Parts, latents: Tensor) -> dict[str, Score]:
    """Every reward, optimised and held out, of samples of the fixed prompts, a batch at a time."""
    assert parts.networks.scorer is not None
    size, chunks = parts.recipe.train.batch_size, list[dict[str, Score]]()
    for i in range(0, len(latents), size):
        rows = latents[i : i + size]
        chunks.append(parts.networks.scorer.each(rows, parts.prompts[i : i + len(rows)]))
    return {
        name: Score(torch.cat([c[name].value for c in chunks]), torch.cat([c[name].valid for c in chunks]))
        for name in chunks[0]
    }


def student_latents(parts: Parts, count: int) -> Tensor:
    """Samples of the student as it is now, of fixed prompts and seeds."""
    sampler = Sampler(parts.backbone, parts.networks.student, parts.recipe.rollout)
    return fixed_latents(parts, sampler, count)


def fixed_latents(parts: Parts, sampler: Sampler, count: int) -> Tensor:
    """Latents of fixed prompts, seeds 0, 1, 2, ..., a batch at a time: [count, ...]."""
    size = parts.recipe.train.batch_size
    chunks = [range(i, min(i + size, count)) for i in range(0, count, size)]
    return torch.cat([sampler.latents([parts.prompts[i] for i in chunk], chunk) for chunk in chunks])


def role_table(recipe: Recipe, networks: Networks) -> Table:
    """One row a network: class, parameters, trainable, bytes, dtype, learning rate."""
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


def show(parts: Parts, sampler: Sampler, path: Path) -> None:
    """A picture of fixed prompts and seeds: the data stream's first prompts, seeds 0, 1, 2, ..."""
    points = sampler.backbone.output == "points"
    count = len(parts.prompts) if points else parts.recipe.train.num_samples
    samples = sampler.sample(parts.prompts[:count], range(count))
    if not parts.accelerator.is_main_process:
        return
    path.parent.mkdir(exist_ok=True)
    if points:
        exact = parts.stream.latents(torch.arange(count))
        plot_points({"samples": samples} | ({} if exact is None else {"exact": exact}), path)
    else:
        save_grid(samples, path, columns=max(1, round(count**0.5)))
    if sampler.backbone.fps:
        save_video(side_by_side(samples), path.with_suffix(".mp4"), sampler.backbone.fps)


def show_teacher(parts: Parts, path: Path, console: Console) -> None:
    """Samples the teacher through our own wrapper, before anything is trained: if this looks wrong, stop here. What
    the health watch compares with is measured here too, on all processes alike."""
    sampler = parts.teacher(max(parts.recipe.eval.teacher_steps, default=50))
    if parts.samples_here:
        show(parts, sampler, path)
    if parts.recipe.health.every:
        parts.watch.memory.reference = statistics(fixed_latents(parts, sampler, parts.recipe.health.num_samples))
    steps = sampler.policy.num_steps
    console.print(f"the teacher at {steps} steps: {path}; if this picture is wrong, stop here", markup=False)


def quick_metrics(parts: Parts) -> dict[str, float]:
    return evaluate(parts.student, parts.recipe.eval.quick(), progress=False)["metrics"]


def teacher_metrics(parts: Parts) -> dict[str, dict[str, float]]:
    """The teacher at `eval.teacher_steps`, measured as the student is: what the card compares with."""
    config = parts.recipe.eval
    return {
        f"teacher, {k} steps": evaluate(parts.teacher(k), config.quick(), progress=False)["metrics"]
        for k in config.teacher_steps
    }


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
    except (TrainingError, CheckpointError, DataError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
