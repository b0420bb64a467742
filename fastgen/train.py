"""The training program: `accelerate launch fastgen/train.py recipe.yaml [key=value ...]`, or `fastgen train`.

The recipe is built into objects, one loop trains them, and the run folder holds the results:
    recipe.yaml (resolved)  log.jsonl  tensorboard/  samples/  checkpoints/  export/
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by path: Python put fastgen/ first on sys.path, where its modules could hide installed ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the recipe and trains it. Exit code 0 if the run is complete, 2 if the recipe is refused, 1 if the run
    fails, and 130 or 143 if a signal ended it."""
    from fastgen.config import load_recipe
    from fastgen.registry import RecipeError

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: train.py RECIPE.yaml [dotted.key=value ...]", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
    except RecipeError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    from fastgen.train import run_program

    return run_program(recipe)


if __name__ == "__main__":  # here, because the imports below take seconds, and a recipe that is refused needs none
    from fastgen.run.quiet import quiet_libraries

    quiet_libraries()
    sys.exit(main())

import contextlib
import dataclasses
import errno
import signal
import threading
import time
from collections.abc import Callable

from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError
from tqdm import tqdm

import fastgen
from fastgen.config.stored import dump_recipe, to_dict
from fastgen.data import DataError
from fastgen.evaluation.numbers import store_numbers
from fastgen.evaluation.results import results_table
from fastgen.modules.sharding import WeightsError
from fastgen.noise import make_key
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run import terminal
from fastgen.run.build import (
    TrainingError,
    TrainingRun,
    build,
    checkpoint_to_resume,
    open_run,
    resume,
    samples_per_update,
    set_aside,
    start_from,
)
from fastgen.run.checkpoint import CheckpointError
from fastgen.run.distributed import start
from fastgen.run.export import export, export_sharded
from fastgen.run.interruption import EXIT_CODES, Interrupted, Interruption
from fastgen.run.lock import locked
from fastgen.run.log import RunLog, run_log
from fastgen.run.machines import check_alike
from fastgen.run.saving import Checkpoints
from fastgen.run.stalls import attended
from fastgen.run.summary import role_table, summary, time_left
from fastgen.run.turns import reset_roles, set_rates
from fastgen.run.update import update
from fastgen.run.watching import (
    bit_sums,
    quick_metrics,
    report_moved,
    say,
    set_anchor,
    set_reference,
    show,
    show_teacher,
    shown_prompts,
    student_row,
    teacher_rows,
    watch,
    weight_marks,
)

