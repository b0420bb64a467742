"""What the leaderboard trains: an entry for every objective, its recipes, and what one budget makes of them.

A run is an entry on a task with a number of steps and a seed: a shipped recipe and overrides, as `fastgen train` takes
them. Learning rates, the distribution of time levels and weights are the recipe's own, tuned (if at all) for longer
runs. Updates, batch size, moving average, teacher and evaluation belong to the budget and are the same for all. What a
recipe does in phases keeps its share of the run. One thing differs: on the ring the time embedding is a slow one where
a loss contains its derivative (docs/flow_maps.md)."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("ring", "digits")
STEPS: dict[int, tuple[float, ...]] = {4: (1.0, 0.75, 0.5, 0.25), 2: (1.0, 0.5), 1: (1.0,)}
# What an update costs with two steps and with one, relative to four. These are upper bounds: DMD2 measured 0.66 and
# 0.59, ADM 0.89 and 0.82, RTDMD 0.81 and 0.87.
LESS = {4: 1.0, 2: 0.9, 1: 0.87}
SEEDS = {4: (0, 1, 2), 2: (0,), 1: (0,)}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every run of a task gets.

    updates: of the student.
    overhead: the CPU seconds of a run beside its updates: the fit of the ring's network, the evaluations and the
    measurement of memory.
    pairs: the CPU seconds for the ODE pairs of a run that needs them."""

    updates: int
    batch: int
    overhead: float
    pairs: float
    overrides: tuple[str, ...]


BUDGETS = {
    "ring": Budget(
        updates=350,
        batch=512,
        overhead=10.0,
        pairs=0.0,
        overrides=(
            "train.ema_decay=0.98",
            "backbone.fit_steps=800",
            "eval.metrics=[energy_distance, mode_share_error]",
            "eval.num_samples=4000",
            "eval.quick_num_samples=20",
            "eval.batch_size=1000",
        ),
    ),
    "digits": Budget(
        updates=50,
        batch=32,
        overhead=12.0,
        pairs=40.0,
        overrides=(
            "train.ema_decay=0.9",
            "eval.metrics=[fid, accuracy, diversity, digit_stroke]",
            "eval.num_samples=599",
            "eval.quick_num_samples=20",
            "eval.batch_size=100",
        ),
    ),
}
QUIET = (
    "train.keep_checkpoints=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "health.every=0",
    "eval.teacher_steps=[]",
)

Scaled = Callable[[int, int], tuple[str, ...]]  # (updates, steps) -> overrides


