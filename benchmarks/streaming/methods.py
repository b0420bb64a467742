"""Streaming methods side by side: each trains a student of moving digits under one budget, and is measured alike.

    python benchmarks/streaming/methods.py runs/moving_digits_teacher_forcing --plan    # what is left to run
    python benchmarks/streaming/methods.py runs/moving_digits_teacher_forcing           # started again, it goes on
    python benchmarks/streaming/methods.py runs/moving_digits_teacher_forcing --only rolling --seeds 0
    python benchmarks/streaming/methods.py --report                                     # the table, from the rows

The start is a finished run of recipes/moving_digits_teacher_forcing.yaml. Every method is the recipe
moving_digits_self_forcing_4step with the overrides in METHODS: 80 updates of 32 videos, and for the seeds and numbers
of steps that are asked for. Each run adds three rows to methods.jsonl, as benchmarks/streaming/moving_digits.py
measures them: "NAME, N steps, seed S whole", "... long", four times as many chunks, and "... switch", with another
prompt from the fourth chunk on."""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rows import read_rows, write_table

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).resolve().with_name("methods.jsonl")
PAGE = ROOT / "docs" / "streaming_methods.md"
RECIPE = "recipes/moving_digits_self_forcing_4step.yaml"
BASE = "Self Forcing"  # what the others are compared with
LEVELS = {4: [1.0, 0.9, 0.75, 0.5], 2: [1.0, 0.75], 1: [1.0]}
EIGHT = [1.0, 0.95, 0.9, 0.83, 0.75, 0.63, 0.5, 0.3]
START = "START"  # in an override: the run of moving_digits_teacher_forcing
# a reward for motion as the prompt says, which needs no network
MOTION = "rewards={parts: [{name: function, function: 'benchmarks.streaming.rewards:told_motion', input: frames, "
CRITIC = "{lr: 4e-4, betas: [0.0, 0.99], weight_decay: 0.0, decay: linear}"  # the recipe's optimizer of the fake score
# AnyFlow: real videos, and a student that is told where its jump ends, with the optimizer of causal consistency
FLOW_MAP = (
    "data={name: moving_digits, videos: 1024}",
    "rollout.transition=ode",
    "rollout.two_time=true",
)
MAP_STUDENT = "student: {lr: 5e-4, betas: [0.9, 0.99], weight_decay: 0.0, decay: linear, warmup: 20}"


class Method(NamedTuple):
    """name: of the row.  chunks: the keys of rollout.chunks besides `frames: 1`.  overrides: other keys.
    steps: the numbers of steps it makes sense for.  start: the method whose student it starts from.
    any_step: one student makes all of these numbers of steps; it is trained with the first of them.
    student: the method whose student it samples otherwise; None: it trains its own.  first_steps: of the first chunk,
    in sampling alone."""

    name: str
    chunks: str = "window: 4, sink: 1"
    overrides: tuple[str, ...] = ()
    steps: tuple[int, ...] = (4,)
    start: str | None = None
    any_step: bool = False
    student: str | None = None
    first_steps: int | None = None


