"""The full acceptance: trains every recipe it names and holds what comes out against bounds.

    python benchmarks/acceptance/accept.py                    # all rows; `make accept` runs this first
    python benchmarks/acceptance/accept.py --only mixture_4   # the rows whose name contains this
    python benchmarks/acceptance/accept.py --list             # their names
    python benchmarks/acceptance/accept.py --report           # only the report, from the rows that are there

Every row trains a recipe in a process of its own, evaluates it as `fastgen eval RUN` does, and compares the result
with the row's bounds. The numbers are kept in rows.jsonl, and report.md is written from them after every row. A row
that is in rows.jsonl is not run again: a program that was stopped goes on where it was, and a training that was
interrupted goes on from its last checkpoint in runs/accept. To run a row again, delete its line and its run's
folder."""

import argparse
import dataclasses
import datetime
import json
import operator
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rows import append_row, read_rows, replace_text, sort_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).resolve().with_name("rows.jsonl")
REPORT = ROWS.with_name("report.md")
RUNS = ROOT / "runs/accept"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
COMPARE = {"<=": operator.le, ">=": operator.ge}
TEACHER_STEPS = (50, 8, 4, 1)
INTRODUCTION = """\
# Acceptance

`accept.py` trains and evaluates every recipe; each line compares one of its numbers with a bound. `make accept` runs
what is missing and writes this page. The numbers, with all overrides, are in `rows.jsonl`; `kills.jsonl` has the runs
that were killed again and again, `faults.jsonl` those that other faults came to.
"""

ONE_STEP = (
    "rollout.timesteps=[1.0]",
    "objective.condition_on_stop=false",
    "train.steps=3200",
    "train.ema_decay=0.998",
)
GAN = ("objective.gan_weight=0.01", "optimizers.discriminator={lr: 2e-4, betas: [0.0, 0.99], weight_decay: 0.0}")
LORA = (
    "lora.student.rank=32",
    "lora.fake_score.rank=32",
    "optimizers.student.lr=5e-4",
    "optimizers.fake_score.lr=2e-3",
)
# The objectives whose recipes of one step are made from those of four. They train about as long as DMD2 does. An
# update of rtdmd's fake score (AC-DMD) costs three times as much as one of DMD2's, so a student update has only two of
# them: with four, 1,800 student updates took five minutes, and seed 2 ended at an energy distance of 0.0067.
ONE_STEP_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "phased_dmd": ("objective.phases=[{first: 0, last: 1, updates: 3000}]", "train.steps=3000"),
    "gndm": ("train.steps=3000",),
    "rtdmd": ("objective.fake_updates=2", "backbone.fit_steps=800", "train.steps=3000"),
}
# Forms of the flow map that need more than the recipe's own updates. The Eulerian loss contains a derivative of the
# time embedding, which is therefore a slow one. The progressive form learns one step from two, and that comes last.
LONGER = {
    "eulerian": ("backbone.time_frequency=4", "train.steps=3000"),
    "progressive": ("train.steps=2500",),
}

Bounds = dict[str, tuple[str, float]]  # metric -> (comparison, value)


@dataclasses.dataclass(frozen=True)
class Row:
    """A training run and its bounds.

    teacher_bounds: metric -> (steps, factor); the bound is the factor times the teacher's number at these steps.
    starts_from: the name of another row, whose run this one continues (`init_from`).
    tilt: whether the run is measured by measure_tilt.py and not by `fastgen eval`.
    num_steps: the numbers of steps at which the run is evaluated, where it is more than the recipe's own. The metrics
    are then called "name, K steps"."""

    name: str
    recipe: str
    bounds: Bounds
    overrides: tuple[str, ...] = ()
    cpu_minutes: float = 5.0
    teacher_bounds: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    starts_from: str | None = None
    tilt: bool = False
    num_steps: tuple[int, ...] = ()


# --- which rows there are


def all_rows() -> list[Row]:
    """The rows in the order of the report."""
    result = []
    for seed in (0, 1, 2):
        for name in ("mixture", "mixture_corners", "mixture8d"):
            four = f"recipes/{name}_dmd2_4step.yaml"
            one = "recipes/mixture_dmd2_1step.yaml" if name == "mixture" else four
            more = () if name == "mixture" else ONE_STEP
            if name == "mixture_corners":
                more = (*more, "objective.renoise_time={low: 0.02, high: 0.98, shift: 3.0}")
            result.append(Row(f"{name}_4step_seed{seed}", four, mixture_bounds(0.010), (f"seed={seed}",)))
            result.append(Row(f"{name}_1step_seed{seed}", one, mixture_bounds(0.005), (f"seed={seed}", *more)))
        for steps, factor in ((4, 1.2), (1, 2.0)):
            for suffix, extra in (
                ("", ()),
                ("_gan", GAN),
            ):  # the second with the discriminator, which reads real images
                name, recipe = f"digits_{steps}step{suffix}_seed{seed}", f"recipes/digits_dmd2_{steps}step.yaml"
                overrides, limit = (f"seed={seed}", *extra), {"fid": (50, factor)}
                result.append(Row(name, recipe, {"accuracy": (">=", 0.97)}, overrides, 60.0, limit))
        result += other_objectives(seed) + flow_maps(seed) + consistency_models(seed)
    return result


