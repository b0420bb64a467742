"""The training loop with objectives that keep copies of the student, freeze a part of it, or draw its number of steps:
they train and resume."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from variants import mostly_slow

from fastgen.config import load_recipe
from fastgen.run.checkpoint import complete
from fastgen.sampling.sampler import load_sampler
from fastgen.train import train

ROOT = Path(__file__).parents[1]
SMALL = [
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.fit_steps=5",
    "backbone.fit_batch_size=32",
    "train.batch_size=8",
    "train.accumulate=2",
    "train.log_every=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "train.checkpoint_every=2",
    "eval.teacher_steps=[2]",
    "eval.num_samples=20",
    "eval.quick_num_samples=20",
    "eval.batch_size=20",
    "optimizers.student.decay=constant",
]
LOOPS: Mapping[str, list[str]] = {
    "mixture_tdm_4step": ["optimizers.fake_score.decay=constant"],
    "mixture_cdm_4step": [
        "objective.ida_decay=0.9",
        "objective.off_warmup=3",
        "optimizers.fake_score.decay=constant",
    ],
    "mixture_self_e_4step": ["objective.fake.start=2", "optimizers.fake_score.decay=constant"],
    "mixture_mdt_4step": [],
    "mixture_ctm_4step": ["objective.gan={weight: 0.1}", "optimizers.discriminator={lr: 1e-3}"],
    "mixture_tcm_2step": ["objective.truncation.begin=1"],
    "mixture_reflow_4step": ["objective.stage=distill", "objective.guide={}", "rollout.timesteps=[1.0]"],
    "mixture_progressive_4step": ["objective.stages=2", "objective.stage_updates=[2, 2]"],
    "mixture_gdd_1step": [
        "objective.freeze=[blocks]",
        "objective.r1_every=3",
        "optimizers.discriminator.decay=constant",
    ],
    "mixture_flash_dmd_4step": [
        "objective.ida_decay=0.9",
        "optimizers.discriminator.decay=constant",
        "optimizers.fake_score.decay=constant",
    ],
}


QUICKLY = ("mixture_tdm_4step", "mixture_flash_dmd_4step")


@pytest.mark.parametrize("name", mostly_slow(LOOPS, QUICKLY))
def test_four_updates_are_two_and_two(name: str, tmp_path: Path) -> None:
    """To the bit, copies and counters included."""

    def run(folder: str, steps: int) -> Path:
        overrides = [*SMALL, *LOOPS[name], f"output_dir={tmp_path / folder}", f"train.steps={steps}"]
        return train(load_recipe(ROOT / f"recipes/{name}.yaml", overrides))

    whole = run("whole", 4)
    assert (whole / "export/fastgen.json").is_file()
    if "progressive" in name:  # its stages fill the run, so that a shorter one is refused
        return
    run("parts", 2)
    parts = run("parts", 4)
    a, b = (complete(folder / "checkpoints")[-1] for folder in (whole, parts))
    files = sorted(f.name for f in a.glob("*.safetensors"))
    assert "objective.safetensors" in files or "mdt" in name
    for file in files:
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one), file
    if "tdm" in name:  # student and fake score are told the number of steps
        roles = (load_file(a / f"{role}.safetensors") for role in ("student", "fake_score"))
        assert all(any("num_steps" in key for key in weights) for weights in roles)
    if "tdm" in name or "cdm" in name:
        check_step_counts(whole)


def check_step_counts(run: Path) -> None:
    """The export makes 1, 2 and 4 steps, and no others."""
    for count in (1, 2, 4):
        sampler = load_sampler(run, num_steps=count)
        assert sampler.policy.num_steps == count and sampler.sample([""] * 4, range(4)).isfinite().all()
    with pytest.raises(ValueError, match="distilled to 1 or 2 or 4 steps"):
        load_sampler(run, num_steps=3)


def test_frozen_parameters_of_a_run_keep_the_values_that_it_began_with(tmp_path: Path) -> None:
    found = []
    for steps in (1, 3):
        ends = ["objective.freeze=[blocks]", f"output_dir={tmp_path / str(steps)}", f"train.steps={steps}"]
        folder = train(load_recipe(ROOT / "recipes/mixture_gdd_1step.yaml", [*SMALL, *ends]))
        found.append(load_file(folder / "export/model.safetensors"))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]) == ("blocks" in name), name
