"""DiT: the stock pipeline's own pixels, classes as prompts, roles, exports, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.pipelines.dit import pipeline_dit
from diffusers.schedulers import scheduling_lcm
from role_turns import check_turns
from tiny_dit import LABELS, tiny_dit
from tiny_families import draws
from torch import Tensor

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.dit import DiT, DiTConfig
from fastgen.batch import Batch
from fastgen.config import load_recipe
from fastgen.denoiser import Inputs
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, teacher_sampler

PROMPTS, CLASSES, SEEDS = ["golden retriever", "goldfish"], [207, 1], [3, 1]
STORED = [((1.0, 0.75, 0.5, 0.25), "renoise"), ((1.0, 0.5), "ode"), ((0.4,), "renoise")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dit(tmp_path_factory.mktemp("dit"))


def make(folder: Path, roles: RoleOptions | None = None, **options: Any) -> DiT:
    config = DiTConfig(path=str(folder), **options)
    config.check()
    return config.build(torch.device("cpu"), torch.float32, 0, roles or RoleOptions())


@pytest.fixture(scope="module")
def backbone(folder: Path) -> DiT:
    return make(folder)


def plain_pixels(
    folder: Path, backbone: DiT, steps: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[float]]:
    """What a user's own call gives for our noise, and the levels at which it called the network."""
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    initial: Any = draws(backbone, "initial")  # type: ignore[arg-type]
    fresh = iter([draws(backbone, f"step{i}") for i in range(1, steps + 1)])  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: initial)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    visited: list[float] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, given: visited.append(float(given["timestep"][0] + 1) / 1000), with_kwargs=True
    )
    images = pipeline(CLASSES, guidance_scale=scale, num_inference_steps=steps, output_type="np").images
    assert pipeline.get_label_ids(PROMPTS) == CLASSES
    return torch.from_numpy(images).permute(0, 3, 1, 2), visited


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (4, 1.0), (5, 3.0)])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pixels(
    folder: Path, backbone: DiT, steps: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = teacher_sampler(backbone, steps, scale).sample(PROMPTS, SEEDS)
    theirs, visited = plain_pixels(folder, backbone, steps, scale, monkeypatch)
    assert visited == pytest.approx(list(backbone.teacher_policy(steps).timesteps))
    difference = float((ours - theirs).abs().max())
    print(f"{steps} steps, scale {scale}: {difference:.2g}")
    assert ours.std() > 0.02 and difference < 1e-4


@pytest.mark.parametrize(("timesteps", "transition"), STORED)
def test_an_export_reloads_and_its_plain_call_visits_the_stored_levels(
    backbone: DiT, tmp_path: Path, timesteps: tuple[float, ...], transition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = RolloutPolicy(timesteps, transition)
    backbone.config.check_export(policy)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS)
    again = make(tmp_path)
    assert torch.equal(ours, Sampler(again, again.load_exported(tmp_path), policy).sample(PROMPTS, SEEDS))
    theirs, visited = plain_pixels(tmp_path, backbone, len(timesteps), 1.0, monkeypatch)
    assert visited == pytest.approx(list(timesteps))
    assert float((ours - theirs).abs().max()) < 1e-4
    assert "pipeline(classes)` alone would use 50 steps" in backbone.plain_call(policy, False)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_turn_of_each_role_moves_its_weights_and_no_others(folder: Path, adapters: bool) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone: Any = make(folder, roles)
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=2.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = backbone.encode_both(PROMPTS)
    assert cond["label"].tolist() == CLASSES and uncond["label"].tolist() == [1000, 1000]
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


def test_a_trained_network_drops_no_labels_and_recomputing_changes_no_gradient(backbone: DiT) -> None:
    student, teacher = backbone.load("student"), backbone.load("teacher")
    assert student.training and not teacher.training
    cond, t = backbone.encode_prompts(PROMPTS * 16), torch.rand(32)
    x, found = torch.randn(32, *backbone.latent_shape), []
    for _ in range(2):
        student.zero_grad()
        output = student(x, t, cond)
        assert torch.allclose(output, teacher(x, t, cond), atol=1e-6)
        output.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        student.enable_checkpointing()
    assert torch.equal(*found)
    assert not torch.allclose(output, student(x, t, backbone.encode_prompts([""] * 32)), atol=1e-3)


def test_a_prompt_is_a_name_a_label_or_a_number(folder: Path, backbone: DiT) -> None:
    prompts = ["Tinca tinca", "tench, Tinca tinca", "golden retriever", "999", ""]
    assert backbone.encode_prompts(prompts)["label"].tolist() == [0, 0, 207, 999, 1000]
    assert DiTPipeline.from_pretrained(folder).labels.keys() == {
        n.strip() for v in LABELS.values() for n in v.split(",")
    }
    for wrong, words in (("goldfsh", "did you mean 'goldfish'"), ("1000", "0 to 999"), ("a red cat", "is no class")):
        with pytest.raises(ValueError, match=words):
            backbone.config.check_prompts(["goldfish", wrong])


def test_added_inputs_are_refused_in_words(backbone: DiT) -> None:
    student = backbone.load("student")
    with pytest.raises(ValueError, match="no added inputs"):
        student.add_inputs({"stop": 4}, backbone.time_dim)
    with pytest.raises(ValueError, match="takes no extra inputs"):
        student(
            torch.randn(1, *backbone.latent_shape),
            torch.ones(1),
            backbone.encode_prompts(["1"]),
            Inputs(s=torch.zeros(1)),
        )


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("transformer/config.json", "num_embeds_ada_norm", 10, "null class is 1000"),
        (
            "model_index.json",
            "scheduler",
            ["diffusers", "EulerDiscreteScheduler"],
            "make the scheduler a DDIMScheduler",
        ),
        ("model_index.json", "transformer", ["diffusers", "SD3Transformer2DModel"], "needs a DiTTransformer2DModel"),
    ],
)
def test_a_pipeline_that_the_stock_call_would_not_sample_so_is_refused(
    tmp_path: Path, file: str, key: str, value: object, words: str
) -> None:
    path = tiny_dit(tmp_path) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    if file == "model_index.json" and key == "scheduler":
        DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=words):
        make(tmp_path)


def test_what_its_call_has_not_is_refused(folder: Path) -> None:
    for options, words in (({"negative_prompt": "goldfish"}, "null class"), ({"resolution": 64}, "32 x 32 only")):
        with pytest.raises(ValueError, match=words):
            make(folder, **options)
    with pytest.raises(ValueError, match="no eta"):
        make(folder).config.check_export(RolloutPolicy((1.0, 0.5), "tcd", eta=0.3))


def test_a_recipe_with_a_wrong_label_or_an_added_input_is_refused_before_weights_load(
    folder: Path, project: Path
) -> None:
    given = [f"backbone.path={folder}", "data.prompts=['207', goldfsh]", "eval.prompts=[tenhc]"]
    with pytest.raises(RecipeError) as error:
        load_recipe(project / "recipes/dit_xl_256_dmd2_1step.yaml", given)
    assert "data: prompt 'goldfsh'" in str(error.value) and "eval.prompts: prompt 'tenhc'" in str(error.value)
    assert "did you mean 'tench'" in str(error.value)
    given = [f"backbone.path={folder}", "objective.condition_on_stop=true"]
    with pytest.raises(RecipeError, match=r"objective.condition_on_stop: .*dit take no added inputs"):
        load_recipe(project / "recipes/dit_xl_256_dmd2_1step.yaml", given)
