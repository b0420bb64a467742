"""The teacher makes a sample's first steps and the student the rest (arXiv 2503.10637), with the exact teacher."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from fastgen.backbones.gaussian_mixture import AnalyticDenoiser, GaussianMixture, GaussianMixtureConfig, build_mixture
from fastgen.batch import Conditioning
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.config.stored import dump_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.evaluation import folders
from fastgen.metrics.mode_share import nearest_component
from fastgen.rollout import RolloutPolicy
from fastgen.run.export import export
from fastgen.sampling.original import with_teacher_first
from fastgen.sampling.sampler import Sampler, teacher_sampler
from fastgen.sampling.teacher_first import TeacherFirst, until
from fastgen.sampling.views import views
from fastgen.streaming.schedule import ChunkSchedule

MODES = GaussianMixtureConfig(
    means=((-1.5, 0.0), (1.5, 0.5), (0.0, 2.0)), stds=(0.2, 0.2, 0.2), weights=(2, 1, 1), classes=(0, 0, 1)
)
POLICY = RolloutPolicy((1.0, 0.4, 0.2))


class Collapsed(Denoiser):
    """The exact denoiser, except in pure noise, where it answers with the first mode alone."""

    def __init__(self, exact: AnalyticDenoiser):
        super().__init__(nn.Identity(), exact.schedule, "sample")
        self.exact = exact

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        one = self.exact.mixture.means[0].to(x_t).expand_as(x_t)
        return torch.where(t[:, None] > 0.99, one, self.exact(x_t, t, cond))


@pytest.fixture(scope="module")
def backbone() -> GaussianMixture:
    return GaussianMixture(MODES, torch.device("cpu"), torch.float64, 0)


def pair(backbone: GaussianMixture, policy: RolloutPolicy = POLICY) -> tuple[Sampler, Sampler]:
    """A collapsed student, and its exact teacher."""
    teacher = teacher_sampler(backbone, 20, 1.0)
    return Sampler(backbone, Collapsed(teacher.denoiser), policy), teacher  # type: ignore[arg-type]


def draw(sampler: Sampler, count: int = 400) -> Tensor:
    return sampler.sample(["0"] * count, range(count))


def shares(points: Tensor) -> Tensor:
    """Of the three modes; label 0 has the first two, in the ratio 2 to 1."""
    return torch.bincount(nearest_component(build_mixture(MODES), points), minlength=3) / len(points)


def test_no_step_is_the_student_and_all_are_the_teacher(backbone: GaussianMixture) -> None:
    student, teacher = pair(backbone)
    assert torch.equal(draw(TeacherFirst(student, teacher, 0)), draw(student))
    guided = Sampler(backbone, teacher.denoiser, teacher.policy, 3.0)
    assert torch.equal(draw(TeacherFirst(student, guided, 3)), draw(guided))
    assert not torch.equal(draw(guided), draw(teacher))


def test_an_ode_student_that_is_its_teacher_changes_nothing(backbone: GaussianMixture) -> None:
    """The state goes over at the student's own level, without a jump."""
    teacher = teacher_sampler(backbone, 4, 1.0)
    for first in (1, 2, 3):
        split = TeacherFirst(teacher, teacher, first)
        assert split.network_evaluations == 4 and torch.allclose(draw(split), draw(teacher), atol=1e-6)


def test_the_teachers_first_step_gives_the_modes_back(backbone: GaussianMixture) -> None:
    student, teacher = pair(backbone)
    assert shares(draw(student))[0] > 0.95
    split = TeacherFirst(student, teacher, 1)
    assert shares(draw(split)).sub(torch.tensor([2 / 3, 1 / 3, 0])).abs().max() < 0.05
    assert split.network_evaluations == 12 + 2  # at 1, 0.95, ..., 0.45, and the student at 0.4 and 0.2


