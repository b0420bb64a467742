"""HunyuanVideo 1.5 and LTX-Video: what their shared suite (test_families.py) does not cover."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideo15Pipeline
from tiny_families import FAMILIES, PROMPTS, draws
from tiny_ltx import tiny_ltx

from fastgen.backbones.pipeline_config import CONFIGS
from fastgen.batch import known_mask
from fastgen.planning.weightless import empty
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import teacher_sampler

HUNYUAN, LTX = FAMILIES["hunyuan-video15"], FAMILIES["ltx"]


def set_key(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.slow
def test_glyphs_and_full_padding_give_the_pipelines_own_pixels(tmp_path: Path) -> None:
    """The stock call pads to 1000 tokens, and has 729 masked tokens of an image; what stands in quotation marks is
    read by the second encoder. The negative prompt has glyphs of its own."""
    backbone = HUNYUAN.make(HUNYUAN.folder(tmp_path), negative_prompt='a "b"', max_sequence_length=80)
    prompts = ['a cat with "red" and "ab"', "two dogs"]
    ours = teacher_sampler(backbone, 1, 3.0).sample(prompts, [3, 1])
    cond, _ = backbone.encode_both(prompts)
    assert cond["glyph_mask"].any(1).tolist() == [True, False]
    pipeline = HunyuanVideo15Pipeline.from_pretrained(tmp_path)
    pipeline.guider = pipeline.guider.new(guidance_scale=3.0)
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    latents = draws(backbone, "initial").transpose(1, 2)
    call = {"num_inference_steps": 1, "latents": latents, **HUNYUAN.sizes}
    theirs = torch.from_numpy(pipeline(prompts, ['a "b"'] * 2, **call).frames).movedim(-1, -3)
    assert float((ours - theirs).abs().max()) < 1e-4
    plain = teacher_sampler(backbone, 1, 3.0).sample([prompts[0].replace('"', ""), prompts[1]], [3, 1])
    assert float((ours - plain).abs().max()) > 1e-3


def test_an_export_of_hunyuan_is_called_once_a_step_by_its_own_guider(tmp_path: Path) -> None:
    backbone, policy = HUNYUAN.make(HUNYUAN.folder(tmp_path / "teacher")), RolloutPolicy((1.0, 0.5))
    backbone.save_pipeline(backbone.load("student"), policy, tmp_path / "student")
    pipeline = HunyuanVideo15Pipeline.from_pretrained(tmp_path / "student")
    assert pipeline.guider.guidance_scale == 1 and pipeline.guider.num_conditions == 1
    assert "guidance" not in backbone.plain_call(policy, False)
    assert backbone.vae.use_tiling and backbone.vae.use_slicing
    text = backbone.usage(policy, tmp_path / "student", False)
    assert (
        "enable_tiling()" in text
        and "tokenizer_max_length = 24" in text
        and "num_frames=5" in text
        and "guidance_scale=" not in text
    )


def test_what_hunyuans_pipeline_would_not_do_so_is_refused(tmp_path: Path) -> None:
    folder = HUNYUAN.folder(tmp_path)
    for file, key, value, words in (
        ("guider/guider_config.json", "guidance_rescale", 0.7, "guider_config.json sets guidance_rescale: 0.7"),
        ("transformer/config.json", "in_channels", 4, "has in_channels 4, and HunyuanVideo15Pipeline gives 9"),
        ("model_index.json", "guider", ["diffusers", "AdaptiveProjectedGuidance"], "needs a ClassifierFreeGuidance"),
    ):
        before = (folder / file).read_text()
        set_key(folder / file, key, value)
        with pytest.raises(ValueError, match=words):
            HUNYUAN.make(folder)
        (folder / file).write_text(before)


def test_rows_that_a_mask_selects_are_counted_without_values() -> None:
    """As the network of HunyuanVideo 1.5 takes out the rows of its text, for `fastgen plan`."""
    text, mask = empty(5, 3), torch.tensor([True, False, True, True, False])
    assert text[mask].shape == (3, 3) and text[~mask].shape == (2, 3) and text[mask.logical_not()].shape == (2, 3)
    assert known_mask(empty(2, 4)).all() and known_mask(mask) is mask


def test_a_vae_of_ltx_that_is_told_no_timestep_gives_the_pipelines_own_pixels(tmp_path: Path) -> None:
    """And the frame rate is told to the network."""
    backbone = LTX.make(tiny_ltx(tmp_path, told=False), fps=10)
    ours = teacher_sampler(backbone, 2, 1.0).sample(PROMPTS, [3, 1])
    theirs, _ = LTX.plain_pixels(tmp_path, backbone, 2, guidance_scale=1.0, frame_rate=10)
    other, _ = LTX.plain_pixels(tmp_path, backbone, 2, guidance_scale=1.0)
    assert float((ours - theirs).abs().max()) < 1e-4 < float((ours - other).abs().max())


def test_what_does_not_fit_ltx_is_refused(tmp_path: Path) -> None:
    folder = LTX.folder(tmp_path)
    for file, key, value, words in (
        ("vae/config.json", "decoder_inject_noise", [True, False, False], "adds noise while it decodes"),
        ("transformer/config.json", "patch_size", 2, "those of LTX are 1"),
    ):
        before = (folder / file).read_text()
        set_key(folder / file, key, value)
        with pytest.raises(ValueError, match=words):
            LTX.make(folder)
        (folder / file).write_text(before)
    backbone = LTX.make(folder)
    assert "frame_rate=25, max_sequence_length=12" in backbone.call and "width=32, num_frames=9" in backbone.call


@pytest.mark.parametrize(
    ("family", "checkpoint", "shape", "tokens"),
    [
        ("hunyuan-video15", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", (31, 32, 30, 53), 49_290),
        ("ltx", "Lightricks/LTX-Video", (21, 128, 16, 22), 7_392),
        ("cogvideox", "THUDM/CogVideoX-5b", (13, 16, 60, 90), None),
    ],
)
def test_latent_sizes_of_the_released_models(
    family: str, checkpoint: str, shape: tuple[int, ...], tokens: int | None
) -> None:
    config = FAMILIES[family].config(path=str(CONFIGS / checkpoint))
    backbone = config.build(torch.device("cpu"), torch.float32, 0)
    assert backbone.latent_shape == shape
    assert tokens is None or backbone.num_tokens == tokens  # type: ignore[attr-defined]