TEACHER = "samples/teacher.png"
OTHER_DATA = (
    "warning: the data are not those that the run was started with, or not in the same order; from here on, its "
    "samples are others than they would have been"
)
TIMED = 4  # updates after which a program says how long the run will take; the first one, which warms up, is left out


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its last step, starting from a complete checkpoint if there is one. Returns the run folder.

    SIGINT, SIGTERM and SIGUSR1 end the run after the current update: it saves a checkpoint and raises Interrupted."""
    accelerator = start(recipe)
    with attended(accelerator) as moved, locked(recipe.output_dir, accelerator):
        return run_recipe(recipe, accelerator, moved)


@dataclasses.dataclass
class Progress:
    """Where a run is. step: student updates made. position: of the next sample in the data stream. good: the step of
    the last checkpoint that was saved without a warning of the watch. saved: the step of the last checkpoint."""

    step: int = 0
    position: int = 0
    good: int = 0
    saved: int = -1


def run_recipe(recipe: Recipe, accelerator: Accelerator, moved: Callable[[], None]) -> Path:
    """The run itself, in a folder that no other program trains in: prepare, train, export, measure. moved: called
    after every update."""
    console = terminal.console(quiet=not accelerator.is_main_process)
    check_alike(accelerator, {"the recipe": dump_recipe(recipe), "the version of fastgen": fastgen.__version__})
    resumed = checkpoint_to_resume(recipe, accelerator)
    folder = open_run(recipe, accelerator)
    check_alike(accelerator, {"the checkpoint to continue from": str(resumed)})
    console.print(summary(recipe, folder, accelerator), markup=False, highlight=False)
    run = build(recipe, accelerator)
    check_alike(accelerator, {"the data": "\n".join(run.prompts)})
    terminal.print_table(role_table(recipe, run.networks), console)
    for warning in run.backbone.warnings():
        console.print(f"warning: {warning}", style="yellow", markup=False)
    progress = continue_run(run, resumed, console) if resumed else begin_run(run, folder, console)
    set_reference(run)
    set_anchor(run)
    with run_log(folder, progress.step, accelerator.is_main_process, recipe.train.trackers) as log:
        if not resumed:
            log.describe(to_dict(recipe))
            log.picture(0, "teacher", folder / TEACHER, shown_prompts(run))
        with Interruption(says=accelerator.is_main_process) as interruption:
            with contextlib.closing(run.batches):
                train_networks(run, folder, progress, log, interruption, moved, console)
            exported = export_student(run, folder, progress.step, console)
            ended = interruption.agreed(accelerator)
    if ended:
        name = signal.Signals(ended).name
        raise Interrupted(
            f"{name} ended the run after its last update; the student was exported to {exported}, and not measured",
            EXIT_CODES[ended],
        )
    measure_student(run, exported, console)
    return folder


def begin_run(run: TrainingRun, folder: Path, console: Console) -> Progress:
    """A new run: the weights of `init_from`, and a first look at the teacher."""
    console.print(f"no checkpoint: starting from {run.recipe.init_from or 'the pretrained weights'}", markup=False)
    for role in start_from(run):
        console.print(f"{run.recipe.init_from} has no {role}; it starts from the pretrained weights", markup=False)
    show_teacher(run, folder / TEACHER, console)
    return Progress()


def continue_run(run: TrainingRun, path: Path, console: Console) -> Progress:
    """A run that was started before: everything its checkpoint holds. Later checkpoints are then set aside."""
    counters, named = resume(run, path), run.recipe.train.resume_from
    if run.accelerator.is_main_process:
        set_aside(run.recipe, path)
    again = f", which comes from {named}; to go back there again, move the later checkpoints away"
    console.print(f"continuing from {path.name}{again if named not in (None, path.name) else ''}", markup=False)
    if counters.get("data", run.data_mark) != run.data_mark:
        console.print(OTHER_DATA, style="yellow", markup=False)
    return Progress(counters["step"], counters["position"], counters["last_good"], counters["step"])


def train_networks(
    run: TrainingRun,
    folder: Path,
    progress: Progress,
    log: RunLog,
    interruption: Interruption,
    moved: Callable[[], None],
    console: Console,
) -> None:
    """The loop: the objective's turns for every student update, and what falls due after it.

    Raises Interrupted, after saving a checkpoint, if a signal asked the run to end."""
    recipe, config, main = run.recipe, run.recipe.train, run.accelerator.is_main_process
    marks, first = weight_marks(run), list[float]()  # seconds of the first updates of this program
    with (
        writing(run, folder) as checkpoints,
        terminal.progress_bar(config.steps, "training", initial=progress.step, enabled=main, in_logs=True) as bar,
    ):
        while progress.step < config.steps:
            step, student_moved, began = progress.step, False, time.perf_counter()
            for turn in recipe.objective.turns(step, run.state):
                reset_roles(run, turn, step)
                set_rates(run, turn, step)
                shared = [dict[str, object]() for _ in range(config.accumulate)] if turn.one_rollout else []
                for inner in range(turn.updates):
                    before = bit_sums(run.networks, turn) if step == 0 and inner == 0 else None
                    key = make_key(recipe.seed, step, turn.name, inner)
                    terms, stepped = update(run, turn, progress.position, key, shared)
                    moved()
                    recipe.objective.finish(turn, run.networks, run.state)
                    if not turn.one_rollout or inner + 1 == turn.updates:
                        progress.position += samples_per_update(recipe, run.accelerator)
                    student_moved |= stepped and "student" in turn.roles
                    log.add(turn.name, terms)
                    if before is not None and stepped:
                        report_moved(run, turn, before, terms, console)
            if student_moved:
                run.ema.update(run.networks.student)
            progress.step = step = step + 1
            took = time.perf_counter() - began
            log.took(took)
            bar.update()
            if len(first) < TIMED:
                first.append(took)
                if len(first) == TIMED and step < config.steps:
                    say(time_left(first[1:], config.steps - step), console)

            if recipe.health.every and step % recipe.health.every == 0:
                watch(run, step, log, marks, console)
                marks = weight_marks(run)
            if step % config.log_every == 0 or step == config.steps:
                bar.set_postfix(log.write(step, run.optimizers))
            if run.samples_here and due(step, config.sample_every, config.steps):
                picture = folder / "samples" / f"step_{step:08d}.png"
                with run.ema.on(run.accelerator.device):
                    show(run, run.student, picture)
                log.picture(step, "student", picture, shown_prompts(run))
            if run.samples_here and due(step, config.eval_every, config.steps):
                measure(run, step, log)
            if due(step, config.checkpoint_every, config.steps):
                save(run, checkpoints, progress, log)
            checkpoints.check()
            run.accelerator.wait_for_everyone()
            if step < config.steps and (number := interruption.agreed(run.accelerator)):
                if progress.saved < step:
                    save(run, checkpoints, progress, log)
                checkpoints.wait()
                run.accelerator.wait_for_everyone()  # a launcher ends all processes when the first of them has ended
                raise Interrupted(
                    f"{signal.Signals(number).name} ended the run after update {step} of {config.steps}; it is saved, "
                    "and the same command continues it",
                    EXIT_CODES[number],
                )


def measure(run: TrainingRun, step: int, log: RunLog) -> None:
    """Logs the quick metrics of the average. Samples that cannot be measured, because they are not finite, are a
    warning: the run may still recover, and its checkpoints are kept."""
    try:
        log.record(step, {f"eval/{name}": value for name, value in quick_metrics(run).items()})
    except ValueError as error:
        log.warn(step, str(error))
        if run.accelerator.is_main_process:
            tqdm.write(f"warning at step {step}: {error}", file=sys.stderr)


def writing(run: TrainingRun, folder: Path) -> Checkpoints:
    """What writes the checkpoints of this run."""
    config = run.recipe.train
    sharded = run.strategy == "fsdp"
    return Checkpoints(folder / "checkpoints", config.keep_checkpoints, sharded, background=config.checkpoint_async)


def save(run: TrainingRun, checkpoints: Checkpoints, progress: Progress, log: RunLog) -> None:
    """Starts to write a checkpoint of the whole run, and a row of the log, if updates wait for one: whoever continues
    from here does not know them. All processes call this together."""
    if log.waiting:
        log.write(progress.step, run.optimizers)
    progress.good = progress.good if run.watch.alarmed else progress.step
    progress.saved = progress.step
    counters = {
        "step": progress.step,
        "position": progress.position,
        "ema_updates": run.ema.updates,
        "last_good": progress.good,
        "samples_per_update": samples_per_update(run.recipe, run.accelerator),
        "resumed_from": run.recipe.train.resume_from,
        "data": run.data_mark,
        "watch": dataclasses.asdict(run.watch.memory),
    }
    checkpoints.save(run.saved, run.optimizers, run.state, counters)


def export_student(run: TrainingRun, folder: Path, step: int, console: Console) -> Path:
    """Exports the average of the student, before anything is measured: what cannot be measured is still exported.
    Returns the export's folder."""
    main, exported = run.accelerator.is_main_process, folder / "export"
    if run.strategy == "fsdp":
        export_sharded(run.ema.module, run.recipe, exported, step, writer=main, run=folder)
    elif main:
        export(run.ema.module, run.backbone, run.recipe, exported, step, run=folder)
    console.print(f"exported to {exported}", markup=False)
    run.accelerator.wait_for_everyone()
    return exported


