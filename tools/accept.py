"""`make accept`: the full acceptance, all seeds and rows. Resumable: a row that is done is not run again.

Every row trains a recipe in its own process, evaluates it as `fastgen eval RUN` does, and is held against its bounds.
The report goes to docs/acceptance/report.md, the numbers to docs/acceptance/rows/*.json; runs stay in runs/accept/."""

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

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "docs/acceptance/rows"
RUNS = ROOT / "runs/accept"
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
# One step of the objectives that are not DMD2 there, about DMD2's own length. AC-DMD's fake score costs three times as
# much an update; with four of them 1,800 student updates took five minutes, and seed 2 ended at 0.0067.
ONE_STEP_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "phased_dmd": ("objective.phases=[{first: 0, last: 1, updates: 3000}]", "train.steps=3000"),
    "gndm": ("train.steps=3000",),
    "rtdmd": ("objective.fake_updates=2", "backbone.fit_steps=800", "train.steps=3000"),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
# The Eulerian loss holds the time embedding's derivative; the progressive one learns one step from two, and last.
LONGER = {
    "eulerian": ("backbone.time_frequency=4", "train.steps=3000"),
    "progressive": ("train.steps=2500",),
}
COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Row:
    """A training run and its bounds: metric -> (comparison, value, or name of a teacher's number times a factor)."""

    name: str
    recipe: str
    bounds: dict[str, tuple[str, float]]
    overrides: tuple[str, ...] = ()
    cpu_minutes: float = 5.0
    teacher_bounds: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # metric -> (steps, factor)
    starts_from: str | None = None  # another row, whose run this one continues (init_from)
    tilt: bool = False  # measured by measure_tilt.py, not by `fastgen eval`
    num_steps: tuple[int, ...] = ()  # evaluated at each of these numbers of steps: metrics are "name, K steps"


def mixture(energy: float) -> dict[str, tuple[str, float]]:
    return {"energy_distance": ("<=", energy), "mode_share_error": ("<=", 0.03), "mode_share_min_ratio": (">=", 0.5)}


def rows() -> list[Row]:
    result = []
    for seed in (0, 1, 2):
        for name in ("mixture", "mixture_corners", "mixture8d"):
            four = f"recipes/{name}_dmd2_4step.yaml"
            one = "recipes/mixture_dmd2_1step.yaml" if name == "mixture" else four
            more = () if name == "mixture" else ONE_STEP
            if name == "mixture_corners":
                more = (*more, "objective.renoise_time={low: 0.02, high: 0.98, shift: 3.0}")
            result.append(Row(f"{name}_4step_seed{seed}", four, mixture(0.010), (f"seed={seed}",)))
            result.append(Row(f"{name}_1step_seed{seed}", one, mixture(0.005), (f"seed={seed}", *more)))
        for steps, factor in ((4, 1.2), (1, 2.0)):
            for suffix, extra in (("", ()), ("_gan", GAN)):  # with the discriminator, and real images
                result.append(
                    Row(f"digits_{steps}step{suffix}_seed{seed}", f"recipes/digits_dmd2_{steps}step.yaml",
                        {"accuracy": (">=", 0.97)}, (f"seed={seed}", *extra), 60.0, {"fid": (50, factor)})
                )  # fmt: skip
        result += objectives(seed) + flow_maps(seed) + consistency_models(seed)
    return result