METHODS = (
    Method(BASE, steps=(4, 2, 1)),
    Method("without a sink", "window: 4"),
    Method("EMA sink", "window: 4, sink: 1, sink_decay: 0.99"),
    Method(
        "Reward Forcing: EMA sink, Re-DMD",
        "window: 4, sink: 1, sink_decay: 0.99",
        ("objective.name=re_dmd", MOTION + "differentiable: false}]}"),
    ),
    Method("slow memory of 2", "window: 6, sink: 1, slow: 2, slow_similarity: 0.9"),
    Method("the same window without it", "window: 6, sink: 1"),
    Method("8-bit context", "window: 4, sink: 1, cache_dtype: int8"),
    Method("context noise 0.1", "window: 4, sink: 1, context_noise: 0.1"),
    Method("top_k at density 0.5", "window: 4, sink: 1, attention: {layout: top_k, density: 0.5, tile: 16}"),
    Method(
        "Hybrid Forcing: linear memory, top_k at density 0.5",
        "window: 4, sink: 1, linear: true, attention: {layout: top_k, density: 0.5, tile: 16}",
        start=BASE,
    ),
    Method("step first (HiAR)", "window: 4, sink: 1, order: step", steps=(4, 2)),
    Method("rolling (Rolling Forcing)", "window: 4, sink: 1, order: rolling", steps=(4, 2)),
    Method(
        "8 steps on the first frame",
        f"window: 4, sink: 1, first_timesteps: {EIGHT}",
        steps=(4, 2, 1),
    ),
    Method("Stream-R1", overrides=("objective.name=stream_r1", MOTION + "differentiable: true}]}")),
    Method(
        "adversarial self-distillation",
        overrides=(
            "objective.name=asd",
            f"objective.lists={list(LEVELS.values())}",
            f"optimizers.discriminator={CRITIC}",
        ),
        steps=(2, 1),
    ),
    Method(
        "HiAR: step first, forward KL",
        "window: 4, sink: 1, order: step",
        ("objective.name=hiar", "objective.target=path"),
        steps=(4, 2),
    ),
    Method("SC-DMD", overrides=("objective.name=sc_dmd",)),
    Method(
        "Salt",
        overrides=(
            "objective.name=salt",
            f"objective.lists={[EIGHT, LEVELS[4], LEVELS[2]]}",
            "objective.shares=[0.4, 0.4, 0.2]",
            "objective.align_start=20",
        ),
        steps=(4, 2),
    ),
    Method(
        "AnyFlow on real videos",
        overrides=("objective={name: any_flow, causal: chunks}", *FLOW_MAP, f"optimizers={{{MAP_STUDENT}}}"),
        steps=(4, 2, 1),
        any_step=True,
    ),
    Method(
        "AnyFlow, then on its own videos",
        overrides=(
            "objective={name: any_flow, causal: chunks, on_policy: {guidance_scale: 2.5, steps: [1, 2, 4]}}",
            *FLOW_MAP,
            f"optimizers={{{MAP_STUDENT}, fake_score: {CRITIC}}}",
        ),
        steps=(4, 2, 1),
        start="AnyFlow on real videos",
        any_step=True,
    ),
    Method(
        "the same student, 8 steps on the first frame",
        steps=(4, 2, 1),
        any_step=True,
        student="AnyFlow, then on its own videos",
        first_steps=8,
    ),
    Method(
        "Context Forcing: slow memory, causal teacher",
        "window: 6, sink: 1, slow: 2, slow_similarity: 0.9",
        ("objective.name=context_forcing", f"objective.teacher_from={START}"),
    ),
    Method(
        "long tuning (LongLive)",
        overrides=("objective.name=long_tuning", "objective.longest=28"),
        start=BASE,
    ),
    Method("Self Forcing, twice as long", start=BASE),
)


class Run(NamedTuple):
    method: Method
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}, {self.steps} steps, seed {self.seed}"

    @property
    def training(self) -> "Run":
        """The run that trains its student."""
        return self if self.method.student is None else self._replace(method=by_name(self.method.student))

    @property
    def trained_steps(self) -> int:
        return self.method.steps[0] if self.method.any_step else self.steps

    @property
    def folder(self) -> str:
        words = "".join(c if c.isalnum() else " " for c in self.training.method.name.lower()).split()
        return "_".join([*words, f"{self.trained_steps}", f"seed{self.seed}"])

    def overrides(self, start: Path, runs: Path) -> list[str]:
        """What `fastgen train` gets."""
        first = start
        if self.method.start is not None:
            first = runs / Run(by_name(self.method.start), self.steps, self.seed).folder
        return [
            f"output_dir={runs / self.folder}",
            f"init_from={first}",
            f"seed={self.seed}",
            f"rollout.timesteps={LEVELS[self.trained_steps]}",
            f"rollout.chunks={{frames: 1, {self.method.chunks}}}",
            "train.eval_every=0",
            "train.sample_every=0",
            "eval.teacher_steps=[]",
            *(override.replace(START, str(start)) for override in self.method.overrides),
        ]


def by_name(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def every_run(seeds: list[int], steps: list[int], only: str) -> Iterator[Run]:
    """In an order in which each run comes after the one that it starts from."""
    for seed in seeds:
        for count in steps:
            for method in METHODS:
                if count in method.steps and only in method.name:
                    yield Run(method, count, seed)


def trained(run: Run, start: Path, runs: Path) -> Path:
    """The run's folder. Trains the student if its export is not there, and first the one that it starts from."""
    folder = runs / run.folder
    if not (folder / "export" / "fastgen.json").is_file():
        if run.method.start is not None:
            trained(run._replace(method=by_name(run.method.start)), start, runs)
        command = [sys.executable, "-m", "fastgen", "train", RECIPE, *run.overrides(start, runs)]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def perform(run: Run, start: Path, runs: Path) -> None:
    """Trains the student and measures it."""
    folder = trained(run.training, start, runs)
    tool = str(Path(__file__).with_name("moving_digits.py"))
    command = [
        sys.executable,
        tool,
        str(folder),
        "--name",
        run.name,
        "--steps",
        str(run.steps),
        *([] if run.method.first_steps is None else ["--first-steps", str(run.method.first_steps)]),
        "--parts",
        "whole",
        "long",
        "switch",
        "--table",
        str(TABLE),
    ]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)


