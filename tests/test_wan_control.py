"""Wan VACE with control videos, masks and reference pictures: against plain diffusers, and from files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanVACEPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from role_turns import check_turns
from tiny_wan import tiny_wan
from tiny_wan_i2v import tiny_wan_i2v
from variants import slow
from video_files import GREY, write_video

from fastgen import noise
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.given import Control, to_picture
from fastgen.backbones.wan_vace import WanVACEConfig
from fastgen.batch import Batch
from fastgen.config import build_recipe
from fastgen.data import make_batch
from fastgen.data.controls import control_of, encode_given
from fastgen.data.prepared import PreparedData
from fastgen.evaluation.folders import evaluate_path
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.planning.plan import plan
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.run.prepare import prepare
from fastgen.sampling.folder import sample_folder
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler
from fastgen.train import train

PROMPTS = ["a cat runs", "a blue dog"]
NEGATIVE = "a red cat"
SEEDS = [3, 1]
SIZE = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 16}
SHAPES = ((24, 17), (40, 44))  # of the references
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan_i2v(tmp_path_factory.mktemp("pipeline"), "vace")


def open_control(folder: Path, references: int, roles: RoleOptions | None = None) -> Any:
    config = WanVACEConfig(path=str(folder), control="video", references=references, negative_prompt=NEGATIVE, **SIZE)
    config.check()
    return config.build(CPU, torch.float32, 0, *([roles] if roles else []))


def bytes_like(shape: tuple[int, ...], key: int) -> torch.Tensor:
    """[*shape] in [0, 1], in steps of 1 / 255: four areas of one colour, each with a little noise."""
    areas = noise.uniform(torch.arange(1), (*shape[:-2], 2, 2), key, torch.float32)[0]
    grain = noise.uniform(torch.arange(1), shape, key + 1000, torch.float32)[0]
    high, wide = (torch.arange(side) * 2 // side for side in shape[-2:])
    return ((0.8 * areas[..., high[:, None], wide] + 0.2 * grain) * 255).round() / 255


def controls(references: int, masked: bool) -> list[Control]:
    """One for each prompt. Masks have all levels, as after resizing."""
    found = []
    for i in range(len(PROMPTS)):
        mask = bytes_like((5, 16, 32), 10 + i) if masked else None
        pictures = tuple(bytes_like((3, *SHAPES[k % 2]), 20 + 4 * i + k) for k in range(references))
        found.append(Control(bytes_like((5, 3, 16, 32), i), mask, pictures))
    return found


def rows_of(backbone: Any, given: list[Control]) -> Any:
    return type(backbone.encode_control(given[0])).cat([backbone.encode_control(control) for control in given])


def plain_frames(folder: Path, backbone: Any, given: list[Control], steps: int, **call: Any) -> torch.Tensor:
    """What a user's own calls give for our initial noise, one for each control as the stock pipeline takes them."""
    pipeline = WanVACEPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = noise.normal(torch.tensor(SEEDS), backbone.latent_shape, noise.make_key("sample", "initial"))
    videos = []
    for i, control in enumerate(given):
        masks = None if control.mask is None else [to_picture(m.expand(3, -1, -1)) for m in control.mask]
        out = pipeline(
            PROMPTS[i],
            video=[to_picture(frame) for frame in control.frames],
            mask=masks,
            reference_images=[to_picture(picture) for picture in control.references] or None,
            num_inference_steps=steps,
            latents=drawn.transpose(1, 2)[i : i + 1],
            **(SIZE | call),
        )
        videos.append(torch.from_numpy(out.frames))
    return torch.cat(videos).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize(("references", "masked", "scale"), [(0, True, 4.0), (2, False, 1.0), slow((1, True, 4.0))])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_frames(
    folder: Path, references: int, masked: bool, scale: float
) -> None:
    backbone, given = open_control(folder, references), controls(references, masked)
    ours = teacher_sampler(backbone, 4, scale).sample(PROMPTS, SEEDS, rows_of(backbone, given))
    theirs = plain_frames(folder, backbone, given, 4, guidance_scale=scale, negative_prompt=NEGATIVE)
    error = float((ours - theirs).abs().max())
    print(f"{references} references, masked {masked}: largest pixel difference {error:.2g}")
    assert ours.shape == theirs.shape == (2, 5, 3, 16, 32) and ours.std() > 0.01
    assert error < 1e-5  # a picture of references changes it by 8e-4


