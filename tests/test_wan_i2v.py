"""Wan image-to-video against plain diffusers: the same frames from the same image, both ways; roles; and refusals."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanVACEPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from PIL import Image
from role_turns import check_turns
from tiny_wan import tiny_wan
from tiny_wan_i2v import KINDS, tiny_wan_i2v
from torch import Tensor
from variants import slow

from fastgen import noise
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.given import to_picture
from fastgen.backbones.wan_i2v import WanI2VConfig
from fastgen.backbones.wan_vace import WanVACE, WanVACEConfig
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Inputs
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.demo import load_pair
from fastgen.sampling.loading import load_adapter
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler

PROMPTS = ["a cat runs", "a blue dog"]
NEGATIVE = "a red cat"
SEEDS = [3, 1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wan_i2v")
    return {kind: tiny_wan_i2v(root / kind.replace(" ", "_"), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def backbones(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: open_i2v(folder, kind, negative_prompt=NEGATIVE) for kind, folder in folders.items()}


def size_of(kind: str) -> dict[str, int]:
    """Not square, so that height and width are told apart."""
    unit = 32 if kind == "first frame" else 16
    return {"height": unit, "width": 2 * unit, "num_frames": 5, "max_sequence_length": 16}


def open_i2v(folder: Path, kind: str, roles: RoleOptions | None = None, **changes: Any) -> Any:
    config = (WanVACEConfig if kind == "vace" else WanI2VConfig)(path=str(folder), **(size_of(kind) | changes))
    config.check()
    return config.build(CPU, torch.float32, 0, *([roles] if roles else []))


def pictures(backbone: Any) -> Tensor:
    """Two 8-bit pictures [2, 3, H, W]."""
    high, wide = backbone.picture_size
    draw = noise.uniform(torch.arange(2), (3, high, wide), 7, torch.float32)
    return (draw * 255).round() / 255


def draws(backbone: Any, name: str) -> Tensor:
    return noise.normal(torch.tensor(SEEDS), backbone.latent_shape, noise.make_key("sample", name)).transpose(1, 2)


@cache
def stock(folder: Path, vace: bool) -> Any:
    return (WanVACEPipeline if vace else WanImageToVideoPipeline).from_pretrained(folder)


def given(pixels: Tensor, vace: bool) -> dict[str, Any]:
    """The picture as an argument of the stock call; VACE is given it as a video with a mask."""
    picture = to_picture(pixels)
    if not vace:
        return {"image": picture}
    grey, black, white = (Image.new("RGB", picture.size, (level,) * 3) for level in (128, 0, 255))
    return {"video": [picture, *[grey] * 4], "mask": [black, *[white] * 4]}


def plain_frames(folder: Path, backbone: Any, steps: int, **call: Any) -> tuple[Tensor, list[float]]:
    """What a user's own calls give for our initial noise, one for each image as the stock pipeline takes them; and the
    levels at which the first call asked its networks."""
    vace = isinstance(backbone, WanVACE)
    pipeline = stock(folder, vace)
    pipeline.set_progress_bar_config(disable=True)
    visited: list[float] = []
    hooks = [
        network.register_forward_pre_hook(
            lambda _m, _a, called: visited.append(float(called["timestep"].max()) / 1000), with_kwargs=True
        )
        for network in (pipeline.transformer, pipeline.transformer_2)
        if network is not None
    ]
    size, videos = size_of("first frame" if not vace and backbone.first_frame else "clip"), []
    for i, pixels in enumerate(pictures(backbone)):
        out = pipeline(
            **given(pixels, vace),
            prompt=PROMPTS[i],
            num_inference_steps=steps,
            latents=draws(backbone, "initial")[i : i + 1],
            **(size | call),
        )
        videos.append(torch.from_numpy(out.frames))
    for hook in hooks:
        hook.remove()
    return torch.cat(videos).permute(0, 1, 4, 2, 3), visited[: len(visited) // 2]


@pytest.mark.parametrize(("steps", "scale"), [slow((1, 1.0)), (4, 4.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_frames(
    folders: dict[str, Path], backbones: dict[str, Any], kind: str, steps: int, scale: float
) -> None:
    backbone = backbones[kind]
    images = backbone.encode_images(list(pictures(backbone)))
    ours = teacher_sampler(backbone, steps, scale).sample(PROMPTS, SEEDS, images)
    call: dict[str, Any] = {"guidance_scale": scale} | ({"negative_prompt": NEGATIVE} if scale > 1 else {})
    theirs, visited = plain_frames(folders[kind], backbone, steps, **call)
    error = float((ours - theirs).abs().max())
    print(f"{kind}, {steps} steps: largest pixel difference {error:.2g}")
    assert ours.shape == theirs.shape and ours.std() > 0.01
    assert error < 1e-4
    levels = backbone.teacher_policy(steps).timesteps
    assert visited == pytest.approx([level for level in levels for _ in range(len(visited) // steps)], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_depend_on_the_image_and_the_prompt(backbones: dict[str, Any], kind: str) -> None:
    backbone = backbones[kind]
    sampler, images = teacher_sampler(backbone, 2, 1.0), backbone.encode_images(list(pictures(backbone)))
    first = sampler.latents(PROMPTS[:1], [3], images=images.select(slice(0, 1)))
    for key in images:
        mixed = images.select(slice(0, 1)) | {key: images[key][1:]}
        other = sampler.latents(PROMPTS[:1], [3], images=Conditioning(mixed))
        change = float((other[:, 1:] - first[:, 1:]).abs().max())
        print(f"{kind}: {key} {change:.2g}")
        assert change > 1e-3
    other = sampler.latents(PROMPTS[1:], [3], images=images.select(slice(0, 1)))
    assert float((other[:, 1:] - first[:, 1:]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "policy", [RolloutPolicy((1.0, 0.9375, 5 / 6, 0.625)), slow(RolloutPolicy((1.0, 0.7), "ode"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_same_frames_in_plain_diffusers(
    backbones: dict[str, Any], tmp_path: Path, kind: str, policy: RolloutPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbones[kind]
    backbone.config.check_export(policy)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):  # weights that are not the teacher's
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ("WanVACEPipeline" if kind == "vace" else "WanImageToVideoPipeline")
    images = backbone.encode_images(list(pictures(backbone)))
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS, images)
    again = open_i2v(tmp_path, kind)
    exported = Sampler(again, again.load_exported(tmp_path), policy)
    assert torch.equal(ours, exported.sample(PROMPTS, SEEDS, again.encode_images(list(pictures(again)))))

    fresh = [draws(backbone, f"step{i}") for i in range(1, policy.num_steps + 1)]
    order = iter([noise[i : i + 1] for i in range(2) for noise in fresh])
    monkeypatch.setattr(
        scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(order), raising=False
    )
    theirs, visited = plain_frames(tmp_path, backbone, policy.num_steps, guidance_scale=1.0)
    assert visited == pytest.approx(list(policy.timesteps), abs=1e-6)
    error = float((ours - theirs).abs().max())
    print(f"{kind}: largest pixel difference {error:.2g}")
    assert error < 1e-4


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_of_each_role_moves_its_weights_and_no_others(
    folders: dict[str, Path], kind: str, adapters: bool
) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone = open_i2v(folders[kind], kind, roles)
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=2.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = backbone.encode_both(PROMPTS, backbone.encode_images(list(pictures(backbone))))
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_exported_as_plain_diffusers_reads_it(
    folders: dict[str, Path], backbones: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    backbone = open_i2v(folders[kind], kind, RoleOptions({"student": LoraConfig(4)}))
    student, policy = backbone.load("student"), RolloutPolicy((1.0, 0.7), "ode")
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    backbone.save_pipeline(student, policy, tmp_path)
    images = backbone.encode_images(list(pictures(backbone)))
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS, images)
    loaded = backbones[kind]
    theirs = Sampler(loaded, loaded.load_exported(tmp_path), policy).sample(PROMPTS, SEEDS, images)
    assert float((ours - theirs).abs().max()) < 1e-4
    untrained = teacher_sampler(loaded, 2, 1.0)
    plain = Sampler(loaded, untrained.denoiser, policy).sample(PROMPTS, SEEDS, images)
    assert float((ours - plain).abs().max()) > 1e-3


def test_the_first_frame_is_given_at_every_level(backbones: dict[str, Any]) -> None:
    """TI2V: the prediction there is the given frame, the network does not read x_t there, and no gradient comes."""
    backbone = backbones["first frame"]
    cond, _ = backbone.encode_both(PROMPTS, backbone.encode_images(list(pictures(backbone))))
    student, t = backbone.load("student"), torch.tensor([0.9, 0.2])
    x = noise.normal(torch.arange(2), backbone.latent_shape, 0, torch.float32)
    x0 = student(x, t, cond)
    assert torch.allclose(x0[:, :1], cond["image_latents"], atol=1e-5)
    other = x.clone()
    other[:, 0] += 1
    assert torch.equal(student(other, t, cond)[:, 1:], x0[:, 1:])
    gradients = torch.autograd.grad(x0[:, 0].sum(), list(student.parameters()), allow_unused=True)
    assert all(g is None or not bool(g.any()) for g in gradients)
    assert bool(student(x, 0 * t, cond, predict="flow_prediction").isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_added_inputs_change_nothing_at_first(backbones: dict[str, Any], kind: str) -> None:
    backbone = backbones[kind]
    cond, _ = backbone.encode_both(PROMPTS, backbone.encode_images(list(pictures(backbone))))
    student, t = backbone.load("student"), torch.tensor([0.95, 0.2])
    x = noise.normal(torch.arange(2), backbone.latent_shape, 0, torch.float32)
    before = student(x, t, cond)
    student.add_inputs({}, backbone.time_dim, ["s"])
    assert torch.equal(student(x, t, cond, Inputs(s=t)), before)
    assert torch.equal(student(x, t, cond, Inputs(s=0 * t)), before)
    for member in student.members:
        for table in member.time_embedding.tables.parameters():
            torch.nn.init.normal_(table)
    assert not torch.equal(student(x, t, cond, Inputs(s=0 * t)), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_part_of_a_sample_fits_what_is_given(backbones: dict[str, Any], kind: str) -> None:
    """Processes that only gather weights with others call a network with it, and with the whole conditioning."""
    backbone = backbones[kind]
    cond, _ = backbone.encode_both(PROMPTS, backbone.encode_images(list(pictures(backbone))))
    x, t = noise.normal(torch.arange(1), backbone.latent_shape, 0, torch.float32), torch.tensor([0.95])
    for member in backbone.load("teacher").members:
        part, level, inputs = member.smallest(x, t, Inputs())
        assert member(part, level, cond.select(slice(1)), inputs).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_known_without_weights(backbones: dict[str, Any], kind: str) -> None:
    backbone = backbones[kind]
    images = backbone.encode_images(list(pictures(backbone)))
    assert {key: tuple(value.shape[1:]) for key, value in images.items()} == backbone.image_shapes()
    frames = torch.rand(1, 5, 3, *backbone.picture_size)
    assert backbone.encode(frames).shape[1:] == backbone.latent_shape
    latents = backbone.encode(frames)
    frames[:, 1:] = torch.rand_like(frames[:, 1:])  # the latents of the first frame are those of the image alone
    row = backbone.encode_image(frames[0, 0])["image_latents"][:, :1]
    row = row[:, :, :4] if kind == "vace" else row[:, :, -4:]
    assert torch.allclose(row, latents[:, :1], atol=1e-5)


def test_a_pipeline_that_can_do_both_takes_an_image_if_there_is_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """TI2V 5B is stored as a text-to-video pipeline; an adapter's card loads it as the one that takes an image."""
    folder = folders["first frame"]
    assert [load_sampler(folder, image=image).backbone.config.name for image in (False, True)] == ["wan", "wan_i2v"]
    backbone = open_i2v(folder, "first frame", RoleOptions({"student": LoraConfig(4)}))
    policy = RolloutPolicy((1.0, 0.7), "ode")
    backbone.save_pipeline(backbone.load("student"), policy, tmp_path)
    card = backbone.usage(policy, tmp_path, True)
    assert "from diffusers import WanImageToVideoPipeline" in card
    assert f'WanImageToVideoPipeline.from_pretrained("{folder}")' in card
    loaded = load_adapter(tmp_path, {"name": "wan_i2v", "path": str(folder)}, {})
    assert type(loaded) is WanImageToVideoPipeline and loaded.get_active_adapters()


