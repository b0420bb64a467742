"""Roles as adapters on one base: gradients survive the switch, the base never moves, exports load in diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from exported_students import DMD2
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone, RoleOptions
from fastgen.backbones.sd import SDConfig
from fastgen.config import load_recipe
from fastgen.denoiser import Inputs
from fastgen.modules.lora import LoraConfig, LoraDenoiser, SharedBase
from fastgen.modules.sharding import gathered
from fastgen.networks import frozen
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.run import checkpoint
from fastgen.run.export import export_run
from fastgen.sampling.sampler import load_sampler
from fastgen.train import train

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
SHAPE = (2, 8, 8)
PROMPTS, SEEDS = ["a handwritten three", "the digit eight"], [3, 1]
BOTH = "lora={student: {rank: 4}, fake_score: {rank: 2, alpha: 4}}"
SMALL = [
    "train.steps=2",
    "train.batch_size=2",
    "train.accumulate=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "train.num_samples=4",
    "train.checkpoint_every=1",
    "objective.fake_updates=2",
    "health.num_samples=4",
    "eval.quick_num_samples=20",
    "eval.teacher_steps=[2]",
    "eval.metrics=[throughput]",
]


def digits(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [*SMALL, BOTH, f"output_dir={folder}", *overrides])


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    recipe = digits(tmp_path)
    return recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions(recipe.lora))


def trained_adapter(backbone: Backbone, role: str) -> LoraDenoiser:
    """An adapter that is no longer at its start."""
    denoiser = backbone.load(role)
    assert isinstance(denoiser, LoraDenoiser)
    for i, p in enumerate(denoiser.parameters()):
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
    return denoiser


def example(backbone: Backbone) -> tuple[Tensor, Tensor, object]:
    x_t = noise.normal(torch.arange(2), backbone.latent_shape, 1)
    return x_t, torch.tensor([0.5, 0.9]), backbone.encode_prompts(PROMPTS)


def test_an_adapter_starts_at_the_teacher(backbone: Backbone) -> None:
    x_t, t, cond = example(backbone)
    teacher = backbone.load("teacher")
    assert torch.equal(backbone.load("student")(x_t, t, cond), teacher(x_t, t, cond))
    assert not list(teacher.parameters())
    moved = trained_adapter(backbone, "student")(x_t, t, cond)
    assert not torch.equal(moved, teacher(x_t, t, cond))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_survive_a_switch_between_forward_and_backward(backbone: Backbone, checkpointing: bool) -> None:
    """The forward is the student's; before its backward pass the other roles have run. With activation checkpointing
    the student's forward is repeated when another adapter is on, and while the fake score is no longer frozen."""
    x_t, t, cond = example(backbone)
    student, fake = trained_adapter(backbone, "student"), trained_adapter(backbone, "fake_score")
    teacher = backbone.load("teacher")

    def gradients(switch: bool) -> list[Tensor]:
        x0 = student(x_t, t, cond)
        with frozen(fake):
            total = fake(x0, t, cond).square().mean()
        if switch:
            fake(x_t, t, cond), teacher(x_t, t, cond)
        total.backward()
        assert all(p.grad is None for p in fake.parameters())
        result = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        for p in student.parameters():
            p.grad = None
        return result

    expected = gradients(switch=False)
    assert len(expected) == len(list(student.parameters()))
    assert all(p.requires_grad for role in (student, fake) for p in role.parameters())
    if checkpointing:
        student.enable_checkpointing()
    for ours, theirs in zip(gradients(switch=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


def test_a_role_with_a_further_input_leaves_the_others_alone(backbone: Backbone) -> None:
    """The fake score is told the stop index; teacher and student are not, and run as before."""
    x_t, t, cond = example(backbone)
    fake, teacher = backbone.load("fake_score"), backbone.load("teacher")
    before = teacher(x_t, t, cond)
    fake.add_inputs({"stop": 4}, backbone.time_dim)
    told = Inputs(stop=torch.tensor([0, 3]))
    assert torch.equal(fake(x_t, t, cond, told), before)
    table = dict(fake.named_parameters())["inputs.stop.weight"]
    torch.nn.init.ones_(table)
    assert not torch.allclose(fake(x_t, t, cond, told), before)
    assert torch.equal(teacher(x_t, t, cond), before)
    with pytest.raises(ValueError, match="extra inputs"):
        fake(x_t, t, cond)


@pytest.mark.slow
def test_a_run_moves_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    folder = train(digits(tmp_path / "run"))
    first, last = checkpoint.complete(folder / "checkpoints")
    for role in ("student", "fake_score", "ema"):
        before, after = (load_file(c / f"{role}.safetensors") for c in (first, last))
        assert before.keys() == after.keys()
        assert all(".lora_" in name or name == "inputs.stop.weight" for name in after)
        still = [name for name in after if ".lora_A." not in name and torch.equal(before[name], after[name])]
        assert len(still) == 1 and "add_q_proj" in still[0], still  # the last block drops its context's output
    assert not (last / "teacher.safetensors").exists()
    exported = load_file(folder / "export/pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.transformer_blocks.") for name in exported)


def plain_pixels(pipeline: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The stock call, with our noise in place of the scheduler's own."""
    pipeline.set_progress_bar_config(disable=True)
    names = ("step1", "step2", "step3", "step4")  # the last one is drawn and not used
    fresh = iter([noise.normal(torch.tensor(SEEDS), SHAPE, noise.make_key("sample", name)) for name in names])
    with monkeypatch.context() as patch:
        patch.setattr(
            scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(fresh), raising=False
        )
        patch.setattr(torch, "randn_like", lambda *_, **__: next(fresh))
        images = pipeline(
            PROMPTS,
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="np",
            latents=noise.normal(torch.tensor(SEEDS), SHAPE, noise.make_key("sample", "initial")),
        ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_the_export_is_a_lora_that_plain_diffusers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha 8 at rank 4: the factor of 2 must arrive. The merged export gives the same pixels."""
    recipe = digits(tmp_path / "run", "lora.student.alpha=8", "optimizers.student.lr=1e-2")
    folder = train(recipe)
    ours = load_sampler(folder).sample(PROMPTS, SEEDS)
    lora = StableDiffusion3Pipeline.from_pretrained(TEACHER)
    lora.load_lora_weights(folder / "export")
    lora.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "export", subfolder="scheduler")
    merged_folder = export_run(folder, tmp_path / "merged", merge=True)
    merged = StableDiffusion3Pipeline.from_pretrained(merged_folder)
    teacher = StableDiffusion3Pipeline.from_pretrained(TEACHER, scheduler=lora.scheduler)
    errors = [(plain_pixels(p, monkeypatch) - ours).abs().max().item() for p in (lora, merged, teacher)]
    print(f"largest pixel difference: loaded {errors[0]:.2g}, merged {errors[1]:.2g}, no adapter {errors[2]:.2g}")
    assert errors[0] < 1e-4 and errors[1] < 1e-4 < 1e-3 < errors[2]
    again = load_sampler(merged_folder).sample(PROMPTS, SEEDS)
    assert (again - ours).abs().max() < 1e-4
    card = (folder / "export/README.md").read_text()
    assert "load_lora_weights" in card and "FlowMatchEulerDiscreteScheduler" in card


@pytest.mark.slow
def test_the_shared_base_may_be_stored_in_half_the_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is bfloat16 and the role table says so; adapters, moments and average stay float32 and finite."""
    half = ["train.frozen_dtype=bfloat16", "train.mixed_precision=bf16"]
    folder = train(digits(tmp_path / "run", *half))
    printed = capsys.readouterr().out
    assert "bfloat16" in printed and "teacher" in printed
    for file in checkpoint.complete(folder / "checkpoints")[-1].glob("*.safetensors"):
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in load_file(file).values()), file.name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora={studnet: {rank: 4}}"], "did you mean 'student'"),
        (["lora={student: {ranks: 4}}"], r"unknown key lora\.student\.ranks; did you mean 'rank'"),
        (["lora={student: {rank: 0}}"], r"lora\.student\.rank"),
        (["lora={discriminator: {rank: 4}}"], r"lora\.discriminator"),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        digits(tmp_path, *overrides)


def test_a_target_that_matches_nothing_is_named(backbone: Backbone) -> None:
    backbone.load("teacher")
    assert backbone.shared is not None
    with pytest.raises(ValueError, match="'to_quack'"):
        backbone.shared.add("other", LoraConfig(targets=("to_q", "to_quack")))


def test_targets_may_be_convolutions(tmp_path: Path) -> None:
    """A is k x k and B 1 x 1, as in peft. The adapter starts at the teacher, gets gradients everywhere, and its merge,
    by peft and tensor by tensor, is the same network. By default only linear layers have adapters."""
    folder, config = tiny_sd(tmp_path / "sd"), LoraConfig(rank=2, alpha=6, targets=(*DMD2, "conv_in"))
    built = SDConfig(str(folder)).build(torch.device("cpu"), torch.float32, 0, RoleOptions({"student": config}))
    student, teacher = built.load("student"), built.load("teacher")
    student.reset(0)
    shapes = {name: tuple(p.shape) for name, p in student.named_parameters()}
    assert shapes["network.conv_in.lora_A.weight"] == (2, 4, 3, 3)
    assert shapes["network.conv_in.lora_B.weight"] == (8, 2, 1, 1)
    x_t, t, cond = noise.normal(torch.arange(2), built.latent_shape, 1), torch.tensor([0.5, 0.9]), built.encode_prompts
    example = (x_t, t, cond(["a red cat", "b"]))
    assert torch.equal(student(*example), teacher(*example))
    for name, p in student.named_parameters():  # drawn in +- 1 / sqrt(number of inputs)
        if ".lora_A." in name:
            bound = p[0].numel() ** -0.5
            assert bound / 2 < p.abs().max() <= bound, name
    for i, p in enumerate(student.parameters()):
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
    moved = student(*example)
    moved.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    merged = student.merged()(*example)
    built.save_values(student, gathered(student), RolloutPolicy((1.0, 0.5)), tmp_path / "whole", whole=True)
    stored = built.load_exported(tmp_path / "whole")(*example)
    errors = [(other - moved).abs().max().item() for other in (merged, stored, teacher(*example))]
    print(
        "largest difference of the merge of peft {:.1e}, of the stored one {:.1e}, of the base {:.1e}".format(*errors)
    )
    assert errors[0] < 1e-4 and errors[1] < 1e-4 < 1e-2 < errors[2]
    plain = SDConfig(str(folder)).build(
        torch.device("cpu"), torch.float32, 0, RoleOptions({"student": LoraConfig(rank=2)})
    )
    assert all(p.dim() == 2 for p in plain.load("student").parameters())


def test_a_convolution_whose_adapter_could_not_be_merged_is_refused(tmp_path: Path) -> None:
    built = SDConfig(str(tiny_sd(tmp_path / "sd"))).build(torch.device("cpu"), torch.float32, 0)
    denoiser = built.load("teacher")
    denoiser.network.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1, groups=2)
    with pytest.raises(ValueError, match=r"'conv_out' chooses network\.conv_out, a convolution with groups"):
        SharedBase(denoiser, ()).add("student", LoraConfig(targets=("conv_out",)))
