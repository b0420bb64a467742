"""A running video on tiny real Wan pipelines: the decoder, the stream, the pipeline, its export, and the command."""

import dataclasses
import json
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from test_streaming_training import recipe
from test_two_time import fill_inputs
from tiny_wan import CHANNELS, TEXT_WIDTH, autoencoder, tiny_wan, transformer
from torch import Tensor
from variants import slow

from fastgen.backbones.wan import Wan, WanConfig, WanDenoiser
from fastgen.batch import Conditioning, Draws
from fastgen.pipelines.streaming import StreamingWanPipeline, seeds_of
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, load_sampler
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkAttention, ChunkSchedule
from fastgen.streaming.stream import Stream, VideoDecoder, with_window
from fastgen.train import train

SIZE = {"height": 32, "width": 32, "max_sequence_length": 16}
CHUNKS = ChunkSchedule(frames=2, first=1, window=5, sink=1)
POLICY = RolloutPolicy((1.0, 0.6), chunks=CHUNKS)
CPU = torch.device("cpu")


def residual_autoencoder() -> AutoencoderKLWan:
    """Of the kind that Wan 2.2 TI2V-5B has."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, -0.3, 0.4],
        latents_std=[1.5, 0.7, 2.0, 1.1],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "teacher", layers=2, time_scale=1e-3)


def backbone(folder: Path, latents: int = 5) -> Wan:
    return WanConfig(path=str(folder), num_frames=4 * latents - 3, **SIZE).build(CPU, torch.float32, 0)


def exported(teacher: Path, folder: Path, policy: RolloutPolicy = POLICY) -> Path:
    source = backbone(teacher)
    source.config.check_export(policy)
    source.save_pipeline(source.load("student"), policy, folder)
    return folder


@pytest.fixture(scope="module")
def export(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(teacher, tmp_path_factory.mktemp("wan") / "export")


@pytest.fixture(scope="module")
def pipeline(export: Path) -> StreamingWanPipeline:
    return StreamingWanPipeline.from_pretrained(export)


def with_policy(pipeline: StreamingWanPipeline, policy: RolloutPolicy = POLICY, **chunks: Any) -> StreamingWanPipeline:
    """The same networks, sampled with another schedule."""
    policy = dataclasses.replace(policy, chunks=dataclasses.replace(CHUNKS, **chunks))
    config = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    scheduler = type(pipeline.scheduler)(**config | {"policy": dataclasses.asdict(policy)})
    return StreamingWanPipeline(**pipeline.components | {"scheduler": scheduler})


def largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def blocks(stream: Stream) -> list[Tensor]:
    return [tensor for block in stream.context.blocks for tensor in (block.keys, block.values)]


# --- the decoder


@pytest.mark.parametrize("kind", ["Wan 2.1", "Wan 2.2"])
@pytest.mark.parametrize(
    "split",
    [pytest.param((3, 3, 3), marks=pytest.mark.slow), (1, 2, 6), pytest.param((1,) * 9, marks=pytest.mark.slow)],
)
def test_decoding_in_parts_is_decoding_the_whole(kind: str, split: tuple[int, ...]) -> None:
    """For two streams at a time on one VAE, which decodes whole videos in between."""
    torch.manual_seed(0)
    vae = (autoencoder if kind == "Wan 2.1" else residual_autoencoder)().requires_grad_(False)
    latents = [torch.randn(1, 9, CHANNELS, 4, 4), 3 * torch.randn(1, 9, CHANNELS, 4, 4)]
    mean, std = (torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    whole = [
        (vae.decode((z * std + mean).transpose(1, 2)).sample / 2 + 0.5).transpose(1, 2).clamp(0, 1) for z in latents
    ]
    decoders = [VideoDecoder(vae), VideoDecoder(vae)]
    parts: list[list[Tensor]] = [[], []]
    for step, (a, b) in enumerate(zip(*(z.split(split, dim=1) for z in latents), strict=True)):
        parts[0].append(decoders[0](a))
        vae.decode(a.transpose(1, 2))
        parts[1].append(decoders[1](b))
        assert parts[0][-1].shape[1] == 4 * split[step] - 3 * (step == 0)
    errors = [largest(torch.cat(part, dim=1), video) for part, video in zip(parts, whole, strict=True)]
    print(f"largest pixel differences {errors}, of pictures between {whole[1].min():.2f} and {whole[1].max():.2f}")
    assert max(errors) <= 1e-5
    assert whole[1].std() > 0.05


@pytest.mark.parametrize("kind", ["Wan 2.1", "Wan 2.2"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_stored_decoder_goes_on(kind: str, first: int) -> None:
    """After one latent, some layers have a mark instead of a memory."""
    torch.manual_seed(0)
    vae = (autoencoder if kind == "Wan 2.1" else residual_autoencoder)().requires_grad_(False)
    latents = torch.randn(1, 5, CHANNELS, 4, 4)
    whole, half, rest = VideoDecoder(vae)(latents), VideoDecoder(vae), VideoDecoder(vae)
    start = half(latents[:, :first])
    rest.load_state_dict({name: value.clone() for name, value in half.state_dict().items()})
    assert torch.equal(torch.cat([start, rest(latents[:, first:])], dim=1), whole)


# --- stream, pipeline and sampler


@pytest.mark.parametrize(
    "chunks",
    [
        slow({}),
        {"first": 2, "frames": 2, "sink": 2, "window": 6, "sink_decay": 0.5},
        slow({"context_noise": 0.1}),
    ],
)
def test_stream_pipeline_and_sampler_give_the_same_video(
    chunks: dict[str, Any], teacher: Path, pipeline: StreamingWanPipeline
) -> None:
    prompts, seeds = ["a cat runs", "a blue dog"], [3, 4]
    ours = with_policy(pipeline, **chunks)
    length = 7 if ours.policy.chunks.chunk_at(0).stop == 1 else 8
    source = backbone(teacher, length)
    sampler = Sampler(source, source.load("teacher"), ours.policy)
    latents, video = sampler.latents(prompts, seeds), sampler.sample(prompts, seeds)
    count = {"num_frames": 4 * length - 3, "seed": 3}
    assert torch.equal(ours(prompts, output_type="latent", **count).frames.transpose(1, 2), latents)
    whole = ours(prompts, output_type="pt", **count).frames
    error = largest(whole, video)
    print(f"largest difference of the pictures to the sampler's {error:.2g}")
    assert error <= 1e-5 and whole.shape == (2, 4 * length - 3, 3, 32, 32)

    one = ours(prompts[0], output_type="pt", **count).frames[0]
    pictures = [next(stream) for stream in [ours.stream(prompts[0], seed=3)] for _ in range(4)]
    assert [len(part) for part in pictures] == [4 * ours.policy.chunks.chunk_at(0).stop - 3, 8, 8, 8]
    assert torch.equal(torch.cat(pictures), one)
    assert largest(one, whole[0]) <= 1e-5
    assert whole.dtype == torch.float32 and whole.min() >= 0 and whole.max() <= 1
    assert largest(whole[0], whole[1]) > 1e-3


def test_the_call_is_that_of_a_diffusers_pipeline(pipeline: StreamingWanPipeline) -> None:
    arrays = pipeline("a cat", seed=1).frames
    assert arrays.shape == (1, 17, 32, 32, 3)
    assert torch.equal(torch.from_numpy(arrays).permute(0, 1, 4, 2, 3), pipeline("a cat", seed=1, output_type="pt")[0])
    pictures = pipeline("a cat", seed=1, num_frames=9, output_type="pil", return_dict=False)[0]
    assert len(pictures[0]) == 9 and pictures[0][0].size == (32, 32)
    generators = [torch.Generator().manual_seed(i) for i in (1, 1, 2)]
    a, b, c = (pipeline("a cat", generator=g, num_frames=1).frames for g in generators)
    assert (a == b).all() and not (a == c).all()
    assert not (a == pipeline("a cat", generator=generators[0], num_frames=1).frames).all()
    torch.manual_seed(5)
    drawn = seeds_of(2, None, None)
    torch.manual_seed(5)
    assert drawn == seeds_of(2, None, None) and drawn[0] != drawn[1]
    wide = pipeline("a cat", width=64, num_frames=1, num_inference_steps=2, guidance_scale=1.0).frames
    assert wide.shape == (1, 1, 32, 64, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_frames": 13}, "4 latent frames do not divide .* nearest lengths are 3 or 5"),
        ({"num_frames": 12}, r"4 k \+ 1"),
        ({"height": 40}, "height must be a multiple of 16"),
        ({"num_inference_steps": 50}, "distilled to 2 steps"),
        ({"num_inference_steps": 0}, "distilled to 2 steps"),
        ({"first_steps": 4}, "only a flow map takes others"),
        ({"guidance_scale": 5.0}, "without guidance"),
        ({"seed": [1, 2]}, "1 prompts need 1 seeds, got 2"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_calls_that_are_refused(call: dict[str, Any], words: str, pipeline: StreamingWanPipeline) -> None:
    with pytest.raises(ValueError, match=words):
        pipeline("a cat", **call)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [ChunkAttention(), slow(ChunkAttention(layout="top_k", density=0.5, tile=16))])
def test_no_chunk_reads_a_number_back_from_the_device(attention: ChunkAttention) -> None:
    """On the meta device, which has no numbers, reading one raises. On a GPU, the host would wait for it."""
    with torch.device("meta"):
        student, vae = WanDenoiser(transformer(2, 1e-3)), autoencoder()
    with pytest.raises(RuntimeError, match="meta"):
        next(vae.parameters()).sum().item()
    chunks = dataclasses.replace(CHUNKS, context_noise=0.1, attention=attention)
    cond = Conditioning({"prompt_embeds": torch.zeros(1, 6, TEXT_WIDTH, device="meta")})
    noise = Draws(torch.zeros(1, dtype=torch.int64, device="meta"), (2, CHANNELS, 4, 4), "sample")
    policy = dataclasses.replace(POLICY, chunks=chunks)
    stream = Stream(student, policy, noise, lambda _: cond, "a cat", VideoDecoder(vae))
    for pictures in islice(stream, 4):
        assert pictures.is_meta
    stream.recache()
    assert next(stream).shape == (8, 3, 32, 32)


# --- prompts


def test_a_prompt_changes_what_follows(pipeline: StreamingWanPipeline) -> None:
    """From the next chunk on; the chunks before stay, also where they are still to be committed."""
    plain, changed = (pipeline.stream("a cat runs", seed=2) for _ in range(2))
    before = [next(plain) for _ in range(3)]
    assert all(torch.equal(a, next(changed)) for a in before)
    changed.prompt = "a blue dog"
    assert changed.prompt == "a blue dog"
    plain.commit()
    changed.commit()
    assert all(torch.equal(a, b) for a, b in zip(blocks(plain), blocks(changed), strict=True))
    assert largest(next(plain), next(changed)) > 1e-3


@pytest.mark.parametrize(
    "chunks",
    [
        {"window": None, "sink": 0},
        {"window": 9},
        {"positions": "absolute", "window": 9},
        {"order": "step", "window": 9},
    ],
)
def test_recache_with_the_same_prompt_gives_the_same_context(
    chunks: dict[str, Any], pipeline: StreamingWanPipeline
) -> None:
    """While nothing has left the window."""
    stream = with_policy(pipeline, **chunks, context_noise=0.1).stream("a cat runs", seed=2)
    list(islice(stream, 3))
    stream.commit()
    before = blocks(stream)
    stream.recache()
    assert all(torch.equal(a, b) for a, b in zip(blocks(stream), before, strict=True))
    stream.prompt = "a blue dog"
    stream.recache()
    assert all(largest(a, b) > 1e-3 for a, b in zip(blocks(stream)[2:], before[2:], strict=True))
    assert stream.context.frames == 5 and len(next(stream)) == 8


@pytest.mark.parametrize("chunks", [{}, {"first": 2, "sink": 1, "window": 6}, {"sink": 0, "window": 4}])
def test_recache_is_a_video_of_the_frames_that_are_kept(
    chunks: dict[str, Any], pipeline: StreamingWanPipeline
) -> None:
    """After evictions too, the sink included: each block is committed in order, given those before it, at the place
    where the next chunk sees it. The same frames, numbered without a gap, give that in a context that keeps all."""
    stream = with_policy(pipeline, **chunks).stream("a cat runs", seed=2)
    list(islice(stream, 6))
    stream.prompt = "a blue dog"
    stream.recache()
    held = [block.frames for block in stream.context.blocks]
    assert sum(map(len, held)) == stream.context.chunks.window - 2
    assert (held[0].start == 0) == bool(stream.context.chunks.sink)
    assert sorted(stream.kept) == [frame for frames in held for frame in frames]
    start, again = 0, Context(ChunkSchedule())
    for frames in held:
        own = ChunkSchedule(frames=len(frames))
        again = dataclasses.replace(again, chunks=own, frames=start)
        x0 = torch.stack([stream.kept[f][-1] for f in frames], dim=1)
        again = stream.denoiser.commit(x0, torch.zeros(1), stream.cond, again)
        start += len(frames)
    expected = [tensor for block in again.blocks for tensor in (block.keys, block.values)]
    errors = [largest(a, b) for a, b in zip(blocks(stream), expected, strict=True)]
    assert max(errors) < 1e-5
    assert len(next(stream)) == 8


def test_an_averaged_sink_cannot_be_computed_again(pipeline: StreamingWanPipeline) -> None:
    stream = with_policy(pipeline, first=2, sink=2, window=6, sink_decay=0.5).stream("a cat")
    next(stream)
    with pytest.raises(ValueError, match=r"averaged sink .* frames that are gone"):
        stream.recache()


# --- saving


@pytest.mark.parametrize("made", [slow(0), slow(1), 2, slow(5)])
@pytest.mark.parametrize(
    "chunks",
    [{}, {"first": 2, "sink": 2, "window": 6, "sink_decay": 0.5, "context_noise": 0.1}, {"order": "step"}],
)
def test_a_saved_stream_continues_to_the_same_bits(
    made: int, chunks: dict[str, Any], pipeline: StreamingWanPipeline, tmp_path: Path
) -> None:
    ours = with_policy(pipeline, **chunks)
    whole, stream = (ours.stream("a cat runs", seed=7, height=16, width=32) for _ in range(2))
    for _ in range(made):
        assert torch.equal(next(whole), next(stream))
    whole.prompt = stream.prompt = "a blue dog"
    save_file(stream.state_dict(), tmp_path / "stream.safetensors")
    again = ours.resume(tmp_path / "stream.safetensors")
    for _ in range(3):
        pictures = next(whole)
        assert torch.equal(next(again), pictures) and torch.equal(next(stream), pictures)
    assert again.prompt == "a blue dog"
    if not chunks:
        again.recache()
        whole.recache()
        assert torch.equal(next(again), next(whole))


def test_a_stream_of_another_student_is_refused(pipeline: StreamingWanPipeline, tmp_path: Path) -> None:
    stream, file = pipeline.stream("a cat"), tmp_path / "stream.safetensors"
    next(stream)
    save_file(stream.state_dict(), file)
    with pytest.raises(ValueError, match="was saved with policy"):
        with_policy(pipeline, context_noise=0.1).resume(file)
    state = load_file(file)
    other = pipeline.stream("a cat", width=64)
    with pytest.raises(ValueError, match="was saved with latents"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="no stream: 'latents' is missing"):
        pipeline.stream("a cat").load_state_dict({k: v for k, v in state.items() if k != "decoder.latents"})
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no saved stream"):
        pipeline.resume(file)


# --- windows


def test_other_windows_have_to_be_forced(pipeline: StreamingWanPipeline, tmp_path: Path) -> None:
    assert with_window(POLICY, 5, 1, False) == with_window(POLICY, None, None, False) == POLICY
    for wanted in ({"window": 7}, {"sink": 0}):
        with pytest.raises(
            ValueError, match=r"trained with a window of 5 latent frames and a sink of 1, and a window"
        ):
            pipeline.stream("a cat", **wanted)
    with pytest.raises(ValueError, match="cannot hold a sink of 1 and a chunk of 2; set window to at least 3"):
        pipeline.stream("a cat", window=2, force=True)
    stream = pipeline.stream("a cat", window=9, sink=2, force=True)
    list(islice(stream, 6))
    save_file(stream.state_dict(), tmp_path / "stream.safetensors")
    assert sum(len(block.frames) for block in stream.context.blocks) == 7
    assert torch.equal(next(pipeline.resume(tmp_path / "stream.safetensors")), next(stream))
    with pytest.raises(ValueError, match="makes videos whole"):
        with_window(RolloutPolicy((1.0,)), None, None, False)


def test_a_stream_without_a_window_says_that_it_grows(
    pipeline: StreamingWanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with_policy(pipeline, window=None, sink=0).stream("a cat")
    assert "sees its whole past" in caplog.text and "after 17 pictures" in caplog.text


# --- exports


def test_plain_diffusers_refuses_an_export(export: Path) -> None:
    index = json.loads((export / "model_index.json").read_text())
    assert index["_class_name"] == "StreamingWanPipeline"
    with pytest.raises(AttributeError, match="StreamingWanPipeline"):
        DiffusionPipeline.from_pretrained(export)
    stock = WanPipeline.from_pretrained(export)
    with pytest.raises(ValueError, match=r"load it with fastgen\.pipelines\.streaming"):
        stock("a cat", height=32, width=32, num_frames=5)


def test_a_folder_that_is_no_export_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match="scheduler is a FlowMatchEulerDiscreteScheduler"):
        StreamingWanPipeline.from_pretrained(teacher)


def test_networks_are_not_moved_while_they_stream(pipeline: StreamingWanPipeline) -> None:
    for move in (pipeline.enable_model_cpu_offload, pipeline.enable_sequential_cpu_offload):
        with pytest.raises(ValueError, match="stay on its device"):
            move()


def test_an_export_keeps_its_schedule_when_it_is_saved_again(pipeline: StreamingWanPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "again")
    again = StreamingWanPipeline.from_pretrained(tmp_path / "again")
    assert again.policy == POLICY and again.trained("num_frames") == 17
    assert torch.equal(next(again.stream("a cat", seed=1)), next(pipeline.stream("a cat", seed=1)))


def test_two_experts_stream(tmp_path: Path) -> None:
    source = tiny_wan(tmp_path / "wan", experts=2, layers=2, time_scale=1e-3)
    pipeline = StreamingWanPipeline.from_pretrained(exported(source, tmp_path / "export"))
    model = backbone(source)
    expected = Sampler(model, model.load("teacher"), POLICY).latents(["a cat runs"], [3])
    latents = pipeline("a cat runs", seed=3, output_type="latent").frames.transpose(1, 2)
    assert torch.equal(latents, expected)


def test_a_flow_map_of_chunks_streams_with_any_number_of_steps(teacher: Path, tmp_path: Path) -> None:
    """Its weights for the end of the jump lie beside the networks. The folder alone gives the same video."""
    policy, source = RolloutPolicy((1.0, 0.6), "ode", two_time=True, chunks=CHUNKS), backbone(teacher)
    student = source.load("student")
    student.add_inputs({}, source.time_dim, policy.inputs)
    fill_inputs(student)
    source.config.check_export(policy)
    source.save_pipeline(student, policy, tmp_path / "export")
    pipeline = StreamingWanPipeline.from_pretrained(tmp_path / "export")
    for steps in (2, 3):
        expected = Sampler(source, student, policy.with_steps(steps)).latents(["a cat runs"], [3])
        latents = pipeline("a cat runs", seed=3, output_type="latent", num_inference_steps=steps).frames
        assert torch.allclose(latents.transpose(1, 2), expected, atol=1e-6)
        whole = pipeline("a cat runs", seed=3, output_type="pt", num_inference_steps=steps).frames[0]
        stream = pipeline.stream("a cat runs", seed=3, num_inference_steps=steps)
        first = next(stream)
        save_file(stream.state_dict(), tmp_path / "stream.safetensors")
        resumed = pipeline.resume(tmp_path / "stream.safetensors")
        assert resumed.policy.num_steps == steps
        for going in (stream, resumed):
            assert torch.allclose(torch.cat([first, next(going)]), whole[:9], atol=1e-5)
    levels = policy.with_steps(5).timesteps
    enhanced = dataclasses.replace(policy, chunks=dataclasses.replace(CHUNKS, first_timesteps=levels)).with_steps(1)
    assert enhanced.timesteps == (1.0,) and len(levels) == 5
    steps: dict[str, Any] = {"num_inference_steps": 1, "first_steps": 5}
    made = pipeline("a cat", seed=1, output_type="latent", **steps).frames.transpose(1, 2)
    assert torch.allclose(made, Sampler(source, student, enhanced).latents(["a cat"], [1]), atol=1e-6)
    stream = pipeline.stream("a cat", seed=1, **steps)
    next(stream)
    save_file(stream.state_dict(), tmp_path / "stream.safetensors")
    assert torch.equal(next(pipeline.resume(tmp_path / "stream.safetensors")), next(stream))
    with pytest.raises(ValueError, match="0 are asked for"):
        pipeline.stream("a cat", num_inference_steps=0)
    own = with_policy(pipeline, policy, first_timesteps=(1.0, 0.9, 0.8, 0.7, 0.3))  # on no grid
    for count in ({}, {"first_steps": 3}, {"num_inference_steps": 3}):
        stream = own.stream("a cat", seed=1, **count)
        next(stream)
        save_file(stream.state_dict(), tmp_path / "stream.safetensors")
        resumed = own.resume(tmp_path / "stream.safetensors")
        assert resumed.policy == stream.policy and torch.equal(next(resumed), next(stream))
    stored = source.load_exported(tmp_path / "export")
    assert torch.allclose(
        Sampler(source, stored, policy).latents(["a cat"], [1]),
        pipeline("a cat", seed=1, output_type="latent").frames.transpose(1, 2),
        atol=1e-6,
    )
    plain = RolloutPolicy((1.0, 0.6), "ode", chunks=CHUNKS)
    other = Sampler(source, source.load("teacher"), plain).latents(["a cat runs"], [3])
    assert not torch.allclose(Sampler(source, student, policy).latents(["a cat runs"], [3]), other, atol=1e-3)
    (tmp_path / "export/inputs.safetensors").unlink()
    with pytest.raises(ValueError, match=r"inputs\.safetensors cannot be read"):
        StreamingWanPipeline.from_pretrained(tmp_path / "export")


@pytest.mark.slow
def test_a_run_with_adapters_exports_a_pipeline_whose_card_works(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter on its own could not say that it works in chunks. The code of the model card is run as it stands."""
    adapters = {"student": {"rank": 2}, "fake_score": {"rank": 2}}
    made = recipe(teacher, tmp_path / "run", {"name": "dmd2", "fake_updates": 1}, lora=adapters)
    folder = train(made) / "export"
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (tmp_path / "video.mp4").is_file() and names["stream"].prompt == "another prompt"
    assert names["video"].shape == (9, 32, 32, 3) and names["pictures"].shape == (1, 3, 32, 32)
    sampler = load_sampler(folder)
    expected = sampler.sample(["a prompt"], [0])[0].permute(0, 2, 3, 1)
    assert largest(torch.from_numpy(names["video"]), expected) <= 1e-5
    base = backbone(teacher, 3)
    plain = Sampler(base, base.load("teacher"), sampler.policy).sample(["a prompt"], [0])[0]
    assert largest(plain.permute(0, 2, 3, 1), expected) > 1e-4  # the adapter is in the weights


