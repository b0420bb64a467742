"""`fastgen objectives`: what each objective needs, trains, gives and costs.

Nothing is listed here by hand. The answers are those of instances of the class (`Objective.examples`): the fields of a
batch that they need, the roles that they train, and what probing.py sees them do."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from fastgen.objectives.base import Objective
from fastgen.registry import OBJECTIVES, build_section, resolve
from fastgen.starting.pages import first_paragraph
from fastgen.starting.probing import CHUNKS, JUMPING_CHUNKS, JUMPS, ONE_STEP, STEPWISE, Probe, accepts, samplers, steps

DATA = {"latents": "pictures or videos", "pixels": "pictures or videos", "pairs": "ODE pairs"}
USES = {"none": "no", "score": "any", "gradient": "differentiable"}


@dataclasses.dataclass(frozen=True)
class Summary:
    """A row of the table.

    networks: those of the teacher's size that a run holds: student, teacher, moving average and others.
    sampler: transitions of the student's sampler (`rollout.transition`), and jumps (`rollout.two_time`).
    evaluations: of networks for a sample in an update of a four-step student, with a guided teacher, by role.
    page: the document that says more, or the command that prints the docstring."""

    name: str
    does: str
    needs: str
    gan: str
    rewards: str
    trains: tuple[str, ...]
    networks: int
    steps: str
    sampler: tuple[str, ...]
    export: str
    evaluations: Mapping[str, float]
    page: str


def summary(name: str) -> Summary:
    """Of a name in OBJECTIVES, or of my_module:MyObjective. Raises RecipeError for an unknown name."""
    cls: type[Objective] = resolve("objective", name, OBJECTIVES, Objective)
    examples = [
        (keys, build_section("objective", {"name": name, **keys}, OBJECTIVES, Objective)) for keys in cls.examples
    ]
    usual = examples[0][1]
    probe = Probe(usual)
    return Summary(
        name=name,
        does=first_paragraph(cls),
        needs=answers(examples, needs),
        gan=answers(examples, gan),
        rewards=answers(examples, lambda objective: USES[objective.reward_use]),
        trains=usual.trained_roles,
        networks=probe.networks_held,
        steps=steps([objective for _, objective in examples]),
        sampler=samplers(usual),
        export=export(probe, [objective for _, objective in examples]),
        evaluations=probe.evaluations,
        page=cls.page or f"fastgen objectives {name}",
    )


def answers(examples: list[tuple[Mapping[str, Any], Objective]], ask: Callable[[Objective], str]) -> str:
    """What the usual instance answers; then each other answer, with the keys that change it."""
    usual = ask(examples[0][1])
    others: dict[str, list[str]] = {}
    for keys, objective in examples[1:]:
        if (answer := ask(objective)) != usual:
            changed = [shown(key, value) for key, value in keys.items() if examples[0][0].get(key) != value]
            others.setdefault(answer, []).append(", ".join(changed))
    return "; ".join([usual, *(f"{answer} with {' or with '.join(keys)}" for answer, keys in others.items())])


def shown(key: str, value: object) -> str:
    """A word says what it chooses; of a number or a section, only that it is given matters."""
    return f"{key}: {value}" if isinstance(value, str) or (isinstance(value, int) and value != 1) else key


def needs(objective: Objective) -> str:
    return ", ".join({DATA[field]: None for field in sorted(objective.needs)}) or "prompts"


def gan(objective: Objective) -> str:
    return "yes" if any("discriminator" in role for role in objective.trained_roles) else "no"


def export(probe: Probe, objectives: Sequence[Objective]) -> str:
    """What the folder of an exported student is to diffusers, for every instance of the objective's class."""
    several = f", {probe.experts} experts" if probe.experts > 1 else ""
    forms = {
        f"stock pipeline{several}": [*STEPWISE.values(), ONE_STEP[0]],
        "flow map pipeline": [JUMPS],
        "streaming pipeline": [CHUNKS, JUMPING_CHUNKS],
    }
    return ", ".join(
        form for form, policies in forms.items() if any(accepts(o, policy) for o in objectives for policy in policies)
    )


COLUMNS: dict[str, Callable[[Summary], str]] = {
    "objective": lambda row: row.name,
    "needs": lambda row: row.needs,
    "GAN": lambda row: row.gan,
    "rewards": lambda row: row.rewards,
    "trains": lambda row: ", ".join(row.trains),
    "networks held": lambda row: str(row.networks),
    "steps": lambda row: row.steps,
    "sampler": lambda row: ", ".join(row.sampler),
    "export": lambda row: row.export,
    "evaluations": lambda row: f"{sum(row.evaluations.values()):.3g}",
    "page": lambda row: row.page,
}


def as_rows(summaries: list[Summary]) -> list[list[str]]:
    return [[cell(row) for cell in COLUMNS.values()] for row in summaries]


def as_table(summaries: list[Summary]) -> Table:
    table = Table(*COLUMNS)
    for row in as_rows(summaries):
        table.add_row(*row)
    return table


def as_json(summaries: list[Summary]) -> str:
    return json.dumps([dataclasses.asdict(row) for row in summaries], indent=1)