def nothing(updates: int, steps: int) -> tuple[str, ...]:
    return ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """An objective on the leaderboard.

    recipe: the end of two recipes' names, recipes/mixture_<recipe>.yaml and recipes/digits_<recipe>.yaml.
    cost: the CPU seconds of an update at four steps, on the ring and on the digits; estimates, until there are rows.
    more, ring, digits: overrides for both tasks, or for one of them.
    scaled: overrides that depend on the number of updates or of steps.
    start: the entry whose run this one continues.
    any_step: whether the training does not depend on the number of steps, so that one run is measured at all of them.
    least_steps, most_steps: the smallest and the largest number of steps the objective can train."""

    name: str
    family: str
    objective: str
    recipe: str
    cost: tuple[float, float]
    more: tuple[str, ...] = ()
    ring: tuple[str, ...] = ()
    digits: tuple[str, ...] = ()
    scaled: Scaled = nothing
    start: str | None = None
    any_step: bool = False
    least_steps: int = 1
    most_steps: int = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    measured: the numbers of steps it is evaluated at, its own first.
    start: the name of the run it continues."""

    name: str
    entry: Entry
    task: str
    steps: int
    seed: int
    updates: int
    recipe: str
    overrides: tuple[str, ...]
    measured: tuple[int, ...]
    start: str | None

    @property
    def seconds(self) -> float:
        """The CPU seconds it is expected to take."""
        budget, cost = BUDGETS[self.task], self.entry.cost[TASKS.index(self.task)] * LESS[self.steps]
        pairs = budget.pairs if any("data.pairs" in o for o in self.overrides) else 0.0
        return self.updates * cost + budget.overhead + pairs


# --- overrides that depend on the length of a run or on its number of steps


def share(updates: int, part: float) -> int:
    return max(1, round(updates * part))


def phases(updates: int, steps: int) -> tuple[str, ...]:
    """Two phases, of which the second is (nearly) twice as long, as in both recipes. A run of one step has one."""
    first, middle = share(updates, 1 / 3), steps // 2
    edges = [(0, middle, first), (middle, steps, updates - first)] if steps > 1 else [(0, 1, updates)]
    listed = ", ".join(f"{{first: {a}, last: {b}, updates: {n}}}" for a, b, n in edges)
    return (f"objective.phases=[{listed}]",)


def path(updates: int, steps: int) -> tuple[str, ...]:
    """DisBack has three tenths of the student's updates more, in which the teacher is degraded and the student
    rests."""
    every = share(updates, 0.1)
    return (
        "objective.path_length=3",
        f"objective.path_every={every}",
        f"objective.interval={share(updates, 0.2)}",
        f"train.steps={updates + 3 * every}",
    )


def warm(part: float) -> Scaled:
    return lambda updates, steps: (f"objective.warmup={share(updates, part)}",)


def mixed(updates: int, steps: int) -> tuple[str, ...]:
    return (f"objective.teacher_updates={share(updates, 1 / 3)}",)


def halved(updates: int, steps: int) -> tuple[str, ...]:
    """Three times half the steps, from 8 times as many as the student's, in stages of (nearly) equal length."""
    stage = updates // 3
    return ("objective.stages=3", f"objective.stage_updates={[stage, stage, updates - 2 * stage]}")


def selected(updates: int, steps: int) -> tuple[str, ...]:
    return (f"objective.selected_steps={min(2, steps - 1)}",)


# --- the entries

ADAM = "betas: [0.0, 0.99], weight_decay: 0.0"
LINEAR = "rewards={parts: [{name: linear, direction: [0.5, 0.0]}]}"  # the ring's reward is half of x
STROKE = "rewards={parts: [{name: digit_stroke}]}"  # the digits' reward is ink
PAIRS = ("data.pairs={count: 1000, steps: 25}",)
MATCHING, REWARD, MAP, REGRESSION = "distribution matching", "with a reward", "flow map or consistency", "regression"
ADVERSARIAL = "adversarial"


def flow_map(form: str, cost: tuple[float, float], ring: tuple[str, ...] = ()) -> Entry:
    overrides = (f"objective.form={form}",)
    return Entry(f"flow_map_{form}", MAP, "flow_map", "flow_map_4step", cost, overrides, ring, any_step=True)


SLOW_EMBEDDING = ("backbone.time_frequency=4",)
RTDMD_REWARD = (
    "objective.stage=2",
    "objective.fake_updates=2",
    "objective.consistency_weight=0.0",
    "objective.group_size=8",
    "objective.dm_weight=1.0",
    "objective.policy_weight=0.1",
    "objective.reward_weight=0.05",
    "objective.std=within_groups",
)
CRD = "objective={name: crd, group_size: 16, beta: 2.0, anchor_weight: 0.0, reference_decay: {first: 1.0}}"
RING_RATES = ("optimizers.student.lr=1e-4", "optimizers.fake_score.lr=5e-4")
DIGITS_RATES = ("optimizers.student.lr=5e-5", "optimizers.fake_score.lr=2e-4")