def test_the_last_step_is_cut_at_the_students_level() -> None:
    teacher = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode")
    assert until(teacher, 0.6).timesteps == (1.0, 0.75) and until(teacher, 0.6).final_level == 0.6
    assert until(teacher, 0.5).timesteps == (1.0, 0.75)  # no step of length 0
    with pytest.raises(ValueError, match="begins at level"):
        until(dataclasses.replace(teacher, timesteps=(0.5,)), 0.6)


def test_what_cannot_be_is_refused(backbone: GaussianMixture) -> None:
    student, teacher = pair(backbone)
    with pytest.raises(ValueError, match="first 4 steps of a student that has 3"):
        TeacherFirst(student, teacher, 4)
    chunks = dataclasses.replace(POLICY, chunks=ChunkSchedule(frames=1))
    with pytest.raises(ValueError, match="chunk by chunk"):
        TeacherFirst(*pair(backbone, chunks), 1)


def test_views_are_the_clean_predictions_of_each_step(backbone: GaussianMixture) -> None:
    """Those of the collapsed student begin at one mode; with the teacher first they do not. The last is the sample."""
    student, teacher = pair(backbone)
    split = TeacherFirst(student, teacher, 1)
    levels, seen = views(student, ["0"] * 6, range(6))
    assert levels == list(POLICY.timesteps) and torch.equal(seen[-1], draw(student, 6))
    assert torch.allclose(seen[0], torch.tensor(MODES.means[0]).expand(6, 2))
    levels, seen = views(split, ["0"] * 6, range(6))
    assert levels == [*split.teacher.policy.timesteps, 0.4, 0.2] and seen.shape == (len(levels), 6, 2)
    assert torch.equal(seen[-1], draw(split, 6)) and not student.denoiser._forward_hooks
    assert torch.equal(
        views(Sampler(backbone, teacher.denoiser, POLICY, 3.0), ["0"], [0])[1][-1],
        draw(Sampler(backbone, teacher.denoiser, POLICY, 3.0), 1),
    )


def test_the_sample_command_writes_views(project: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(project / "assets/teachers/digits"), "--prompt", "a handwritten three"]
    arguments += ["--num-images", "2", "--num-steps", "3", "--views", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out/views.png") as strip, Image.open(tmp_path / "out/00000.png") as one:
        assert strip.width > 2.5 * one.width and strip.height > 2 * one.height


@pytest.mark.slow
def test_eval_and_sample_of_a_run(tmp_path: Path, project: Path) -> None:
    """Rows say who made the first step; the commands refuse what has no teacher."""
    changes = ["backbone.fit_steps=5", "eval.num_samples=100", "eval.metrics=[energy_distance]"]
    recipe = load_recipe(project / "recipes/mixture_dmd2_4step.yaml", changes)
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    export(backbone.load("student"), backbone, recipe, run / "export", 0)
    rows = [
        folders.evaluate_path(run, device="cpu", progress=False, teacher_first=first, teacher_steps=(40,))
        for first in (1, 4)
    ]
    assert [row["name"] for row in rows] == ["run, teacher first 1", "run, teacher first 4"]
    assert rows[0]["teacher_first"]["student_steps"] == 1 and len(rows[0]["teacher_first"]["timesteps"]) < 40
    assert rows[0]["teacher_first"]["guidance_scale"] == recipe.teacher_guidance
    assert rows[1]["metrics"]["energy_distance"] < rows[0]["metrics"]["energy_distance"]  # the student has not trained

    options = ["--num-images", "4", "--teacher-first", "4", "--teacher-steps", "7"]
    done = CliRunner().invoke(app, ["sample", str(run), *options, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0 and (tmp_path / "out/points.safetensors").is_file(), done.output
    without = CliRunner().invoke(app, ["sample", str(run), "--teacher-steps", "7", "--output", str(tmp_path / "no")])
    assert without.exit_code == 2 and "say how many it makes" in without.output
    with pytest.raises(ValueError, match="was not distilled"):
        with_teacher_first(project / "assets/teachers/digits", teacher_sampler(backbone, 4, 1.0), 1, None, None)
