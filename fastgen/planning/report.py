"""What `fastgen plan` prints: what a recipe needs, and which changes of its lines would make it fit."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgen.config import build_recipe
from fastgen.config.stored import to_dict
from fastgen.config.text import apply_override
from fastgen.planning.cost import Speed, cost_lines
from fastgen.planning.plan import CONTEXT, Plan, plan
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run.terminal import print_table

LORA = "{rank: 64}"


@dataclasses.dataclass(frozen=True)
class Change:
    """Overrides of a recipe that save memory. encoders: what they make of a plan, if they are about text encoders.
    train: keys of the section `train`, if they divide networks over the GPUs. Neither of the two changes the turns."""

    lines: tuple[str, ...]
    encoders: Callable[[Plan], Plan] | None = None
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def goes_with(self, other: "Change") -> bool:
        """Whether both may be chosen: one does not have all lines of the other."""
        return not (set(self.lines) <= set(other.lines) or set(other.lines) <= set(self.lines))


def prepared(found: Plan) -> Plan:
    return dataclasses.replace(found, components=tuple(c.prepared() for c in found.components))


def halved(found: Plan) -> Plan:
    return dataclasses.replace(found, components=tuple(c.halved() for c in found.components))


def offloaded(found: Plan) -> Plan:
    train = dataclasses.replace(found.recipe.train, prefetch=0)
    recipe = dataclasses.replace(found.recipe, train=train)
    return dataclasses.replace(found, recipe=recipe, components=tuple(c.offloaded() for c in found.components))


def divided(train: Mapping[str, Any]) -> Change:
    return Change(tuple(f"train.{key}={value}" for key, value in train.items()), train=train)


def changes(recipe: Recipe, gpus: int, encoders: int) -> list[Change]:
    """The changes that this recipe has not made yet, cheapest first. encoders: bytes of text encoders."""
    train, options = recipe.train, list[Change]()
    if recipe.backbone.can_checkpoint and not train.gradient_checkpointing:
        options.append(Change(("train.gradient_checkpointing=true",)))
    half = [
        f"train.{key}={value}"
        for key, value in (("mixed_precision", "bf16"), ("frozen_dtype", "bfloat16"))
        if getattr(train, key) not in (value, "float8")
    ]
    if half and train.dtype == "float32" and recipe.backbone.can_checkpoint:
        options.append(Change(tuple(half)))
    if encoders:
        if recipe.backbone.encoder_dtype is None and train.dtype == "float32":
            options.append(Change(("backbone.encoder_dtype=bfloat16",), halved))
        if recipe.backbone.encoders != "offload":
            options.append(Change(("backbone.encoders=offload", "train.prefetch=0"), offloaded))
        options.append(Change(("data={name: prepared, folder: ...}",), prepared))
    if train.batch_size > 1:
        product = train.batch_size * train.accumulate
        options.append(Change(("train.batch_size=1", f"train.accumulate={product}")))
    sharded = {"strategy": "fsdp"}
    if gpus > 1 and train.strategy != "fsdp":
        options.append(divided(sharded))
    if gpus > 1 and train.reduce_gradients == "update" and train.accumulate * train.batch_size > 1:
        options.append(divided((sharded if train.strategy != "fsdp" else {}) | {"reduce_gradients": "micro_batch"}))
    roles = [r for r in recipe.objective.trained_roles if r not in (*recipe.lora, *recipe.objective.full_roles)]
    if roles:  # the last, as it trains something else
        options.append(Change(tuple(f"lora.{role}={LORA}" for role in roles)))
    return options


@dataclasses.dataclass(frozen=True)
class Advice:
    """tried: for each change alone, its lines, the peak per GPU, and whether that peak is exact; otherwise it is a
    lower bound, which is already too much. lines: the fewest recipe lines that make the recipe fit, None if no
    combination does. peak: with these lines, or with all changes if nothing fits. gpus: how many GPUs would hold
    everything sharded, None if no number does."""

    tried: tuple[tuple[tuple[str, ...], int, bool], ...]
    lines: tuple[str, ...] | None
    peak: int
    gpus: int | None = None


class Variants:
    """Plans of a recipe under combinations of changes. The networks run once for each that changes the turns."""

    def __init__(self, base: Plan):
        self.base = base
        self._known: dict[tuple[tuple[str, ...], bool], Plan] = {((), True): base}

    def plan(self, chosen: Sequence[Change], whole: bool = True) -> Plan:
        """The plan with the chosen changes. whole: False leaves out activations."""
        lines = tuple(line for c in chosen if not (c.encoders or c.train) for line in c.lines)
        key = (lines, whole or (lines, True) in self._known)
        if key not in self._known:
            self._known[key] = plan(self.changed(lines), self.base.gpus, self.base.gpu, activations=whole)
        found = self._known[key]
        for change in (c.encoders for c in chosen if c.encoders is not None):
            found = change(found)
        for keys in (c.train for c in chosen if c.train):
            train = dataclasses.replace(found.recipe.train, **keys)
            found = dataclasses.replace(found, recipe=dataclasses.replace(found.recipe, train=train))
        return found

    def possible(self, change: Change) -> bool:
        """Whether the recipe may be changed so: 8-bit moments, for example, cannot be sharded."""
        try:
            return change.encoders is not None or bool(self.changed(change.lines))
        except RecipeError:
            return False

    def changed(self, lines: Sequence[str]) -> Recipe:
        raw = to_dict(self.base.recipe)
        for line in lines:
            apply_override(raw, line)
        return build_recipe(raw)


def advise(base: Plan, memory: float) -> Advice:
    """The fewest recipe lines with which the peak is at most `memory` bytes per GPU."""
    variants = Variants(base)
    options = changes(base.recipe, base.gpus, sum(c.held + c.turn for c in base.components if c.is_encoder))
    options = [option for option in options if variants.possible(option)]
    tried = []
    for option in options:
        bound = variants.plan([option], whole=False).peak
        exact = bound <= memory
        tried.append((option.lines, variants.plan([option]).peak if exact else bound, exact))
    every = (c for n in range(len(options) + 1) for c in itertools.combinations(options, n))
    sets = [c for c in every if all(a.goes_with(b) for a, b in itertools.combinations(c, 2))]
    for chosen in sorted(sets, key=lambda c: sum(len(option.lines) for option in c)):
        if variants.plan(chosen, whole=False).peak <= memory:
            found = variants.plan(chosen)
            if found.peak <= memory:
                return Advice(tuple(tried), tuple(line for c in chosen for line in c.lines), found.peak)
    sharded = divided({"strategy": "fsdp", "reduce_gradients": "micro_batch"})
    whole = variants.plan([*(option for option in options if not option.train), sharded])
    counts = (2**i for i in range(1, 13) if variants.possible(divided({"strategy": "fsdp"})))
    enough = next((n for n in counts if dataclasses.replace(whole, gpus=n).peak <= memory), None)
    return Advice(tuple(tried), None, variants.plan(options).peak, enough)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g}" if count < 1e9 else f"{count / 1e9:.1f}"


HEADROOM = 0.05  # ours: of a GPU's memory, for fragmentation


def report(
    found: Plan, memory: float | None, console: Console, headroom: float = HEADROOM, speed: Speed | None = None
) -> None:
    """Prints the plan, what the run costs, and, if `memory` is given (bytes per GPU), what would make it fit.
    headroom: the share of the memory that is to stay free. speed: that of a GPU, if it is known."""
    table = Table(
        "role", "", "parameters", "dtype", "weights", "gradients", "AdamW", title="Networks, in GB, before sharding"
    )
    for r in found.roles:
        sizes = (gigabytes(n) if n else "" for n in (r.held, r.gradients, r.moments))
        table.add_row(r.name, r.kind, f"{r.parameters:,}", r.dtype, *sizes)
    for c in found.components:
        table.add_row(c.name, c.use, f"{c.parameters:,}", "", gigabytes(c.held + c.turn) if c.held + c.turn else "")
    print_table(table, console)

    per_update: dict[str, float] = {}
    table = Table("turn", "inner updates", "activations, GB", "network evaluations per sample", title="Turns")
    for part in found.turns:
        for role, n in part.evaluations.items():
            per_update[role] = per_update.get(role, 0) + n * part.turn.updates
        calls = ", ".join(f"{role} {n:.3g}" for role, n in part.evaluations.items())
        activations = max(live for live, _ in part.live.history)
        table.add_row(part.turn.name, str(part.turn.updates), gigabytes(activations), calls)
    print_table(table, console)
    train = found.recipe.train
    samples = train.batch_size * train.accumulate
    calls = ", ".join(f"{role} {n:.3g}" for role, n in per_update.items())
    console.print(
        f"Network evaluations per student update: {sum(per_update.values()):.3g} per sample ({calls}), for "
        f"{samples} samples on each GPU.",
        highlight=False,
    )

    table = Table("moment", "GB per GPU", title=f"{found.gpus} GPU{'s' * (found.gpus > 1)}, {strategy(found)}")
    table.add_row("held all the time", gigabytes(found.held))
    for name, n in found.moments.items():
        table.add_row(name, gigabytes(n))
    table.add_row("[bold]peak[/bold]", f"[bold]{gigabytes(found.peak)}[/bold]")
    print_table(table, console)
    for line in cost_lines(found, speed):
        console.print(line, highlight=False)
    if memory is not None:
        report_advice(found, memory, console, headroom)


def strategy(found: Plan) -> str:
    return "networks sharded (fsdp)" if found.divided else "every network on each GPU"


def report_advice(found: Plan, memory: float, console: Console, headroom: float = HEADROOM) -> None:
    usable = (1 - headroom) * memory - CONTEXT * found.gpu
    kept = f"{headroom:.0%} headroom" + (f" and {gigabytes(CONTEXT)} GB for the CUDA context" if found.gpu else "")
    sizes = f"{gigabytes(found.peak)} of {gigabytes(memory)} GB, of which {kept} leave {gigabytes(max(0, usable))}"
    console.print(f"It {'fits' if found.peak <= usable else 'does not fit'}: {sizes}.", highlight=False)
    if found.peak <= usable:
        return
    advice = advise(found, usable)
    table = Table("change", "GB per GPU", title="One change at a time")
    for lines, peak, exact in advice.tried:
        table.add_row("  ".join(lines), gigabytes(peak) if exact else f"more than {gigabytes(peak)}")
    print_table(table, console)
    if advice.lines is not None:
        console.print(f"Fits with these, at {gigabytes(advice.peak)} GB:", highlight=False)
        for line in advice.lines:
            console.print(f"  {line}", markup=False, highlight=False)
    elif advice.gpus is not None:
        console.print(
            f"All changes together take {gigabytes(advice.peak)} GB; with train.strategy=fsdp, "
            f"{advice.gpus} GPUs would hold it.",
            highlight=False,
        )
    else:
        console.print(
            f"All changes together take {gigabytes(advice.peak)} GB, and no number of GPUs would hold it: "
            "what cannot be sharded is too large. Make the samples smaller.",
            highlight=False,
        )
