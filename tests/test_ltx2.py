"""LTX-2 against plain diffusers: the same pictures and the same sound, both ways; roles; adapters; and refusals."""

import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2Pipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from role_turns import check_turns
from tiny_ltx2 import tiny_ltx2
from torch import Tensor
from variants import slow

from fastgen import noise
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.ltx2 import LTX2Config
from fastgen.batch import Batch
from fastgen.config import build_recipe
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.planning.plan import plan
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.run.prepare import prepare
from fastgen.sampling.folder import sample_folder
from fastgen.sampling.sampler import Sampler, teacher_sampler

PROMPTS, NEGATIVE, SEEDS = ["a red cat", "two green dogs"], "grey", [3, 1]
SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
TOKENS, MOMENTS = 5 * 4 * 4, 9
PLAIN = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0}
PLAIN |= {"audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ltx2(tmp_path_factory.mktemp("ltx2"))


def make(folder: Path, roles: RoleOptions | None = None, **changes: Any) -> Any:
    config = LTX2Config(path=str(folder), **({"negative_prompt": NEGATIVE} | SIZE | changes))
    config.check()
    return config.build(CPU, torch.float32, 0, *([roles] if roles else []))


def draws(name: str) -> Tensor:
    return noise.normal(torch.tensor(SEEDS), (TOKENS + MOMENTS, 4), noise.make_key("sample", name))


def plain(folder: Path, steps: int, scale: float, **call: Any) -> tuple[Tensor, Tensor, list[float]]:
    """What a user's own call gives for our initial noise: pictures, sound and the levels at which it asked the
    network. The pipeline normalises a given sound."""
    pipeline = LTX2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    visited: list[float] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, given: visited.append(float(given["timestep"][0]) / 1000), with_kwargs=True
    )
    video, sound = draws("initial").split([TOKENS, MOMENTS], dim=1)
    vae = pipeline.audio_vae
    guided = {"negative_prompt": [NEGATIVE] * 2} if scale > 1 else {}
    frames, waves = pipeline(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=scale,
        audio_guidance_scale=scale,
        latents=video,
        audio_latents=sound * vae.latents_std + vae.latents_mean,
        return_dict=False,
        **({"output_type": "np"} | SIZE | PLAIN | guided | call),
    )
    return torch.as_tensor(frames), torch.as_tensor(waves), visited


def compared(sampler: Any, folder: Path, steps: int, scale: float) -> float:
    """The largest difference of pictures, of waveforms and of the sound's latents from the stock call's; the levels
    that it visited are those of the sampler."""
    backbone = sampler.backbone
    latents = sampler.latents(PROMPTS, SEEDS)
    frames, waves, visited = plain(folder, steps, scale)
    assert visited == pytest.approx(list(sampler.policy.timesteps), abs=1e-6)
    pictures = backbone.decode(latents)
    assert pictures.shape == (2, 9, 3, 32, 32) and pictures.std() > 0.01 and waves.std() > 1e-4
    sound = backbone.sound_of(latents)
    assert sound.shape == waves.shape
    return max(float((pictures - frames.movedim(-1, -3)).abs().max()), float((sound - waves).abs().max()))


@pytest.mark.parametrize(("steps", "scale"), [(4, 3.0), slow((2, 1.0))])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pictures_and_sound(
    folder: Path, steps: int, scale: float
) -> None:
    error = compared(teacher_sampler(make(folder), steps, scale), folder, steps, scale)
    print(f"{steps} steps: largest difference {error:.2g}")
    assert error < 1e-4


@pytest.mark.slow
def test_the_newer_networks_give_the_pipelines_own_pictures_and_sound(tmp_path: Path) -> None:
    """Those of 2.3: the level reaches the text, and the text of each part has a width of its own."""
    backbone = make(tiny_ltx2(tmp_path, newer=True))
    assert compared(teacher_sampler(backbone, 3, 3.0), tmp_path, 3, 3.0) < 1e-4
    cond, _ = backbone.encode_both(PROMPTS)
    assert {key: tuple(value.shape[1:]) for key, value in cond.items()} == backbone.prompt_shapes()