def objectives(seed: int) -> list[Row]:
    """The other objectives, on the ring and, seed 0 alone, on the digits: FD at most 1.5 times DMD2's own, and with
    the reward digit_stroke one within-class standard deviation more ink than the teacher's, 0.312 + 0.031."""
    energy = {"phased_dmd": 0.012, "gndm": 0.012, "rtdmd": 0.012, "adm": 0.02}
    chosen, result = (f"seed={seed}",), []
    for name, most in energy.items():
        recipe, bounds = f"recipes/mixture_{name}_4step.yaml", {"energy_distance": ("<=", most)}
        result.append(Row(f"mixture_{name}_4step_seed{seed}", recipe, bounds, chosen))
    one = ("rollout.timesteps=[1.0]", "objective.condition_on_stop=false", *chosen)
    for name, more in ONE_STEP_OBJECTIVES.items():
        recipe, bounds = f"recipes/mixture_{name}_4step.yaml", {"energy_distance": ("<=", 0.006)}
        result.append(Row(f"mixture_{name}_1step_seed{seed}", recipe, bounds, (*one, *more)))
    adp, bounds = f"mixture_adp_1step_seed{seed}", {"energy_distance": ("<=", 0.012)}
    result.append(Row(adp, "recipes/mixture_adp_1step.yaml", {}, chosen))
    result.append(Row(f"mixture_adm_1step_seed{seed}", "recipes/mixture_adm_4step.yaml", bounds,
                      (*one, "train.steps=600"), starts_from=adp))  # fmt: skip
    if seed:
        return result
    near = {"fid": ("<=", 1.5 * 0.946)}  # that of digits_4step_seed0
    for name in energy:
        recipe, bounds = f"recipes/digits_{name}_4step.yaml", {"accuracy": (">=", 0.97), **near}
        result.append(Row(f"digits_{name}_4step", recipe, bounds, (), 60.0))
    result.append(Row("digits_lora_4step", "recipes/digits_dmd2_4step.yaml", near, LORA, 60.0))
    starts = {"gndm": "digits_4step_seed0", "crd": "digits_4step_seed0", "rtdmd": "digits_rtdmd_4step"}
    for name, start in starts.items():
        bounds = {"accuracy": (">=", 0.95), "digit_stroke": (">=", 0.343)}
        result.append(Row(f"digits_{name}_stroke", f"recipes/digits_{name}_stroke.yaml", bounds, (), 60.0,
                          starts_from=start))  # fmt: skip
    return result + tilts()


def tilts() -> list[Row]:
    """A reward on one Gaussian and on four modes: rtdmd against the minimiser of its own objective, and with
    critic_weight: inverse_tilt against p exp(r / beta)."""
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


def train(row: Row, device: str) -> None:
    """Trains a row's run, or continues it; nothing where it is complete."""
    if (RUNS / row.name / "export").is_dir():
        return
    command = [sys.executable, str(ROOT / "fastgen/train.py"), row.recipe, f"output_dir={RUNS / row.name}"]
    command += [*row.overrides, f"train.device={device}"]
    if row.starts_from:
        command.append(f"init_from={RUNS / row.starts_from}")
    subprocess.run(command, cwd=ROOT, check=True, env=ENVIRONMENT)


def flow_maps(seed: int) -> list[Row]:
    """Students of any number of steps on the ring, at four steps and at one, and, seed 0 alone, on the digits: at most
    half the teacher's FD at four steps, and a quarter of its FD at one."""
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
    """Trained once, for the training does not depend on the steps, and sampled in 1 to 16 of them."""
    bounds = {"energy_distance, 4 steps": ("<=", 0.006), "energy_distance, 1 step": ("<=", 0.012)}
    return Row(name, f"recipes/mixture_{objective}_4step.yaml", bounds, overrides, num_steps=(1, 2, 4, 8, 16))


def any_step_digits(objective: str) -> Row:
    bounds = {"fid, 4 steps": (4, 0.5), "fid, 1 step": (1, 0.25)}
    return Row(f"digits_{objective}", f"recipes/digits_{objective}_4step.yaml", {}, (), 60.0, bounds,
               num_steps=(1, 2, 4, 8))  # fmt: skip