def test_what_takes_no_image_and_what_lacks_one_is_refused(
    folders: dict[str, Path], backbones: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="backbone wan does"):
        open_i2v(tiny_wan(tmp_path / "wan"), "clip")
    backbone = backbones["clip"]
    with pytest.raises(ValueError, match="makes every sample from given images"):
        backbone.encode_both(PROMPTS)
    plain = load_sampler(tmp_path / "wan").backbone
    with pytest.raises(ValueError, match="takes no images"):
        plain.encode_both(PROMPTS, backbone.encode_images(list(pictures(backbone))))
    with pytest.raises(ValueError, match="the demo does not"):
        load_pair(folders["clip"])
    with pytest.raises(ValueError, match="has no causal student"):
        backbone.config.check_chunks(RolloutPolicy((1.0, 0.5)))
    with pytest.raises(ValueError, match="no pipeline can sample a student of backbone"):
        backbone.config.check_export(RolloutPolicy((1.0, 0.5), "ode", two_time=True))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("in_channels", 4, "takes an image has 12 here"), ("pos_embed_seq_len", 514, "first and a last image")],
)
def test_other_networks_are_refused_before_weights_load(tmp_path: Path, key: str, value: int, message: str) -> None:
    path = tiny_wan_i2v(tmp_path, "clip") / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        open_i2v(tmp_path, "clip")


def test_a_network_that_is_told_of_images_needs_its_encoder(tmp_path: Path) -> None:
    weights = tiny_wan_i2v(tmp_path, "clip") / "image_encoder/model.safetensors"
    stored = weights.read_bytes()
    weights.write_bytes(stored[:-8])
    with pytest.raises(ValueError, match="image_encoder"):
        open_i2v(tmp_path, "clip")
    weights.write_bytes(stored)
    (tmp_path / "image_processor").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="image_processor"):
        open_i2v(tmp_path, "clip")


def test_pictures_are_8_bit_for_the_image_encoder() -> None:
    pixels = torch.rand(3, 4, 6)
    image = to_picture(pixels)
    assert isinstance(image, Image.Image) and image.size == (6, 4)
    assert to_picture((pixels * 255).round().to(torch.uint8)).tobytes() == image.tobytes()
