"""The text of a first recipe, with a comment for every choice."""

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from fastgen.starting.facts import Facts, Wishes
from fastgen.starting.shipped import modeline

BETWEEN = {
    "renoise": "Between steps the student's clean prediction is noised again.",
    "ode": "From step to step the student follows its own ODE.",
    "cps": "Between steps a share of the noise is drawn again, and the rest is kept.",
}


def written(wishes: Wishes, facts: Facts, values: Mapping[str, Any], peak: int) -> str:
    """The recipe with its comments. peak: bytes on one GPU, by the plan."""
    said, lines = reasons(wishes, facts, values, peak), comment(headline(wishes, facts))
    lines.append(modeline())
    for key, value in values.items():
        lines += comment(said[key]) if key in said else []
        lines.append(section(key, value))
    return "\n".join(lines) + "\n"


def headline(wishes: Wishes, facts: Facts) -> str:
    steps = "one step" if wishes.steps == 1 else f"{wishes.steps} steps"
    return (
        f"Distils {wishes.pipeline} ({facts.parameters / 1e6:,.0f} million parameters) to {steps} with "
        f"{wishes.objective}. `fastgen new` wrote it, and nobody has run it; look at samples/teacher.png before "
        "anything else, and at the samples of the first 200 updates before a long run."
    )


def reasons(wishes: Wishes, facts: Facts, values: Mapping[str, Any], peak: int) -> dict[str, str]:
    """section -> why it is as it is. peak: bytes on one GPU, by the plan."""
    tuned = f"recipes/digits_{wishes.objective}_4step.yaml, where they were tuned on a network of 2 million parameters"
    uniform = "The levels of noise at which the student works are uniform"
    shift = uniform if facts.shift == 1 else f"{uniform} ones, shifted by the teacher's {facts.shift:g}"
    data = (
        "These 64 sentences ship with fastgen. A student is only as good as its prompts: give a file with those that "
        "will be asked for, thousands if you can, one on each line."
        if values["data"].get("prompts") == "neutral"
        else "What the student trains on."
    )
    guided = facts.guidance != 1 and "guidance_scale" in values["objective"]
    own = "that of the pipeline's own card" if facts.recommended else "that of the pipeline's own call"
    source = own if wishes.guidance is None else "the one that was asked for"
    guidance = f"The teacher's guidance, {facts.guidance:g}, is {source}; " if guided else ""
    clip = "clip" in values["eval"]
    features = "CLIP's features" if clip else "the latents of its VAE, which needs no download"
    quality = (
        f"fid compares with the teacher's own samples of the same prompts, in {features}."
        if facts.config.output == "pixels"
        else "Videos have no reference here; add video_reward with its weights to measure quality."
    )
    found = {
        "rollout": f"{shift}. {BETWEEN[values['rollout']['transition']]}",
        "data": data,
        "objective": (
            f"{guidance}{'the' if guided else 'The'} other values are those of {tuned}"
            f"{', without its conditioning on the step' if facts.large else ''}"
            f"{', and with one adapter for all phases' if values['objective'].get('experts') is False else ''}."
        ),
        "optimizers": (
            "Learning rate, rank and alpha of adapters are those of DMD2's for SDXL (tianweiy/DMD2, experiments/). "
            f"Another role has the values of {tuned}."
            if "lora" in values
            else f"As in {tuned}."
        ),
        "eval": f"The teacher is measured at {facts.steps} steps and at the student's number. {quality}",
    }
    if facts.large:
        images = values["train"]["batch_size"] * values["train"]["accumulate"] * wishes.gpus
        found["train"] = (
            f"{images} samples an update, on {wishes.gpus} GPU{'s' * (wishes.gpus > 1)}, with {peak / 1e9:.1f} GB on "
            "each by `fastgen plan`. 5,000 updates are ours: end the run when its samples stop getting better."
        )
    return found


def comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 117)]


def section(key: str, value: Any) -> str:
    """One section as YAML. Its values are in one line each."""
    if not isinstance(value, dict) or len(inline(value)) < 90:
        return f"{key}: {inline(value)}"
    return "\n".join([f"{key}:", *(f"  {name}: {inline(part)}" for name, part in value.items())])


def inline(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip()
    )