ENTRIES = (
    Entry("dmd2", MATCHING, "dmd2", "dmd2_4step", (0.096, 1.17)),
    Entry(
        "f_distill",
        MATCHING,
        "f_distill",
        "dmd2_4step",
        (0.202, 2.01),
        ("objective.name=f_distill",),
        (f"optimizers.discriminator={{lr: 1e-3, {ADAM}, decay: linear}}",),
        (f"optimizers.discriminator={{lr: 2e-4, {ADAM}}}", "objective.gan_weight=0.01"),
    ),
    Entry("sc_dmd", MATCHING, "sc_dmd", "dmd2_4step", (0.117, 1.14), ("objective.name=sc_dmd",), least_steps=4),
    Entry(
        "disback",
        MATCHING,
        "disback",
        "dmd2_4step",
        (0.132, 1.33),
        ("objective.name=disback", "objective.condition_on_stop=false"),
        scaled=path,
    ),
    Entry("sid", MATCHING, "sid", "sid_4step", (0.075, 0.73)),
    Entry("sim", MATCHING, "sim", "sid_4step", (0.075, 0.71), ("objective.name=sim",)),
    Entry("vdot", MATCHING, "vdot", "vdot_4step", (0.125, 1.2)),
    Entry("embedding_loss", MATCHING, "embedding_loss", "embedding_loss_4step", (0.158, 0.3)),
    Entry("gndm_path", MATCHING, "gndm", "gndm_4step", (0.102, 1.15)),
    Entry(
        "gndm_score",
        MATCHING,
        "gndm",
        "gndm_4step",
        (0.175, 1.96),
        ("objective.form=score", "objective.condition_on_stop=false"),
        least_steps=2,
    ),
    Entry("rtdmd", MATCHING, "rtdmd", "rtdmd_4step", (0.168, 1.84)),
    Entry("tdm", MATCHING, "tdm", "tdm_4step", (0.08, 1.2), any_step=True),
    Entry("cdm", MATCHING, "cdm", "cdm_4step", (0.1, 1.7), any_step=True),
    Entry("phased_dmd", MATCHING, "phased_dmd", "phased_dmd_4step", (0.088, 0.89), scaled=phases),
    Entry("flash_dmd", MATCHING, "flash_dmd", "flash_dmd_4step", (0.085, 1.17), least_steps=2),
    Entry("adm", ADVERSARIAL, "adm", "adm_4step", (0.222, 2.22)),
    Entry("adp", ADVERSARIAL, "adp", "adp_1step", (0.075, 0.50), digits=PAIRS, any_step=True),
    Entry("gdd", ADVERSARIAL, "gdd", "gdd_1step", (0.07, 0.35), most_steps=1),
    Entry("ode_regression", REGRESSION, "ode_regression", "ode_regression_4step", (0.040, 0.11), digits=PAIRS),
    Entry("reflow", REGRESSION, "reflow", "reflow_4step", (0.020, 0.11), digits=PAIRS, any_step=True),
    Entry("mdt", REGRESSION, "mdt", "mdt_4step", (0.015, 0.35), any_step=True),
    flow_map("lagrangian", (0.057, 0.47)),
    flow_map("semigradient", (0.036, 0.45)),
    flow_map("eulerian", (0.044, 0.59), SLOW_EMBEDDING),
    flow_map("progressive", (0.029, 0.34)),
    Entry("mean_flow", MAP, "mean_flow", "mean_flow_4step", (0.040, 0.41), any_step=True),
    Entry("consistency", MAP, "consistency", "consistency_4step", (0.018, 0.39), any_step=True),
    Entry("ctm", MAP, "ctm", "ctm_4step", (0.060, 0.5), any_step=True),
    Entry("pi_flow", MAP, "pi_flow", "pi_flow_4step", (0.07, 0.7), scaled=mixed),
    Entry("progressive", MAP, "progressive", "progressive_4step", (0.030, 0.25), scaled=halved),
    Entry("scm", MAP, "scm", "scm_4step", (0.023, 0.35), any_step=True, scaled=warm(0.3)),
    Entry(
        "re_dmd",
        REWARD,
        "re_dmd",
        "dmd2_4step",
        (0.106, 1.07),
        ("objective.name=re_dmd",),
        (LINEAR,),
        (STROKE, "objective.beta=64"),  # 2 for each standard deviation of ink, which is 0.031
    ),
    Entry(
        "gndm_reward",
        REWARD,
        "gndm",
        "gndm_4step",
        (0.105, 1.23),
        ("objective.reward_weight=0.3",),
        (LINEAR, *RING_RATES),
        (STROKE, *DIGITS_RATES),
        start="gndm_path",
    ),
    Entry(
        "rtdmd_reward",
        REWARD,
        "rtdmd",
        "rtdmd_4step",
        (0.114, 1.29),
        RTDMD_REWARD,
        (LINEAR, *RING_RATES),
        (STROKE, *DIGITS_RATES),
        scaled=selected,
        start="rtdmd",
    ),
    Entry(
        "crd",
        REWARD,
        "crd",
        "dmd2_4step",
        (0.073, 0.65),
        (CRD,),
        (LINEAR, "optimizers={student: {lr: 1e-4, weight_decay: 0.0, decay: linear, warmup: 10}}"),
        (STROKE, "optimizers={student: {lr: 5e-5, weight_decay: 0.0, decay: linear, warmup: 10}}"),
        start="dmd2",
    ),
)
ABSENT: dict[str, str] = {  # registered objectives without an entry, and the reason
    "any_flow": "it trains the chunks of videos, which neither teacher makes; flow_map is its part for images",
    "asd": "it trains one student for several numbers of steps, and a run here has one number",
    "hiar": "it is for the chunks of videos, which neither teacher makes",
    "salt": "it trains one student for several numbers of steps; sc_dmd is its part for one number",
    "stream_r1": "it weights the frames of videos, which neither teacher makes; re_dmd is its part for images",
    "teacher_forcing": "it trains on videos, which neither teacher makes",
    "context_forcing": "it trains on videos, which neither teacher makes",
    "long_tuning": "it trains on videos that go on, which neither teacher makes",
    "self_e": "it trains from prompts, and the ring of this board has none",
    "transition_matching": "it trains students whose last blocks run several times; dmd2 is its second stage",
}