def mixture_bounds(energy: float) -> Bounds:
    return {"energy_distance": ("<=", energy), "mode_share_error": ("<=", 0.03), "mode_share_min_ratio": (">=", 0.5)}


def other_objectives(seed: int) -> list[Row]:
    """The other objectives on the ring and, with seed 0 alone, on the digits.

    On the digits the FD may be at most 1.5 times DMD2's. Runs with the reward digit_stroke must have one standard
    deviation within a class more ink than the teacher's pictures: 0.312 + 0.031."""
    energy = {"phased_dmd": 0.012, "gndm": 0.012, "rtdmd": 0.012, "adm": 0.02}
    chosen, result = (f"seed={seed}",), []
    for name, most in energy.items():
        recipe, bounds = f"recipes/mixture_{name}_4step.yaml", {"energy_distance": ("<=", most)}
        result.append(Row(f"mixture_{name}_4step_seed{seed}", recipe, bounds, chosen))
    one = ("rollout.timesteps=[1.0]", "objective.condition_on_stop=false", *chosen)
    for name, more in ONE_STEP_OBJECTIVES.items():
        recipe, bounds = f"recipes/mixture_{name}_4step.yaml", {"energy_distance": ("<=", 0.006)}
        result.append(Row(f"mixture_{name}_1step_seed{seed}", recipe, bounds, (*one, *more)))
    adp = f"mixture_adp_1step_seed{seed}"
    result.append(Row(adp, "recipes/mixture_adp_1step.yaml", {}, chosen))
    recipe, bounds = "recipes/mixture_adm_4step.yaml", {"energy_distance": ("<=", 0.012)}
    overrides = (*one, "train.steps=600")
    result.append(Row(f"mixture_adm_1step_seed{seed}", recipe, bounds, overrides, starts_from=adp))
    if seed:
        return result
    near = {"fid": ("<=", 1.5 * 0.946)}  # the FD of digits_4step_seed0
    for name in energy:
        recipe, bounds = f"recipes/digits_{name}_4step.yaml", {"accuracy": (">=", 0.97), **near}
        result.append(Row(f"digits_{name}_4step", recipe, bounds, (), 60.0))
    result.append(Row("digits_lora_4step", "recipes/digits_dmd2_4step.yaml", near, LORA, 60.0))
    starts = {"gndm": "digits_4step_seed0", "crd": "digits_4step_seed0", "rtdmd": "digits_rtdmd_4step"}
    for name, start in starts.items():
        recipe = f"recipes/digits_{name}_stroke.yaml"
        bounds = {"accuracy": (">=", 0.95), "digit_stroke": (">=", 0.343)}
        result.append(Row(f"digits_{name}_stroke", recipe, bounds, (), 60.0, starts_from=start))
    return result + tilts()


def tilts() -> list[Row]:
    """A reward on one Gaussian and on four modes: rtdmd is compared with the minimiser of its own objective, and with
    `critic_weight: inverse_tilt` with p exp(r / beta)."""
    quadratic = ("rewards.parts=[{name: quadratic, center: [-1.0], curvature: [0.3]}]",)
    gaussian = ("backbone.means=[[0.7]]", "backbone.stds=[1.3]", "backbone.weights=[1]")
    result = []
    for law, forward, inverse in (
        ("gaussian", "gaussian_rtdmd_tilt", gaussian),
        ("mixture1d", "mixture1d_rtdmd_tilt", ()),
    ):
        for reward, chosen in (("linear", ()), ("quadratic", quadratic)):
            for kind, recipe, goal, more in (
                ("tilt", forward, "minimiser", ()),
                ("inverse_tilt", "mixture1d_rtdmd_inverse_tilt", "tilt", inverse),
            ):
                bounds = {f"{goal}_offset": ("<=", 0.05), f"{goal}_energy": ("<=", 0.01)}
                name = f"{law}_{kind}_{reward}"
                result.append(Row(name, f"recipes/{recipe}.yaml", bounds, (*more, *chosen), tilt=True))
    return result


