"""Scorers on tiny random networks in their published layouts: preprocessing against the libraries' own PIL path,
gradients against finite differences, and checkpoints that are not whole."""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.request import urlretrieve

import numpy as np
import open_clip
import pytest
import tiny_scorers as tiny
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import transforms as tv
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.rewards import Reward, images, make_reward, qwen, video_reward, weights
from fastgen.rewards.clip import load_clip
from fastgen.rewards.motion import feature_motion, flow_motion

torch.set_num_threads(1)

PROMPT = "a red cat"
BICUBIC = tv.InterpolationMode.BICUBIC
CLIP_SIZED = ("clip_score", "clip_contrast", "hpsv2", "pickscore", "image_reward", "aesthetic")
ALL = (*CLIP_SIZED, "hpsv3", "video_reward", "motion")
Files = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """name -> the keys of its recipe, with folders in the published layouts."""
    root = tmp_path_factory.mktemp("scorers")
    clip, base, hpsv3 = str(tiny.tiny_clip_score(root / "clip")), tiny.tiny_qwen(root / "qwen"), root / "hpsv3"
    tiny.tiny_hpsv3(hpsv3)
    video = tiny.tiny_video_reward(root / "video", base)
    return {
        "clip_score": {"path": clip},
        "clip_contrast": {"path": clip, "towards": "{prompt}, flat", "away": "{prompt}, 3d"},
        "pickscore": {"path": clip},
        "aesthetic": {"path": str(tiny.tiny_aesthetic(root / "aesthetic")), "clip": clip},
        "hpsv2": {"path": str(tiny.tiny_hpsv2(root / "hpsv2"))},
        "image_reward": {"path": str(tiny.tiny_image_reward(root / "image_reward"))},
        "hpsv3": {"path": str(hpsv3), "base": str(base), "template": str(hpsv3 / "question.py")},
        "video_reward": {
            "path": str(video),
            "base": str(base),
            "fps": 8,
            "template": str(tiny.video_question(root / "question.txt")),
        },
        "motion": {"path": clip},
    }


def made(name: str, keys: dict[str, Any]) -> Reward:
    reward = make_reward(name, keys)
    reward.ready()
    return reward


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def inputs(reward: Reward, count: int, size: tuple[int, int] = (90, 120)) -> Tensor:
    """Smooth pictures or videos whose values stay inside (0, 1)."""
    random = torch.Generator().manual_seed(1)
    shape = (count, 3) if reward.input == "pixels" else (count * 5, 3)
    x = F.interpolate(torch.rand(*shape, 8, 8, generator=random), size=size, mode="bicubic").clamp(0, 1)
    x = 0.3 + 0.4 * x
    return x if reward.input == "pixels" else x.unflatten(0, (count, 5))


# --- the libraries' own path, from 8-bit PIL pictures


def library_clip(reward: Any, pictures: Sequence[Image.Image]) -> Tensor:
    processor = CLIPImageProcessorPil()
    return library_cosine(reward, torch.cat([processor(p, return_tensors="pt")["pixel_values"] for p in pictures]))