# --- the runs


def run_name(entry: str, task: str, steps: int, seed: int) -> str:
    return f"{task}_{entry}_{steps}step_seed{seed}"


@cache
def tells_stop(recipe: str) -> bool:
    """Whether a recipe's fake score is told which step of the rollout made a sample."""
    return yaml.safe_load((ROOT / recipe).read_text())["objective"].get("condition_on_stop", False)


def make_run(entry: Entry, task: str, steps: int, seed: int, updates: int | None, more: Sequence[str]) -> Run:
    """The run of an entry. For trials, `updates` replaces the budget's, and `more` comes after all other overrides."""
    budget = BUDGETS[task]
    count = updates or budget.updates
    recipe = f"recipes/{'mixture' if task == 'ring' else 'digits'}_{entry.recipe}.yaml"
    every = share(count, 0.2)
    overrides = [
        f"rollout.timesteps={list(STEPS[steps])}",
        f"train.steps={count}",
        f"train.batch_size={budget.batch}",
        f"train.checkpoint_every={every}",
        f"train.log_every={every}",  # with a row at every checkpoint, what a restart repeats is logged once
        *QUIET,
        *budget.overrides,
        *entry.more,
        *(entry.ring if task == "ring" else entry.digits),
        *entry.scaled(count, steps),
        f"seed={seed}",
        *more,
    ]
    if steps == 1 and tells_stop(recipe) and entry.objective != "crd":
        overrides.append("objective.condition_on_stop=false")  # as in the recipes of one step
    measured = tuple(s for s in STEPS if s <= steps) if entry.any_step and seed == 0 else (steps,)
    start = run_name(entry.start, task, steps, seed) if entry.start else None
    name = run_name(entry.name, task, steps, seed)
    return Run(name, entry, task, steps, seed, count, recipe, tuple(overrides), measured, start)


def make_runs(updates: int | None = None, more: Sequence[str] = ()) -> dict[str, Run]:
    """All runs by name. A run that others continue comes before them."""
    runs = [
        make_run(entry, task, steps, seed, updates, more)
        for entry in ENTRIES
        for task in TASKS
        for steps in STEPS
        if entry.least_steps <= steps <= entry.most_steps and (steps == 4 or not entry.any_step)
        for seed in SEEDS[steps]
    ]
    return {run.name: run for run in runs}