def flow_maps(seed: int) -> list[Row]:
    """Students of any number of steps on the ring and, with seed 0 alone, on the digits. There the FD may be at most
    half the teacher's at four steps, and a quarter of the teacher's at one."""
    result = []
    forms = {
        f"flow_map_{form}": ("flow_map", f"objective.form={form}", *LONGER.get(form, ()))
        for form in ("semigradient", "lagrangian", "eulerian", "progressive")
    }
    for name, (objective, *more) in (forms | {"mean_flow": ("mean_flow",)}).items():
        result.append(any_step_ring(f"mixture_{name}_seed{seed}", objective, (f"seed={seed}", *more)))
    if seed:
        return result
    recipe, one = "recipes/digits_ode_regression_4step.yaml", ("rollout.timesteps=[1.0]",)
    result.append(Row("digits_ode_regression_4step", recipe, {}, (), 60.0, {"fid": (4, 0.5)}))
    result.append(Row("digits_ode_regression_1step", recipe, {}, one, 60.0, {"fid": (1, 0.25)}))
    return result + [any_step_digits(objective) for objective in ("flow_map", "mean_flow")]


def any_step_ring(name: str, objective: str, overrides: tuple[str, ...]) -> Row:
    """One training, which does not depend on the number of steps, sampled in 1 to 16 of them."""
    bounds = {"energy_distance, 4 steps": ("<=", 0.006), "energy_distance, 1 step": ("<=", 0.012)}
    return Row(name, f"recipes/mixture_{objective}_4step.yaml", bounds, overrides, num_steps=(1, 2, 4, 8, 16))


def any_step_digits(objective: str) -> Row:
    recipe, limits = f"recipes/digits_{objective}_4step.yaml", {"fid, 4 steps": (4, 0.5), "fid, 1 step": (1, 0.25)}
    return Row(f"digits_{objective}", recipe, {}, (), 60.0, limits, num_steps=(1, 2, 4, 8))


def consistency_models(seed: int) -> list[Row]:
    """Consistency models on the ring at four steps and at one and, with seed 0 alone, on the digits with the bounds of
    flow maps."""
    result = []
    for name in ("consistency", "scm"):
        for steps, most, factor, more in ((4, 0.006, 0.5, ()), (1, 0.012, 0.25, ("rollout.timesteps=[1.0]",))):
            recipe, bounds = f"recipes/mixture_{name}_4step.yaml", {"energy_distance": ("<=", most)}
            result.append(Row(f"mixture_{name}_{steps}step_seed{seed}", recipe, bounds, (f"seed={seed}", *more)))
            if seed == 0:
                recipe, limit = f"recipes/digits_{name}_4step.yaml", {"fid": (steps, factor)}
                result.append(Row(f"digits_{name}_{steps}step", recipe, {}, more, 60.0, limit))
    return result


# --- running a row


def train(row: Row, device: str) -> None:
    """Trains a row's run, or continues it. Nothing happens where the run is complete."""
    if (RUNS / row.name / "export").is_dir():
        return
    command = [sys.executable, str(ROOT / "fastgen/train.py"), row.recipe, f"output_dir={RUNS / row.name}"]
    command += [*row.overrides, f"train.device={device}"]
    if row.starts_from:
        command.append(f"init_from={RUNS / row.starts_from}")
    subprocess.run(command, cwd=ROOT, check=True, env=ENVIRONMENT)


def run_row(row: Row, teacher: dict[str, Any], device: str) -> dict[str, Any]:
    """Trains (or continues) and evaluates a row. Returns the record that is kept."""
    run = RUNS / row.name
    if row.starts_from:  # that row may be in the table while its run is gone
        train(next(other for other in all_rows() if other.name == row.starts_from), device)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    train(row, device)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    metrics: dict[str, float]
    if row.tilt:
        metrics = measure_tilt(run)
    else:
        metrics = {} if row.num_steps else evaluate(run)
        for count in row.num_steps:
            named = f", {count} step{'s' * (count > 1)}"
            metrics |= {metric + named: value for metric, value in evaluate(run, count).items()}
    bounds = dict(row.bounds)
    for metric, (steps, factor) in row.teacher_bounds.items():
        bounds[metric] = ("<=", factor * teacher[str(steps)]["metrics"][metric.split(",")[0]])
    held = {m: COMPARE[sign](metrics[m], bound) for m, (sign, bound) in bounds.items()}
    minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
    held["cpu_minutes"] = minutes <= row.cpu_minutes
    bounds["cpu_minutes"] = ("<=", row.cpu_minutes)
    return {
        "name": row.name,
        "recipe": row.recipe,
        "overrides": row.overrides,
        "metrics": metrics | {"cpu_minutes": minutes},
        "bounds": bounds,
        "held": held,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
    }