def library_cosine(reward: Any, x: Tensor) -> Tensor:
    """transformers' whole CLIPModel."""
    clip = load_clip(reward.path, getattr(reward, "tokenizer_path", reward.path), x.device)
    length = clip.model.config.text_config.max_position_embeddings
    text = clip.tokenizer([PROMPT], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    logits = clip.model(pixel_values=x, input_ids=text["input_ids"], attention_mask=text["attention_mask"])
    return logits.logits_per_image[:, 0] / (1 if "ickscore" in type(reward).__name__ else clip.scale)


def library_contrast(reward: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """The log of transformers' own softmax over both texts."""
    clip, processor = load_clip(reward.path, reward.path, torch.device("cpu")), CLIPImageProcessorPil()
    x = torch.cat([processor(p, return_tensors="pt")["pixel_values"] for p in pictures])
    texts = [text.format(prompt=PROMPT) for text in (reward.towards, reward.away)]
    length = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    logits = clip.model(pixel_values=x, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return logits.logits_per_image.log_softmax(1)[:, 0]


def openai_transform(size: int = 224) -> Callable[[Image.Image], Tensor]:
    return tv.Compose(
        [tv.Resize(size, BICUBIC), tv.CenterCrop(size), tv.ToTensor(), tv.Normalize(images.CLIP_MEAN, images.CLIP_STD)]
    )


def library_aesthetic(reward: Any, pictures: Sequence[Image.Image]) -> Tensor:
    from fastgen.rewards.aesthetic import load_head

    model = load_clip(reward.clip, reward.clip, torch.device("cpu")).model
    features = model.get_image_features(pixel_values=torch.stack([openai_transform()(p) for p in pictures]))
    features = getattr(features, "pooler_output", features)
    return load_head(reward.path, features.shape[1], torch.device("cpu"))(F.normalize(features, dim=1))[:, 0]


def library_hpsv2(reward: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """The authors' ResizeMaxSize on ToTensor's picture, then open_clip's own forward."""
    from fastgen.rewards.hpsv2 import load

    network, rows = load(reward.path, reward.version, torch.device("cpu")), []
    for picture in pictures:
        x = tv.functional.to_tensor(picture)
        scale = 224 / max(x.shape[1:])
        x = tv.functional.resize(x, [round(side * scale) for side in x.shape[1:]], BICUBIC, antialias=True)
        down, across = (224 - side for side in x.shape[1:])
        x = tv.functional.pad(x, [across // 2, down // 2, across - across // 2, down - down // 2])
        rows.append(tv.functional.normalize(x, images.CLIP_MEAN, images.CLIP_STD))
    features, text, _ = network.model(torch.stack(rows), open_clip.SimpleTokenizer()([PROMPT]))
    return (features @ text.T)[:, 0]


def library_image_reward(reward: Any, pictures: Sequence[Image.Image]) -> Tensor:
    from fastgen.rewards.image_reward import load

    network = load(reward.path, reward.tokenizer_path, torch.device("cpu"))
    x = torch.stack([openai_transform()(p) for p in pictures])
    x = x * torch.tensor(images.CLIP_STD)[:, None, None] + torch.tensor(images.CLIP_MEAN)[:, None, None]
    return network(x, [PROMPT] * len(pictures))  # 224 pixels already: nothing is resized


def library_hpsv3(reward: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """PIL's resize, transformers' Qwen2-VL processor, and its whole model told the positions that the judge has."""
    from fastgen.rewards.hpsv3 import load

    judge = load(reward.path, reward.base, torch.device("cpu"), torch.float32)
    model = tiny.qwen_model(18)
    state = judge.modules.state_dict()
    named = {
        n.replace("vision.", "model.visual.").replace("language.", "model.language_model."): t
        for n, t in state.items()
        if not n.startswith("head.")
    }
    assert set(model.load_state_dict(named, strict=False).missing_keys) <= {"lm_head.weight"}
    question, values = f"{tiny.QUESTION.replace('{text_prompt}', PROMPT)}rating : <|Reward|> END", []
    for picture in pictures:
        size = qwen.smart_size(picture.height, picture.width, 200704, 200704)
        data = Qwen2VLImageProcessorPil()(picture.resize(size[::-1]), return_tensors="pt")
        own = judge.ids(question, "image", size[0] * size[1] // 784)[None]
        places = torch.arange(own.shape[1])[None, None].expand(3, 1, -1)
        hidden = model.model(
            input_ids=own,
            pixel_values=data["pixel_values"],
            image_grid_thw=data["image_grid_thw"],
            position_ids=places,
        ).last_hidden_state
        values.append(judge.modules["head"](hidden[own == judge.special[0]])[0, 0])
    return torch.stack(values)


LIBRARY: dict[str, Callable[[Any, Sequence[Image.Image]], Tensor]] = {
    "clip_score": library_clip,
    "clip_contrast": library_contrast,
    "pickscore": library_clip,
    "aesthetic": library_aesthetic,
    "hpsv2": library_hpsv2,
    "image_reward": library_image_reward,
    "hpsv3": library_hpsv3,
}


@lru_cache(maxsize=1)
def photographs() -> list[Image.Image]:
    return tiny.fixed_images()


@torch.no_grad()
def assert_parity(name: str, reward: Reward, pictures: Sequence[Image.Image]) -> None:
    own = torch.cat([reward(pixels(p)[None], [PROMPT]).value for p in pictures])
    library = LIBRARY[name](reward, pictures)
    worst = float((own - library).abs().max() / library.std())
    print(f"{name}: largest difference {worst:.4f} of the score's std {float(library.std()):.3g}")
    assert worst < 0.02


@pytest.mark.parametrize("name", CLIP_SIZED)
def test_preprocessing_is_the_librarys(name: str, files: Files) -> None:
    """64 photographs of many sizes, within 2 % of the score's standard deviation."""
    assert_parity(name, made(name, files[name]), photographs())


def test_line_art_has_hpsv2s_own_score(files: Files) -> None:
    """Its sharp edges leave [0, 1] when they are resized, which the authors' code does not clamp."""
    random, drawn = np.random.default_rng(0), list[Image.Image]()
    for _ in range(8):
        picture = Image.new("RGB", (300, 260), "white")
        for _ in range(25):
            ends = [tuple(random.integers(0, 260, 2).tolist()) for _ in range(2)]
            ImageDraw.Draw(picture).line(ends, fill="black", width=int(random.integers(2, 8)))
        drawn.append(picture)
    reward = made("hpsv2", files["hpsv2"])
    assert_parity("hpsv2", reward, drawn)
    whole = images.longest_side_padded(pixels(drawn[0])[None], 224)
    assert float(whole.max()) > 1.02 > float(images.resize(pixels(drawn[0])[None], 194, 224).max())


@pytest.mark.slow
def test_preprocessing_of_hpsv3_is_the_librarys(files: Files) -> None:
    assert_parity("hpsv3", made("hpsv3", files["hpsv3"]), photographs())


@pytest.mark.slow
@torch.no_grad()
def test_preprocessing_of_videos_is_the_librarys(files: Files) -> None:
    """64 photographs as 16 videos of four frames. video_reward: the authors' resize of 8-bit frames and transformers'
    patches; motion: CLIP's processor, picture by picture."""
    crops = [p.resize((200, 160)) for p in photographs()]
    videos = torch.stack([pixels(p) for p in crops]).unflatten(0, (16, 4))
    reward: Any = made("video_reward", files["video_reward"] | {"fps": 2.0})
    judge, library = video_reward.load(reward.path, reward.base, videos.device, torch.float32), []
    question = Path(reward.template).read_text().replace("{text_prompt}", PROMPT)
    for video in videos:
        frames = tv.functional.resize(
            (video * 255).round().byte(), list(qwen.smart_size(160, 200, 100352, 200704)), BICUBIC, antialias=True
        )
        rows, grid = library_patches(frames)
        out = judge.answer(
            rows, grid, judge.ids(question, "video", grid[0] * grid[1] * grid[2] // 4), judge._pad("video")
        )
        library.append(((out[:, 0] - 0.5) / 2).sum())
    own = reward(videos, [PROMPT] * 16).value
    worst = float((own - torch.stack(library)).abs().max() / torch.stack(library).std())
    motion: Any = made("motion", files["motion"])
    clip, processor = load_clip(motion.path, motion.path, videos.device), CLIPImageProcessorPil()
    x = torch.cat([processor(p, return_tensors="pt")["pixel_values"] for p in crops])
    e = F.normalize(clip.model.visual_projection(clip.model.vision_model(pixel_values=x).pooler_output), dim=1)
    expected = torch.stack([c - 0.5 * j for c, j in (feature_motion(part) for part in e.split(4))])
    moved = float((motion(videos, [PROMPT] * 16).value - expected).abs().max() / expected.std())
    print(f"video_reward: {worst:.4f} of the score's std; motion: {moved:.4f}")
    assert worst < 0.02 and moved < 0.02


def library_patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Rows of the vision tower by the picture processor, a pair of frames at a time put together by hand."""
    processor, pairs = Qwen2VLImageProcessorPil(do_resize=False), []
    for pair in frames.split(2):
        one, two = (processor(Image.fromarray(f.permute(1, 2, 0).numpy()), return_tensors="pt") for f in pair)
        rows = torch.stack([d["pixel_values"].unflatten(1, (3, 2, 196))[:, :, 0] for d in (one, two)], 2)
        pairs.append(rows.flatten(1))
    return torch.cat(pairs), (len(pairs), *(side // 14 for side in frames.shape[-2:]))


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_pixels_and_are_the_finite_differences(name: str, files: Files) -> None:
    """Along the gradient itself, where the difference is largest; no gradient is left on a network."""
    reward = made(name, files[name])
    x = inputs(reward, 1).requires_grad_()
    reward(x, [PROMPT]).value.sum().backward()
    grad = x.grad
    assert grad is not None
    direction = grad / grad.abs().max()
    with torch.no_grad():
        h = 2e-3
        high, low = (reward(x + sign * h * direction, [PROMPT]).value.double().sum() for sign in (1, -1))
    measured, expected = float((high - low) / (2 * h)), float((grad * direction).double().sum())
    print(f"{name}: finite difference {measured:.5g}, gradient {expected:.5g}")
    assert expected > 0 and measured == pytest.approx(expected, rel=0.02)
    frames = (0, 1, 3, 4) if name == "video_reward" else range(5)  # of five at 8 a second, four are read
    seen = grad[0, list(frames)] if reward.input == "frames" else grad[0]
    assert bool((seen.flatten(1).abs().amax(1) > 0).all())


HEADS = {
    "aesthetic": ("sac+logos+ava1-l14-linearMSE.pth", "layers.7.weight"),
    "hpsv2": ("HPS_v2.1_compressed.pt", "text_projection"),
    "image_reward": ("ImageReward.pt", "mlp.layers.7.bias"),
    "clip_score": ("model.safetensors", "visual_projection.weight"),
    "clip_contrast": ("model.safetensors", "text_projection.weight"),
    "pickscore": ("model.safetensors", "logit_scale"),
    "motion": ("model.safetensors", "visual_projection.weight"),
    "hpsv3": ("HPSv3.safetensors", "rm_head.5.weight"),
    "video_reward": ("checkpoint-20/model.pth", "base_model.model.rm_head.weight"),
}


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_that_is_not_whole_is_refused(name: str, files: Files, tmp_path: Path) -> None:
    """Without its head, and with a tensor too many."""
    file, head = HEADS[name]
    for case, change in (
        ("lacks", lambda t: t.pop(head)),
        ("does not", lambda t: t.update({"extra": torch.zeros(1)})),
    ):
        folder = tmp_path / case.replace(" ", "_")
        shutil.copytree(files[name]["path"], folder)
        whole = load_file(folder / file) if file.endswith("s") else torch.load(folder / file, weights_only=True)
        change(whole.get("state_dict", whole))
        (save_file if file.endswith("s") else torch.save)(whole, folder / file)
        reward = made(name, files[name] | {"path": str(folder)})
        with pytest.raises(ValueError, match=case):
            reward(inputs(reward, 1), [PROMPT])


def test_adapters_alone_are_merged_into_their_base(files: Files, tmp_path: Path) -> None:
    """The other published layout of video_reward gives the same network; half an adapter does not."""
    keys = files["video_reward"]
    folder = tiny.tiny_video_reward(tmp_path / "adapters", Path(keys["base"]), adapters_alone=True)
    one, two = (
        video_reward.load(path, keys["base"], torch.device("cpu"), torch.float32).modules.state_dict()
        for path in (keys["path"], str(folder))
    )
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    with pytest.raises(ValueError, match="lacks its other half"):
        qwen.merged({"a.weight": torch.zeros(2, 2), "a.lora_A.weight": torch.zeros(1, 2)}, 1.0)
    w, a, b = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    named = {
        "base_model.model.a.base_layer.weight": w,
        "base_model.model.a.lora_A.default.weight": a,
        "base_model.model.a.lora_B.default.weight": b,
    }
    x = torch.randn(5, 4)
    assert torch.allclose(x @ qwen.merged(named, 2.0)["a.weight"].T, x @ w.T + 2 * (x @ a.T) @ b.T, atol=1e-5)


def test_what_a_recipe_gets_wrong_is_refused_before_weights_load(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "short.txt").write_text("{text_prompt} and no token")
    (tmp_path / "other.py").write_text("INSTRUCTION = 3")
    hpsv3, video = files["hpsv3"], files["video_reward"]
    for name, keys, words in (
        ("clip_score", {}, "clip_score.path: required but not given"),
        ("clip_score", {"path": "no/such/folder"}, "neither a local folder nor a hub id"),
        ("clip_score", {"path": str(empty)}, "has no config.json"),
        ("clip_score", {"path": "a/b", "size": 3}, "size"),
        ("pickscore", {"path": files["clip_score"]["path"], "tokenizer": str(empty)}, "tokenizer: .* no tokenizer"),
        ("hpsv2", files["hpsv2"] | {"version": "v2"}, "HPS_v2_compressed.pt"),
        ("hpsv2", files["hpsv2"] | {"version": "v3"}, "hpsv2.version"),
        ("image_reward", {"path": str(empty)}, "ImageReward.pt"),
        ("aesthetic", files["aesthetic"] | {"clip": str(empty)}, "clip: .* has no config.json"),
        (
            "aesthetic",
            {"path": f"{files['aesthetic']['path']}/sac+logos+ava1-l14-linearMSE.pth", "clip": "a/b"},
            "is a file; give its folder",
        ),
        ("hpsv3", hpsv3 | {"template": "nowhere.txt"}, "there is no file"),
        ("hpsv3", hpsv3 | {"template": str(tmp_path / "short.txt")}, "0 times, but must contain it once"),
        ("hpsv3", hpsv3 | {"template": str(tmp_path / "other.py")}, "has no string INSTRUCTION"),
        ("video_reward", video | {"axes": ["VQ", "VQ"]}, "each axis at most once"),
        ("video_reward", video | {"axes": []}, "video_reward.axes"),
        ("video_reward", {k: v for k, v in video.items() if k != "fps"}, "video_reward.fps"),
        ("motion", {"path": str(empty), "method": "raft"}, "raft_small"),
    ):
        with pytest.raises(ValueError, match=words):
            made(name, keys)
    with pytest.raises(ValueError, match="reads frames, but backbone sd3 gives pixels"):
        made("motion", files["motion"]).check(SD3Config("nowhere"))
    with pytest.raises(ValueError, match="reads pixels, but backbone wan gives frames"):
        made("clip_score", files["clip_score"]).check(WanConfig("nowhere"))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package open_clip: pip install 'fastgen-distill\[scores\]'"):
        made("hpsv2", files["hpsv2"])


def test_texts_are_encoded_once_and_few_are_kept(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.rewards.clip.MAX_TEXTS", 2)
    reward: Any = made("clip_score", files["clip_score"])
    clip = load_clip(reward.path, reward.path, torch.device("cpu"))
    clip.texts.known.clear()
    calls: list[list[str]] = []
    encode = clip._encode
    monkeypatch.setattr(clip, "_encode", lambda prompts: (calls.append(list(prompts)), encode(prompts))[1])
    x = inputs(reward, 3)
    first = reward(x, ["a cat", "a dog", "a cat"]).value
    assert torch.equal(first, reward(x, ["a cat", "a dog", "a cat"]).value)
    reward(x, ["a", "b", "c"])
    assert calls == [["a cat", "a dog"], ["a", "b", "c"]] and list(clip.texts.known) == ["b", "c"]
    monkeypatch.setattr("fastgen.rewards.clip.TEXT_BATCH", 2)
    clip.text([f"text {i}" for i in range(5)])
    assert [len(texts) for texts in calls[2:]] == [2, 2, 1]
    assert torch.allclose(
        first[:2], torch.cat([reward(x[i : i + 1], [p]).value for i, p in enumerate(("a cat", "a dog"))])
    )


def test_prompts_and_pictures_matter_and_batches_do_not(files: Files) -> None:
    """Each sample's score is its own: alone, and among others, with its own prompt."""
    for name in ALL:
        reward = made(name, files[name])
        x, prompts = inputs(reward, 2), [PROMPT, "the picture ."]
        with torch.no_grad():
            both = reward(x, prompts)
            alone = torch.cat([reward(x[i : i + 1], prompts[i : i + 1]).value for i in range(2)])
            swapped = reward(x, prompts[::-1]).value
        assert torch.allclose(both.value, alone, rtol=1e-4, atol=1e-5) and bool(both.valid.all())
        assert (name in ("aesthetic", "motion")) == torch.equal(swapped, both.value)
        assert abs(float(both.value[0] - both.value[1])) > 1e-6


def test_the_vision_tower_of_image_reward_is_timms_vit(files: Files) -> None:
    """BLIP's ViT is timm's: the same tensors, under their published names, give the same tokens there."""
    import timm

    from fastgen.rewards.image_reward import load

    folder = files["image_reward"]["path"]
    tensors = torch.load(Path(folder) / "ImageReward.pt", weights_only=True)
    own = load(folder, folder, torch.device("cpu")).modules["vision"]
    vit = timm.models.VisionTransformer(
        img_size=224,
        patch_size=32,
        embed_dim=64,
        depth=2,
        num_heads=1,
        mlp_ratio=1.5,
        num_classes=0,
        class_token=True,
        global_pool="token",
    ).eval()
    prefix = "blip.visual_encoder."
    vit.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    x = torch.randn(2, 3, 224, 224)
    assert torch.allclose(own(pixel_values=x).last_hidden_state, vit.forward_features(x), atol=1e-4)


def test_padding_of_image_rewards_prompts_is_not_read(files: Files) -> None:
    """The text encoder is bidirectional and masked: padded to 35 tokens or not, the first output is the same."""
    from fastgen.rewards.image_reward import load

    network = load(files["image_reward"]["path"], files["image_reward"]["path"], torch.device("cpu"))
    ids, mask = network.tokens("a red cat")
    seen = torch.randn(1, 50, 64)
    text, length = network.modules["text"], int(mask.sum())
    padded = text(input_ids=ids[None], attention_mask=mask[None], encoder_hidden_states=seen).last_hidden_state
    short = text(input_ids=ids[None, :length], encoder_hidden_states=seen).last_hidden_state
    changed = text(input_ids=ids[None, : length - 2], encoder_hidden_states=seen).last_hidden_state
    assert torch.allclose(padded[:, :length], short, atol=1e-4) and len(ids) == 35
    assert not torch.allclose(changed[:, 0], short[:, 0], atol=1e-2)


def test_the_judges_question_comes_from_the_official_file_without_running_it(files: Files) -> None:
    """question.py imports what is not there; two constants are joined."""
    from fastgen.rewards import hpsv3

    text = qwen.read_template(files["hpsv3"]["template"], hpsv3.QUESTION, hpsv3.TOKENS, hpsv3.SOURCE)
    assert text == tiny.QUESTION + "rating : <|Reward|> END"
    reward = made("hpsv3", files["hpsv3"])
    with pytest.raises(ValueError, match=r"contains <\|Reward\|> 2 times"):
        reward(inputs(reward, 1), ["a <|Reward|> cat"])


def test_sizes_and_frames_are_the_authors() -> None:
    """By their code's rules: Qwen2-VL's sizes, and two frames a second, an even number from four on."""
    sizes = [qwen.smart_size(h, w, 200704, 200704) for h, w in ((512, 512), (448, 448), (1024, 576), (100, 90))]
    assert sizes == [(448, 448), (448, 448), (588, 336), (476, 448)]
    assert sizes[-1][0] * sizes[-1][1] > 200704  # rounding up to the least area passes the most: theirs does too
    assert video_reward.frame_indices(81, 16, 2) == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert video_reward.frame_indices(5, 16, 2) == [0, 1, 3, 4]
    assert video_reward.frame_indices(3, 16, 2) == [0, 2]
    with pytest.raises(ValueError, match="in pairs"):
        video_reward.frame_indices(1, 16, 2)


def test_pictures_are_padded_square_and_cropped_in_the_middle() -> None:
    x = torch.ones(1, 3, 224, 100)
    padded = images.longest_side_padded(x, 224)
    assert padded.shape == (1, 3, 224, 224) and padded[0, 0, 0].tolist() == [0.0] * 62 + [1.0] * 100 + [0.0] * 62
    row = torch.arange(227.0).expand(1, 3, 224, 227)
    assert (
        images.center_crop(row, 224)[0, 0, 0, 0] == 1
        and images.center_crop(row, 224, round_half=True)[0, 0, 0, 0] == 2
    )
    assert images.shortest_side(torch.rand(1, 3, 100, 151), 224).shape[2:] == (224, 338)


# --- motion


def test_motion_of_features_in_closed_form() -> None:
    """Still: 0. Steady: half the squared step and no jerk. Independent frames: s^2 and three times it."""
    steady = torch.arange(6.0)[:, None] * torch.tensor([0.3, 0.4])
    assert [float(v) for v in feature_motion(torch.ones(5, 2))] == [0, 0]
    assert [float(v) for v in feature_motion(steady)] == pytest.approx([0.125, 0], abs=1e-9)
    noise = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0))
    assert [float(v) for v in feature_motion(noise)] == pytest.approx([4, 12], rel=0.03)


def test_motion_of_flow_grows_with_speed_and_not_with_noise() -> None:
    def shift(k: float) -> tuple[Tensor, Tensor]:
        forward = torch.zeros(4, 2, 32, 32)
        forward[:, 0] = k
        return forward, -forward

    moved = [float(flow_motion(*shift(k))[0]) for k in (0, 1, 2, 4)]
    diagonal = 32 * 2**0.5
    assert moved == pytest.approx([k / diagonal for k in (0, 1, 2, 4)]) and float(flow_motion(*shift(4))[1]) == 0
    random = 8 * torch.randn(2, 4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    change, _ = flow_motion(random[0], random[1])
    print(f"flow that does not lead home: {float(change):.4f}")
    assert float(change) < moved[1]
    flow = random[0].clone().requires_grad_()
    flow_motion(flow, -flow)[0].backward()
    assert flow.grad is not None and bool(flow.grad.isfinite().all())


@pytest.mark.slow
def test_raft_is_read_strictly_and_gradient_reaches_the_frames(tmp_path: Path) -> None:
    folder = tiny.tiny_raft(tmp_path / "raft")
    reward = made("motion", {"path": str(folder), "method": "raft"})
    x = inputs(reward, 1, (128, 128))[:, :4].requires_grad_()
    score = reward(x, [""])
    score.value.sum().backward()
    assert x.grad is not None and bool((x.grad.flatten(2).abs().amax(2) > 0).all())
    assert set(score.parts) == {"change", "jerk"} and len(reward.facts()["weights"]) == 1
    with pytest.raises(ValueError, match="at least 4 frames"):
        reward(x[:, :3], [""])
    file = next(folder.glob("*.pth"))
    whole = torch.load(file, weights_only=True)
    whole.pop("update_block.flow_head.conv2.weight")
    (tmp_path / "cut").mkdir()
    torch.save(whole, tmp_path / "cut" / file.name)
    with pytest.raises(ValueError, match=r"lacks update_block\.flow_head\.conv2\.weight"):
        made("motion", {"path": str(tmp_path / "cut"), "method": "raft"})(x, [""])


def test_texts_of_a_contrast(files: Files) -> None:
    """The prompt takes its place, exchanged texts give the other probability, and texts that say nothing are
    refused."""
    keys = files["clip_contrast"]
    reward, other = (
        made("clip_contrast", keys),
        made("clip_contrast", {**keys, "towards": keys["away"], "away": keys["towards"]}),
    )
    x = inputs(reward, 2)
    p, q = (r(x, ["a red apple", "a boat"]).value.exp() for r in (reward, other))
    assert torch.allclose(p + q, torch.ones(2), atol=1e-5)
    assert not torch.equal(p, reward(x, ["a boat", "a red apple"]).value.exp())
    assert reward.reads_prompts and not made("clip_contrast", keys | {"towards": "flat", "away": "3d"}).reads_prompts
    for change, words in (
        ({"away": keys["towards"]}, "same text"),
        ({"towards": " "}, "give a text"),
        ({"towards": "{name}"}, "stands for"),
    ):
        with pytest.raises(ValueError, match=words):
            made("clip_contrast", keys | change)


OTHER_FILES = {
    "hpsv2": ["open_clip_config.json"],
    "image_reward": ["med_config.json", "vocab.txt"],
    "aesthetic": ["config.json"],
    "motion": ["config.json"],
    "hpsv3": ["chat_template.jinja", "config.json", "question.py", "tokenizer.json"],
    "video_reward": ["chat_template.jinja", "config.json", "model_config.json", "question.txt", "tokenizer.json"],
}


@pytest.mark.parametrize("name", ALL)
def test_what_decides_a_score_besides_weights_is_among_its_facts(name: str, files: Files) -> None:
    """A stored number is that of a scorer only as long as its configs, tokenizer and question stay as they are."""
    reward = made(name, files[name])
    facts, others = reward.facts(), reward.other_files()
    assert {f.name for f in others} >= set(OTHER_FILES.get(name, ["config.json", "tokenizer.json"]))
    for file in others:
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert reward.facts() != facts, file
        file.write_bytes(content)
    assert reward.facts() == facts


# --- the published checkpoints


def hub(name: str) -> Reward:
    keys: Files = {
        "clip_score": {"path": "openai/clip-vit-large-patch14"},
        "clip_contrast": {"path": "openai/clip-vit-large-patch14", "towards": "a drawing", "away": "a photograph"},
        "pickscore": {"path": "yuvalkirstain/PickScore_v1"},
        "hpsv2": {"path": "xswu/HPSv2"},
        "image_reward": {"path": "THUDM/ImageReward"},
        "aesthetic": {
            "path": os.environ.get("AESTHETIC_HEAD", "weights/aesthetic"),
            "clip": "openai/clip-vit-large-patch14",
        },
    }
    return made(name, keys[name])


@pytest.mark.hub
@pytest.mark.parametrize("name", CLIP_SIZED)
def test_published_weights_score_as_their_libraries_do(name: str) -> None:
    """Needs HF_HUB_OFFLINE=0, and for aesthetic the head's folder in AESTHETIC_HEAD."""
    assert_parity(name, hub(name), photographs())


@pytest.mark.hub
@torch.no_grad()
def test_image_reward_of_its_authors_example(tmp_path: Path) -> None:
    """The four pictures, and the scores, of the authors' README."""
    published = (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492)
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    source = "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images"
    for i, score in enumerate(published, 1):
        urlretrieve(f"{source}/{i}.webp", tmp_path / f"{i}.webp")
        x = pixels(Image.open(tmp_path / f"{i}.webp").convert("RGB"))[None]
        assert float(hub("image_reward")(x, [prompt]).value) == pytest.approx(score, abs=0.02)
