"""Measures how fast a causal Wan student streams at full size, with random weights, so that nothing is downloaded.

    python benchmarks/streaming/measure.py --compile --compile-vae --no-syncs --output benchmarks/streaming/rows.jsonl
    python benchmarks/streaming/measure.py --tiny --chunks 6   # tries the program on a CPU, within a minute

The networks have the shapes of a model whose configurations ship with fastgen, by default Wan 2.1 1.3B. The program
prints a row and, with --output, appends it to a table (benchmarks/rows.py): pictures per second of denoising alone,
with the commit, with the VAE, and with the written file, each over all chunks after the warm-up; the median and the
95th percentile of a chunk; the seconds to the first pictures, of a second stream in the same process, which finds
everything compiled; memory, and how much it changed from the first chunk measured to the last. With --no-syncs, torch
raises an error where the host would wait for the GPU while a chunk is made; writing the file waits."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.families import fill
from benchmarks.rows import append_row
from fastgen.backbones.wan import Wan, WanConfig
from fastgen.batch import Conditioning, Draws
from fastgen.denoiser import Denoiser
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.speed import Speed, Timer, peak_memory
from fastgen.sampling.stream import timed_chunks
from fastgen.sampling.video import video_writer
from fastgen.streaming.compiled import compile_blocks
from fastgen.streaming.schedule import ChunkAttention, ChunkSchedule
from fastgen.streaming.stream import Stream, VideoDecoder

ROOT = Path(__file__).resolve().parents[2]
TINY = {  # the same kinds of networks, small enough for a CPU
    "transformer": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256},
    "vae": {"base_dim": 8},
}
SHIFT = 5.0  # of the levels, as in Self Forcing
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
KEPT = ("model", "height", "width", "frames", "window", "sink", "steps", "density", "dtype", "sdpa", "compile")


def levels(steps: int) -> tuple[float, ...]:
    uniform = (1 - i / steps for i in range(steps))
    return tuple(SHIFT * u / (1 + (SHIFT - 1) * u) for u in uniform)


def make_networks(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Denoiser, Any]:
    """The transformer and the VAE, with random weights."""
    config = WanConfig(path=options.model).unloaded()
    assert isinstance(config, WanConfig)
    backbone = Wan(config, device, dtype)
    sizes = TINY if options.tiny else {"transformer": {}, "vae": {}}
    backbone.network_config.update(sizes["transformer"])
    denoiser = backbone.make_empty(dtype).requires_grad_(False).eval()
    fill(denoiser, device)
    with torch.device(device):
        vae = AutoencoderKLWan.from_config({**backbone.vae_config, **sizes["vae"]})
    vae = vae.to(dtype).requires_grad_(False).eval()
    vae.encoder = None
    if options.channels_last:
        for module in vae.modules():
            if isinstance(module, nn.Conv3d | nn.Conv2d):
                module.to(memory_format=torch.channels_last_3d if module.weight.dim() == 5 else torch.channels_last)
    if options.compile:
        compile_blocks(denoiser.network, dynamic=False)
    if options.compile_vae:
        vae.decoder.compile(dynamic=False)
    return denoiser, vae


def new_stream(options: argparse.Namespace, denoiser: Denoiser, vae: Any, dtype: torch.dtype) -> Stream:
    attention = ChunkAttention()
    if options.density is not None:
        attention = ChunkAttention(layout="top_k", density=options.density)
    chunks = ChunkSchedule(frames=options.frames, window=options.window, sink=options.sink, attention=attention)
    network, scale = denoiser.network.config, vae.config.scale_factor_spatial
    shape = (options.frames, network.in_channels, options.height // scale, options.width // scale)
    device = vae.device
    text = torch.randn(1, 512, network.text_dim, device=device, dtype=dtype)
    cond, ids = Conditioning({"prompt_embeds": text}), torch.zeros(1, dtype=torch.int64, device=device)
    policy = RolloutPolicy(levels(options.steps), chunks=chunks)
    return Stream(denoiser, policy, Draws(ids, shape, "sample", dtype), lambda _: cond, "", VideoDecoder(vae))


@contextmanager
def without_syncs(wanted: bool) -> Iterator[None]:
    """Inside, torch raises an error where the host would wait for the GPU."""
    if not wanted:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def dense_attention(name: str) -> AbstractContextManager[Any]:
    """Prefers a kernel where it can do the call: none of them has the VAE's one head of 384 channels."""
    if name == "auto":
        return nullcontext()
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([SDPA[name], *others], set_priority=True)