def test_the_latents_are_those_of_the_stock_call(folder: Path) -> None:
    """Before the VAEs: the tokens of the video and of the sound."""
    sampler = teacher_sampler(make(folder), 2, 1.0)
    ours = sampler.latents(PROMPTS, SEEDS)
    parts = sampler.backbone.sound_parts[0], sampler.backbone.vae
    video, sound, _ = plain(folder, 2, 1.0, output_type="latent")
    mine = ours[:, :TOKENS].unflatten(1, (5, 4, 4)).movedim(-1, 1)
    mean, std = (value[:, None, None, None] for value in (parts[1].latents_mean, parts[1].latents_std))
    assert float((mine * std + mean - video).abs().max()) < 1e-4
    waves = ours[:, TOKENS:] * parts[0].latents_std + parts[0].latents_mean
    assert float((waves.unflatten(2, (2, 2)).transpose(1, 2) - sound).abs().max()) < 1e-4


def test_samples_are_written_with_their_sound(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = teacher_sampler(make(folder), 2, 1.0)
    monkeypatch.setattr("fastgen.sampling.folder.load_sampler", lambda *_, **__: sampler)
    sample_folder(folder, PROMPTS[:1], None, 1, 3, tmp_path / "out", None, None, batch_size=1)
    expected = sampler.backbone.sound_of(sampler.latents(PROMPTS[:1], [3]))[0]
    with wave.open(str(tmp_path / "out/00000.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, expected.shape[1])
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
    assert (samples.view(-1, 2).mT / 32767 - expected.clamp(-1, 1)).abs().max() < 1e-4
    assert (tmp_path / "out/00000.mp4").is_file()
    index = sampler.backbone.components
    monkeypatch.setattr(sampler.backbone, "components", {**index, "vocoder": [None, None]}, raising=False)
    assert sampler.backbone.sound_of(sampler.latents(PROMPTS[:1], [3])) is None, "a folder without one has no sound"


def test_pictures_and_sound_hear_each_other_and_the_prompt(folder: Path) -> None:
    backbone = make(folder)
    teacher, t = backbone.load("teacher"), torch.tensor([0.6, 0.6])
    cond, uncond = backbone.encode_both(PROMPTS)
    x = draws("initial")
    first = teacher(x, t, cond)
    for changed, heard in ((slice(0, TOKENS), slice(TOKENS, None)), (slice(TOKENS, None), slice(0, TOKENS))):
        other = x.clone()
        other[:, changed] += 1
        assert float((teacher(other, t, cond) - first)[:, heard].abs().max()) > 1e-3
    change = (teacher(x, t, uncond) - first).abs()
    assert float(change[:, :TOKENS].max()) > 1e-3 and float(change[:, TOKENS:].max()) > 1e-3


@pytest.mark.parametrize(
    "policy", [RolloutPolicy((1.0, 0.9, 0.75, 0.5)), slow(RolloutPolicy((1.0, 0.7), "ode")), RolloutPolicy((1.0,))]
)
def test_an_export_gives_the_same_in_plain_diffusers(
    folder: Path, tmp_path: Path, policy: RolloutPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make(folder)
    backbone.config.check_export(policy)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):  # weights that are not the teacher's
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    sampler, again = Sampler(backbone, student, policy), make(tmp_path)
    exported = Sampler(again, again.load_exported(tmp_path), policy)
    weights = exported.denoiser.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    change = exported.latents(PROMPTS, SEEDS) - sampler.latents(PROMPTS, SEEDS)
    assert float(change.abs().max()) < 5e-5  # not 0: rounding depends on where weights lie in memory
    steps = [draws(f"step{i}").split([TOKENS, MOMENTS], dim=1) for i in range(1, policy.num_steps + 1)]
    order = iter([part for step in steps for part in step])  # the pipeline steps the video, then the sound
    monkeypatch.setattr(
        scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(order), raising=False
    )
    assert compared(sampler, tmp_path, policy.num_steps, 1.0) < 1e-4
    card = backbone.usage(policy, tmp_path, False)
    assert "stg_scale=0" in card and "frame_rate=24" in card and "max_sequence_length=16" in card
    assert "and more guidance" in backbone.plain_call(policy, False)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_turn_of_each_role_moves_its_weights_and_no_others(folder: Path, adapters: bool) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone = make(folder, roles)
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=2.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = backbone.encode_both(PROMPTS)
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


def test_an_adapter_is_exported_as_plain_diffusers_reads_it(folder: Path, tmp_path: Path) -> None:
    backbone = make(folder, RoleOptions({"student": LoraConfig(4)}))
    student, policy = backbone.load("student"), RolloutPolicy((1.0, 0.7), "ode")
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    backbone.save_pipeline(student, policy, tmp_path)
    ours = Sampler(backbone, student, policy).latents(PROMPTS, SEEDS)
    loaded = make(folder)
    theirs = Sampler(loaded, loaded.load_exported(tmp_path), policy).latents(PROMPTS, SEEDS)
    assert float((ours - theirs).abs().max()) < 1e-4
    untrained = Sampler(loaded, loaded.load("teacher"), policy).latents(PROMPTS, SEEDS)
    assert float((ours - untrained).abs().max()) > 1e-3


def test_sizes_are_known_without_weights(folder: Path) -> None:
    backbone = make(folder)
    assert backbone.latent_shape == (TOKENS + MOMENTS, 4) and backbone.num_tokens == TOKENS
    cond, _ = backbone.encode_both(PROMPTS)
    assert {key: tuple(value.shape[1:]) for key, value in cond.items()} == backbone.prompt_shapes()
    longer = make(folder, fps=12)
    assert longer.num_moments == 19  # of 0.75 s, at 25 a second, to the nearest


def recipe_of(folder: Path, **changes: Any) -> Any:
    raw: dict[str, Any] = {
        "output_dir": "unused",
        "backbone": {"name": "ltx2", "path": str(folder)} | SIZE,
        "rollout": {"timesteps": [1.0, 0.75], "transition": "ode"},
        "data": {"name": "prompts", "prompts": PROMPTS},
        "objective": {"name": "dmd2", "guidance_scale": 3.0, "fake_updates": 1},
        "optimizers": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
        "train": {"steps": 2, "batch_size": 2, "num_samples": 2},
        "eval": {"metrics": ["throughput"], "num_samples": 2, "quick_num_samples": 2, "prompts": PROMPTS},
    }
    return build_recipe(raw | changes)


def test_real_data_added_inputs_and_other_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    digits = {"name": "moving_digits", "videos": 2}
    optimizers = {role: {"lr": 1e-4} for role in ("student", "fake_score", "discriminator")}
    objective = {"name": "dmd2", "fake_updates": 1, "gan_weight": 0.01}
    with pytest.raises(RecipeError, match="needs latents, which data moving_digits does not provide"):
        recipe_of(folder, data=digits, objective=objective, optimizers=optimizers)
    with pytest.raises(ValueError, match="prepare prompts alone"):
        prepare(recipe_of(folder, data=digits), tmp_path / "prepared")
    with pytest.raises(RecipeError, match="take no added inputs"):
        recipe_of(folder, objective={"name": "dmd2", "fake_updates": 1, "condition_on_stop": True})
    with pytest.raises(ValueError, match="max_sequence_length must be a multiple of 4"):
        make(folder, max_sequence_length=6)
    for file, key, value, words in (
        ("transformer/config.json", "patch_size", 2, "those of LTX-2 are 1"),
        ("transformer/config.json", "audio_in_channels", 8, "needs all of one width"),
        ("vae/config.json", "decoder_inject_noise", [True, False], "adds noise while it decodes"),
    ):
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(ValueError, match=words):
            make(folder)
        (folder / file).write_text(before)


@pytest.mark.slow
def test_the_plan_counts_the_connectors(folder: Path) -> None:
    planned = plan(recipe_of(folder))
    assert {"text_encoder", "connectors", "vae"} <= {c.name for c in planned.components} and planned.peak > 0