KILOBYTES = "context, KB"  # what a stream of one video remembers
SECONDS = "seconds a chunk"  # on machines that were more or less busy: its differences say nothing
COLUMNS = {  # heading -> the part and the number of its row
    "accuracy": ("whole", "video_accuracy"),
    "first frame": ("whole", "video_accuracy_first"),
    "direction": ("whole", "direction_accuracy"),
    "speed error": ("whole", "speed_error"),
    "long: accuracy, last quarter": ("long", "accuracy_last_quarter"),
    "long: speed error": ("long", "speed_error"),
    "long: brightness, late / early": ("long", "mass_ratio"),
    "long: frozen": ("long", "freeze_share"),
    "prompt change: turned": ("switch", "turned"),
    "prompt change: kept": ("switch", "kept"),
    KILOBYTES: ("long", "context_bytes"),
    SECONDS: ("long", "seconds_a_chunk"),
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A markdown table: means over the seeds, with the standard error of the mean where there are several. A star is
    at a number that differs from that of plain Self Forcing with as many steps by more than two standard errors,
    2 s sqrt(1 / n + 1 / n_plain), where s is the deviation between seeds of all rows that have several (`pooled`)."""
    lines = [f"| method | steps | seeds | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    found = {(m.name, steps): values_of(rows, m, steps) for m in METHODS for steps in m.steps}
    deviations = {heading: pooled([values[heading] for values in found.values() if values]) for heading in COLUMNS}
    deviations[SECONDS] = deviations[KILOBYTES] = 0.0  # not of seeds
    for (name, steps), columns in found.items():
        if columns:
            plain = found[BASE, steps]
            cells = [
                cell(heading, values)
                + "*" * (name != BASE and differs(values, plain.get(heading, []), deviations[heading]))
                for heading, values in columns.items()
            ]
            count = len(next(iter(columns.values())))
            lines.append(f"| {name} | {steps} | {count} | {' | '.join(cells)} |")
    said = "; ".join(f"{heading} {s:.4f}" for heading, s in deviations.items() if s)
    return "\n".join(lines) + (f"\n\nDeviation between seeds: {said}." if said else "")


def values_of(rows: Mapping[str, Mapping[str, Any]], method: Method, steps: int) -> dict[str, list[float]]:
    """Heading -> the numbers of all seeds that were measured. A change of the prompt need not have been."""
    names = [Run(method, steps, seed).name for seed in range(100)]
    names = [name for name in names if f"{name} whole" in rows and f"{name} long" in rows]
    return {
        heading: [value_of(rows[f"{name} {part}"], key) for name in names if f"{name} {part}" in rows]
        for heading, (part, key) in COLUMNS.items()
        if names
    }


def pooled(groups: list[list[float]]) -> float:
    """The standard deviation within groups of several numbers; 0 if there is none."""
    several = [group for group in groups if len(group) > 1]
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
    return (squares / max(1, sum(len(group) - 1 for group in several))) ** 0.5


def differs(values: list[float], plain: list[float], deviation: float) -> bool:
    """Whether the means are more than two standard errors apart; never if that error is not known."""
    if not values or not plain or not deviation:
        return False
    error = deviation * (1 / len(values) + 1 / len(plain)) ** 0.5
    return abs(statistics.mean(values) - statistics.mean(plain)) > 2 * error


def value_of(row: Mapping[str, Any], key: str) -> float:
    """seconds_a_chunk: CPU seconds of one chunk of one video, decoding included. context_bytes: in KB."""
    if key == "seconds_a_chunk":
        return row["cpu_seconds"] / row["videos"] / row["chunks"]
    return row[key] / 1e3 if key == "context_bytes" else row[key]


def cell(heading: str, values: list[float]) -> str:
    if not values:
        return ""
    if heading == KILOBYTES:
        return f"{values[0]:.0f}"  # the same for every seed
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, nargs="?", help="the run of moving_digits_teacher_forcing")
    parser.add_argument("--runs", type=Path, default=Path("runs/streaming_methods"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--only", default="", help="a part of the names of the methods")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        left = [
            r
            for r in every_run(options.seeds, options.steps, options.only)
            if f"{r.name} long" not in read_rows(TABLE)
        ]
        print(f"{len(left)} runs are left: {'; '.join(run.name for run in left)}")
        if not options.plan:
            if options.start is None or not (options.start / "checkpoints").is_dir():
                parser.error("give the finished run of moving_digits_teacher_forcing that the students start from")
            for run in left:
                perform(run, options.start.resolve(), options.runs.resolve())
    write_table(PAGE, "table", table(read_rows(TABLE)))


if __name__ == "__main__":
    main()