def memory_now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    denoiser, vae = make_networks(options, device, dtype)
    timer, speed, memory = Timer(device), Speed(), list[int]()
    warm = options.window // options.frames + 3  # the window is full, and everything is compiled
    with (
        dense_attention(options.sdpa),
        tempfile.TemporaryDirectory() as folder,
        video_writer(Path(folder) / "out.mp4", 16, playable=True) as append,
    ):
        stream = new_stream(options, denoiser, vae, dtype)
        made = timed_chunks(stream, (), False, 16, timer)
        for _ in range(warm):
            append(next(made)[0])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(options.chunks):
            with without_syncs(options.no_syncs):
                pictures, moments = next(made)
            append(pictures)
            speed.add(len(pictures), timer.seconds([*moments, timer.now()]))
            memory.append(memory_now(device))
        peak = peak_memory(device)
        second = new_stream(options, denoiser, vae, dtype)
        began = time.perf_counter()
        next(second).cpu()
        first_pictures = time.perf_counter() - began
    speed.chunks.insert(0, speed.chunks[0])  # a report leaves out the first chunk, which the warm-up did already
    report = speed.report()
    return {
        "name": options.name or default_name(options),
        "device": torch.cuda.get_device_name(device) if timer.cuda else "cpu",
        **report,
        "chunks": options.chunks,
        "first_picture_seconds": first_pictures,
        **peak,
        "memory_change_bytes": memory[-1] - memory[0],
        "context_bytes": stream.context.nbytes,
        "decoder_bytes": sum(t.nbytes for t in stream.decoder.memory if isinstance(t, torch.Tensor)),
        "checked_for_syncs": options.no_syncs,
        "compile_vae": options.compile_vae,
        "channels_last": options.channels_last,
        "tiny": options.tiny,
        **{key: getattr(options, key) for key in KEPT},
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
    }


def default_name(options: argparse.Namespace) -> str:
    parts = [Path(options.model).name, f"w{options.window}", f"{options.steps} steps", options.dtype]
    parts += ["compiled"] * options.compile + ["compiled VAE"] * options.compile_vae
    parts += ["channels last"] * options.channels_last
    parts += [options.sdpa] * (options.sdpa != "auto") + ["tiny"] * options.tiny
    return ", ".join([*parts, *([f"density {options.density}"] if options.density else [])])


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="a model whose configs ship")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int, default=3, help="latent frames of a chunk")
    parser.add_argument("--window", type=int, default=9, help="latent frames that a chunk sees, itself included")
    parser.add_argument("--sink", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--density", type=float, help="keep this share of the visible tiles (top_k)")
    parser.add_argument("--chunks", type=int, default=50, help="how many chunks are measured, after the warm-up")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--compile-vae", action="store_true", help="compile the VAE's decoder")
    parser.add_argument("--channels-last", action="store_true", help="the VAE in channels_last_3d")
    parser.add_argument("--sdpa", choices=["auto", *SDPA], default="auto", help="the kernel of dense attention")
    parser.add_argument("--no-syncs", action="store_true", help="fail where the host waits for the GPU")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the program")
    parser.add_argument("--name", help="of the row; by default it says the options")
    parser.add_argument("--output", type=Path, help="a table (.jsonl) that gets the row")
    options = parser.parse_args()
    if options.no_syncs and not options.device.startswith("cuda"):
        parser.error("--no-syncs watches a GPU; there is none")
    options.height = options.height or (64 if options.tiny else 480)
    options.width = options.width or (96 if options.tiny else 832)
    row = measure(options)
    print(json.dumps(row, indent=2))
    if options.output is not None:
        append_row(options.output, row)


if __name__ == "__main__":
    main()