@pytest.mark.slow
def test_a_thousand_chunks_at_flat_memory_and_pace(pipeline: StreamingWanPipeline) -> None:
    """Resident memory at chunk 1,000 is within 1 % of that at chunk 50. The seconds are those of the processor. As a
    machine is not equally fast all the time, chunks 50 to 150 of a second stream take turns with chunks 900 to 1,000
    of the first."""
    ours, process = with_policy(pipeline, first=1, frames=1, window=3, sink=1), psutil.Process()

    def seconds(stream: Stream) -> float:
        began = time.process_time()
        next(stream)
        return time.process_time() - began

    late, early = (ours.stream("a cat", seed=seed) for seed in (0, 1))
    first, memory = list[float](), dict[int, int]()
    for chunk in range(900):
        first.append(seconds(late))
        memory[chunk] = process.memory_info().rss
    list(islice(early, 50))
    pairs = [(seconds(early), seconds(late)) for _ in range(100)]
    memory[1000] = process.memory_info().rss
    early_median, late_median = (statistics.median(values) for values in zip(*pairs, strict=True))
    in_order = late_median / statistics.median(first[50:150])
    print("resident MB", {chunk: round(memory[chunk] / 1e6, 1) for chunk in (50, 500, 899, 1000)})
    print(f"median of a chunk: {1000 * early_median:.1f} ms at 50 to 150, {1000 * late_median:.1f} ms at 900 to 1000")
    print(f"ratio {late_median / early_median:.3f} in turns, {in_order:.3f} one after the other")
    assert memory[1000] <= 1.01 * memory[50]
    assert late_median <= 1.25 * early_median
    assert late.context.frames == 999 and late.context.nbytes == early.context.nbytes