def measure_student(run: TrainingRun, exported: Path, console: Console) -> None:
    """Measures the average of the student and its teacher alike, prints a table, and writes the numbers into the
    export and its card.

    Raises TrainingError if the student cannot be measured, for example because its samples are not finite."""
    main, count = run.accelerator.is_main_process, run.recipe.eval.quick().num_samples
    if run.samples_here:
        who = "the student and its teacher" if run.recipe.eval.teacher_steps else "the student"
        console.print(f"measuring {count} samples of {who}", markup=False)
        try:
            rows = [student_row(run, progress=main), *teacher_rows(run, progress=main)]
        except ValueError as error:
            raise TrainingError(
                f"the student was exported to {exported}, but it cannot be measured: {error}"
            ) from None
        if main:
            store_numbers(exported, rows)
            terminal.print_table(results_table(rows), console)
            console.print(f"{exported / 'README.md'}, the model card, has these numbers", markup=False)
    run.accelerator.wait_for_everyone()


def due(step: int, every: int, last: int) -> bool:
    """Whether an event that happens every `every` steps, and at the last step, falls on this one. 0: never."""
    return every > 0 and (step % every == 0 or step == last)


def run_program(recipe: Recipe) -> int:
    """Trains a recipe that was read and checked; what goes wrong is said in words. Returns the exit code."""
    threading.excepthook = say_in_background
    try:
        train(recipe)
    except RecipeError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while the run is built or measured, when there is nothing to save
        print("\nstopped: SIGINT ended the run; the same command continues it", file=sys.stderr)
        return EXIT_CODES[signal.SIGINT]
    except (TrainingError, CheckpointError, DataError, WeightsError, OSError, SafetensorError) as error:
        print(f"stopped: {error}{advice(error)}", file=sys.stderr)
        return 1
    return 0


def advice(error: Exception) -> str:
    """What to do where a file could not be written, as the end of a message."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return ". Free some space and start the run again, which continues it from its last checkpoint" if full else ""


def say_in_background(raised: threading.ExceptHookArgs) -> None:
    """An error in writing from a background thread, which is TensorBoard's, is one line. The training stops when it
    writes the next row."""
    if isinstance(raised.exc_value, OSError):
        print(f"\nwarning: {raised.exc_value} (in a background thread)", file=sys.stderr)
    else:
        threading.__excepthook__(raised)