def evaluate(run: Path, num_steps: int | None = None) -> dict[str, float]:
    """What `fastgen eval RUN` gives, with --num-steps where it is not the recipe's."""
    from fastgen.evaluation.folders import evaluate_path

    return dict(evaluate_path(run, num_steps=num_steps, student_only=True, progress=False)["metrics"])


def measure_tilt(run: Path) -> dict[str, float]:
    from benchmarks.acceptance.measure_tilt import measure

    return measure(run)


def measure_teacher(steps: Sequence[int]) -> dict[str, Any]:
    """The digits teacher at these numbers of steps, under the recipe's own evaluation."""
    import torch

    from fastgen.config import load_recipe
    from fastgen.evaluation.evaluate import evaluate
    from fastgen.sampling.sampler import teacher_sampler

    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", ["output_dir=unused"])
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    scale = recipe.teacher_guidance
    return {str(k): evaluate(teacher_sampler(backbone, k, scale), recipe.eval) for k in steps}


def machine(device: str) -> str:
    """What a row was trained on, with the version of torch."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


# --- the report


def write_report() -> None:
    """Writes report.md, which has one line for each bound."""
    found = read_rows(ROWS)
    lines = [INTRODUCTION, "| row | metric | measured | bound | held |", "|---|---|---|---|---|"]
    missing = []
    for row in all_rows():
        record = found.get(row.name)
        if record is None:
            missing.append(row.name)
            continue
        for metric, (sign, bound) in record["bounds"].items():
            mark = "yes" if record["held"][metric] else "**no**"
            lines.append(f"| {row.name} | {metric} | {record['metrics'][metric]:.4g} | {sign} {bound:.4g} | {mark} |")
    lines += teacher_lines()
    if teacher := found.get("digits_teacher"):
        lines += ["", "The digits teacher:", "", "| steps | FD | accuracy | diversity |", "|---|---|---|---|"]
        for steps in (str(k) for k in TEACHER_STEPS if str(k) in teacher):
            m = teacher[steps]["metrics"]
            lines.append(f"| {steps} | {m['fid']:.3f} | {m['accuracy']:.4f} | {m['diversity']:.3f} |")
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    replace_text(REPORT, "\n".join(lines) + "\n")


def teacher_lines() -> list[str]:
    """What the shipped teacher measured of itself, against what a good teacher must be."""
    numbers = json.loads((ROOT / "assets/teachers/digits/metrics.json").read_text())
    bounds = {
        "accuracy of 4,000 at 50 steps": (numbers["accuracy_50_steps_4000_samples"], ">=", 0.97),
        "FD at 50 steps / FD of training digits": (numbers["fd_50_steps"] / numbers["fd_train_digits"], "<=", 1.5),
        "FD at 4 steps / FD at 50 steps": (numbers["fd_4_steps"] / numbers["fd_50_steps"], ">=", 2.5),
        "classifier on held-out digits": (numbers["classifier_held_out_accuracy"], ">=", 0.97),
    }
    marks = {name: "yes" if COMPARE[sign](value, bound) else "**no**" for name, (value, sign, bound) in bounds.items()}
    return [f"| digits teacher | {n} | {v:.4g} | {s} {b} | {marks[n]} |" for n, (v, s, b) in bounds.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the rows are trained")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--report", action="store_true", help="write the report of the rows that are there and stop")
    arguments = parser.parse_args()
    chosen = [row for row in all_rows() if arguments.only in row.name]
    if arguments.list:
        print("\n".join(row.name for row in chosen))
        return 0
    if arguments.report:
        write_report()
        return 0
    teacher = read_rows(ROWS).get("digits_teacher", {"name": "digits_teacher"})
    missing = [k for k in TEACHER_STEPS if str(k) not in teacher]
    if missing and any(row.teacher_bounds for row in chosen):
        teacher |= measure_teacher(missing)
        append_row(ROWS, teacher)
    for row in chosen:
        if row.name not in read_rows(ROWS):  # another process may have run it meanwhile
            append_row(ROWS, run_row(row, teacher, arguments.device))
        write_report()
    sort_rows(ROWS)
    found = read_rows(ROWS)
    failed = [row.name for row in chosen if not all(found[row.name]["held"].values())]
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} rows hold" + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