def consistency_models(seed: int) -> list[Row]:
    """On the ring at four steps and at one; seed 0 alone also on the digits, with the bounds of flow maps."""
    result, one = [], ("rollout.timesteps=[1.0]",)
    for name in ("consistency", "scm"):
        for steps, most, more in ((4, 0.006, ()), (1, 0.012, one)):
            bounds = {"energy_distance": ("<=", most)}
            result.append(Row(f"mixture_{name}_{steps}step_seed{seed}", f"recipes/mixture_{name}_4step.yaml", bounds,
                              (f"seed={seed}", *more)))  # fmt: skip
            if seed == 0:
                limit = {"fid": (steps, 0.5 if steps == 4 else 0.25)}
                recipe = f"recipes/digits_{name}_4step.yaml"
                result.append(Row(f"digits_{name}_{steps}step", recipe, {}, more, 60.0, limit))
    return result


def run_row(row: Row, teacher: dict[str, Any], device: str) -> dict[str, Any]:
    """Trains (or continues) and evaluates; returns the record that is kept."""
    run = RUNS / row.name
    if row.starts_from:  # its numbers may be kept, and its run gone
        train(next(other for other in rows() if other.name == row.starts_from), device)
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
    sys.path.insert(0, str(ROOT))
    from fastgen.evaluation.evaluate import evaluate_path

    return dict(evaluate_path(run, num_steps=num_steps, progress=False)["metrics"])


def machine(device: str) -> str:
    """What it was trained on, with the versions that matter."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def measure_tilt(run: Path) -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    from tools.measure_tilt import measure

    return measure(run)


TEACHER_STEPS = (50, 8, 4, 1)


def measure_teacher(steps: Sequence[int]) -> dict[str, Any]:
    """The digits teacher at these numbers of steps, under the recipe's own evaluation."""
    sys.path.insert(0, str(ROOT))
    import torch

    from fastgen.config import load_recipe
    from fastgen.evaluation.evaluate import evaluate
    from fastgen.sampling.sampler import teacher_sampler

    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", ["output_dir=unused"])
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    scale = recipe.eval.teacher_guidance_scale
    return {str(k): evaluate(teacher_sampler(backbone, k, scale), recipe.eval) for k in steps}


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def kept(name: str) -> dict[str, Any] | None:
    path = ROWS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def keep(name: str, record: dict[str, Any]) -> None:
    ROWS.mkdir(parents=True, exist_ok=True)
    partial = ROWS / f".{name}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.rename(ROWS / f"{name}.json")


def write_report(everything: list[Row]) -> None:
    """docs/acceptance/report.md: one line a bound."""
    lines = ["# Acceptance", "", "| row | metric | measured | bound | held |", "|---|---|---|---|---|"]
    missing = []
    for row in everything:
        record = kept(row.name)
        if record is None:
            missing.append(row.name)
            continue
        for metric, (sign, bound) in record["bounds"].items():
            mark = "yes" if record["held"][metric] else "**no**"
            lines.append(f"| {row.name} | {metric} | {record['metrics'][metric]:.4g} | {sign} {bound:.4g} | {mark} |")
    lines += teacher_lines()
    if teacher := kept("digits_teacher"):
        lines += ["", "The digits teacher:", "", "| steps | FD | accuracy | diversity |", "|---|---|---|---|"]
        for steps in (str(k) for k in TEACHER_STEPS if str(k) in teacher):
            m = teacher[steps]["metrics"]
            lines.append(f"| {steps} | {m['fid']:.3f} | {m['accuracy']:.4f} | {m['diversity']:.3f} |")
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    (ROWS.parent / "report.md").write_text("\n".join(lines) + "\n")


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
    arguments = parser.parse_args()
    chosen = [row for row in rows() if arguments.only in row.name]
    if arguments.list:
        print("\n".join(row.name for row in chosen))
        return 0
    teacher = kept("digits_teacher") or {}
    missing = [k for k in TEACHER_STEPS if str(k) not in teacher]
    if missing and any(row.teacher_bounds for row in chosen):
        teacher |= measure_teacher(missing)
        keep("digits_teacher", teacher)
    for row in chosen:
        if kept(row.name) is None:
            keep(row.name, run_row(row, teacher, arguments.device))
        write_report(rows())
    failed = [row.name for row in chosen if not all(kept(row.name)["held"].values())]  # type: ignore[index]
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} rows hold" + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