def test_the_frames_depend_on_each_part_of_the_control(folder: Path) -> None:
    backbone = open_control(folder, 2)
    own, other = controls(2, True)
    sampler = teacher_sampler(backbone, 2, 1.0)

    def sample(control: Control) -> torch.Tensor:
        return sampler.sample(PROMPTS[:1], [3], backbone.encode_control(control))

    first = sample(own)
    for part in Control._fields:
        change = float((sample(own._replace(**{part: getattr(other, part)})) - first).abs().max())
        print(f"{part}: {change:.2g}")
        assert change > 3e-4
    assert torch.equal(sample(own._replace(mask=None)), sample(own._replace(mask=torch.ones(5, 16, 32))))


@pytest.mark.parametrize("references", [0, 2])
def test_an_export_gives_the_same_frames_in_plain_diffusers(
    folder: Path, tmp_path: Path, references: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, given, policy = open_control(folder, references), controls(references, True), RolloutPolicy((1.0, 0.7))
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):  # weights that are not the teacher's
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS, rows_of(backbone, given))
    again = open_control(tmp_path, references)
    exported = Sampler(again, again.load_exported(tmp_path), policy)
    assert torch.equal(ours, exported.sample(PROMPTS, SEEDS, rows_of(again, given)))
    key = [noise.make_key("sample", f"step{i}") for i in (1, 2)]
    fresh = [noise.normal(torch.tensor(SEEDS), backbone.latent_shape, k).transpose(1, 2) for k in key]
    order = iter([step[i : i + 1] for i in range(2) for step in fresh])
    monkeypatch.setattr(
        scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(order), raising=False
    )
    theirs = plain_frames(tmp_path, backbone, given, 2, guidance_scale=1.0)
    assert float((ours - theirs).abs().max()) < 1e-4
    card = backbone.usage(policy, tmp_path, False)
    assert 'load_video("control.mp4")[:5]' in card and "video=frames, " in card
    assert ("reference_images=references, " in card) == bool(references)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_turn_of_each_role_moves_its_weights_and_no_others(folder: Path, adapters: bool) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone = open_control(folder, 1, roles)
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=2.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = backbone.encode_both(PROMPTS, rows_of(backbone, controls(1, True)))
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips and their controls: a masked one, one with a picture as its mask, and one without."""
    root = tmp_path_factory.mktemp("data")
    for part in ("clips", "depth/masks", "depth/references/b"):
        (root / part).mkdir(parents=True)
    for i, name in enumerate("abc"):
        write_video(root / f"clips/{name}.mp4", 12, size=(40, 48))
        write_video(root / f"depth/{name}.mp4", 12, size=(32, 64), options={"crf": str(20 + 10 * i)})
        for part in ("clips", "depth"):
            (root / part / f"{name}.txt").write_text(["a cat", "a dog runs", "a red cat"][i])
    write_video(root / "depth/masks/a.mp4", 12, size=(32, 64))
    to_picture(bytes_like((3, 20, 40), 1)).save(root / "depth/masks/b.png")
    for i, place in enumerate(("a.png", "b/1.png", "c.png")):
        to_picture(bytes_like((3, 20, 12), 2 + i)).save(root / "depth/references" / place)
    return root


def recipe_of(folder: Path, clips: Path, output: Path = Path("unused"), **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "output_dir": str(output),
        "backbone": {"name": "wan_vace", "path": str(folder), "control": "video", "references": 1} | SIZE,
        "rollout": {"timesteps": [1.0, 0.75], "transition": "ode"},
        "data": {"name": "videos", "controls": str(clips / "depth")},
        "objective": {"name": "dmd2", "guidance_scale": 3.0, "fake_updates": 1},
        "optimizers": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
        "train": {"steps": 2, "batch_size": 2, "num_samples": 2, "sample_every": 2, "checkpoint_every": 0},
        "health": {"every": 1, "num_samples": 4},
        "eval": {"metrics": ["throughput"], "num_samples": 3, "quick_num_samples": 2, "images": str(clips / "depth")},
    }
    return build_recipe(raw | changes)


def build(recipe: Recipe) -> Any:
    return recipe.backbone.build(CPU, torch.float32, 0)


def test_a_batch_has_the_control_of_its_clip(folder: Path, clips: Path) -> None:
    """At the same time as the real video, with its mask and its reference; the same as without the video."""
    recipe = recipe_of(
        folder, clips, data={"name": "videos", "folder": str(clips / "clips"), "controls": str(clips / "depth")}
    )
    backbone, positions = build(recipe), torch.arange(3)
    stream: Any = recipe.data.open(backbone, 0)
    batch = make_batch(stream, backbone, positions, 0, frozenset({"pixels"}))
    alone = recipe_of(folder, clips)
    only = make_batch(alone.data.open(backbone, 0), backbone, positions, 0, frozenset())
    assert torch.equal(batch.cond["image_latents"], only.cond["image_latents"]) and batch.prompts == only.prompts
    assert torch.equal(batch.cond["image_latents"], batch.uncond["image_latents"])
    assert batch.pixels is not None
    for i, picture in enumerate(stream.pictures(positions)):
        files = control_of(clips / "depth" / ("abc"[picture] + ".mp4"))
        rows = [backbone.encode_control(files.read((j + 0.5) / 8, 5, 16.0, (16, 32), False)) for j in range(8)]
        same = [torch.equal(row["image_latents"][0], batch.cond["image_latents"][i]) for row in rows]
        first = round(float(batch.pixels[i, 0, :, -2:, -2:].mean()) * 255 / GREY)
        assert same.index(True) == first


def test_a_real_video_has_no_latents_of_references(folder: Path, clips: Path) -> None:
    section = {"name": "videos", "folder": str(clips / "clips"), "controls": str(clips / "depth")}
    recipe = recipe_of(folder, clips, data=section)
    assert recipe.data.fills(recipe.backbone) == {"pixels", "controls"}
    objective = {"name": "dmd2", "fake_updates": 1, "gan_weight": 0.01}
    optimizers = {role: {"lr": 1e-4} for role in ("student", "fake_score", "discriminator")}
    with pytest.raises(RecipeError, match="needs latents, which data videos does not provide"):
        recipe_of(folder, clips, data=section, objective=objective, optimizers=optimizers)


def test_prepared_controls_give_the_same_batches_without_any_encoder(
    folder: Path, clips: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, clips)
    manifest = prepare(recipe, tmp_path / "prepared", shard_size=2)
    assert (manifest["num_images"], manifest["only_images"]) == (3, True)
    source = PreparedData(folder=str(tmp_path / "prepared"))
    source.check(recipe.backbone)
    assert source.provides == {"controls"}
    here, there = build(recipe), build(recipe)
    wanted = make_batch(recipe.data.open(here, 3), here, torch.arange(5), 1, frozenset())
    got = make_batch(source.open(there, 3), there, torch.arange(5), 1, frozenset())
    assert torch.equal(got.cond["image_latents"], wanted.cond["image_latents"])
    assert not {"text_pipeline", "vae"} & vars(there).keys()
    first = {"name": "wan_vace", "path": str(folder)} | SIZE
    with pytest.raises(RecipeError, match="makes its samples from images, which data prepared does not provide"):
        recipe_of(folder, clips, backbone=first, data={"name": "prepared", "folder": str(tmp_path / "prepared")})


def test_what_lacks_a_control_is_refused_before_weights_load(folder: Path, clips: Path, tmp_path: Path) -> None:
    vace = {"name": "wan_vace", "path": str(folder)} | SIZE
    control = vace | {"control": "video", "references": 1}
    depth = {"name": "videos", "controls": str(clips / "depth")}
    with pytest.raises(
        RecipeError, match="from controls, which data videos does not provide; choose data videos and set"
    ):
        recipe_of(folder, clips, data={"name": "videos", "folder": str(clips / "clips")})
    with pytest.raises(RecipeError, match=r"controls: backbone wan_vace takes none here"):
        recipe_of(folder, clips, backbone=vace)
    with pytest.raises(RecipeError, match=r"references: they go with control videos"):
        recipe_of(folder, clips, backbone=vace | {"references": 1})
    with pytest.raises(RecipeError, match=r"has 1 reference pictures, and backbone\.references is 0"):
        recipe_of(folder, clips, backbone=control | {"references": 0})
    with pytest.raises(RecipeError, match=r"eval\.images: backbone wan_vace makes its samples from controls"):
        recipe_of(folder, clips, eval={"metrics": ["throughput"], "prompts": ["a cat"]})
    pictures = clips / "depth/references"
    with pytest.raises(RecipeError, match="images: backbone wan_vace makes its samples from control videos"):
        section = {"metrics": ["throughput"], "images": str(pictures), "prompts": ["a cat"]}
        recipe_of(folder, clips, eval=section)
    plain = {"name": "wan", "path": str(tiny_wan(tmp_path / "wan"))} | SIZE
    with pytest.raises(RecipeError, match="controls: backbone wan takes none here"):
        recipe_of(folder, clips, backbone=plain, data=depth, eval={"metrics": ["throughput"], "prompts": ["a cat"]})
    with pytest.raises(ValueError, match="takes no control videos"):
        load_sampler(tmp_path / "wan", references=0)

    def refused(message: str, name: str = "a", count: int = 12, side: int = 64, **files: str) -> None:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        (root / "masks").mkdir(parents=True)
        write_video(root / f"{name}.mp4", count, size=(32, 64))
        (root / f"{name}.txt").write_text("a cat")
        for where, kind in files.items():
            write_video(root / "masks" / f"{where}.mp4", int(kind), size=(min(side, 32), side))
        changes = {"backbone": control | {"references": 0}, "eval": {"metrics": ["throughput"], "prompts": ["a cat"]}}
        if "ending" in message:
            (root / "masks/a.avi").write_bytes(b"")
        with pytest.raises(RecipeError, match=message):
            real = {"folder": str(clips / "clips")} if "videos" in message else {}
            recipe_of(folder, clips, data={"name": "videos", "controls": str(root), **real}, **changes)

    refused("masks/a.avi has an ending that fastgen does not read there")
    refused("b.mp4 belongs to no control video", b="12")
    refused("smaller than the backbone's 32x16 pixels, the first is .*masks/a.mp4 with 16x16", a="12", side=16)
    refused("masks/a.mp4 lasts 0.50 s and .*a.mp4 0.75 s", a="8")
    refused("is shorter than 5 pictures at 16 per second", count=3)
    refused("2 of 3 videos have no control of their name in .*, the first is b")


def test_samples_are_made_from_control_videos(folder: Path, clips: Path, tmp_path: Path) -> None:
    """A plain pipeline takes a control video or a picture, as its ending says."""
    files = [clips / "depth/a.mp4", clips / "depth/c.mp4"]
    sampler = load_sampler(folder, image=True, references=1)
    assert (sampler.backbone.config.control, sampler.backbone.config.references) == ("video", 1)
    backbone = build(recipe_of(folder, clips))
    rows = encode_given(backbone, files)
    assert rows["image_latents"].shape == (2, *backbone.image_shapes()["image_latents"])
    with pytest.raises(ValueError, match=r"from control videos \(mp4, webm or gif\), and .*a.png is none"):
        encode_given(backbone, [clips / "depth/references/a.png"])
    with pytest.raises(ValueError, match="give --image"):
        sample_folder(folder, ["a cat"], None, 1, 0, tmp_path / "out", 1, 1.0, 2)


@pytest.mark.slow
def test_a_run_its_export_its_samples_and_its_evaluation(folder: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, clips, tmp_path / "run")
    assert plan(recipe).peak > 0
    run = train(recipe)
    stored = json.loads((run / "export/fastgen.json").read_text())["backbone"]
    assert (stored["control"], stored["references"]) == ("video", 1)
    files = [clips / "depth/a.mp4", clips / "depth/b.mp4"]
    assert sample_folder(run, PROMPTS, None, 1, 7, tmp_path / "out", None, None, 2, None, files) == 2
    row = evaluate_path(run, output=tmp_path / "results.json", progress=False)
    assert row["num_samples"] == 3 and len(row["images_sha256"]) == 64
