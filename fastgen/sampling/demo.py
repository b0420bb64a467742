"""`fastgen demo`: a page in the browser that shows a student and its teacher side by side, with their times.

The page is gradio's, an optional package. Everything else is in functions that work without it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.backbones.folder import recommended_call
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.data.prompts import prompt_file, read_prompts
from fastgen.denoiser import Denoiser
from fastgen.sampling.original import export_folder, original
from fastgen.sampling.sampler import Sampler, recommended_config, source_of, teacher_sampler
from fastgen.sampling.speed import synchronise
from fastgen.sampling.video import check_writer, save_video

SMALLEST = 256  # side of a picture on the page
NO_GRADIO = "fastgen demo needs the package gradio; pip install 'fastgen-distill[demo]'"


@dataclass(frozen=True)
class Pair:
    """student: as it was trained. teacher: its frozen teacher; None for a pipeline that was not distilled, which then
    stands in the place of the student. prompt, teacher_steps, guidance: where the page begins; guidance may be one
    number for each expert."""

    student: Sampler
    teacher: Denoiser | None
    teacher_steps: int
    guidance: float | Sequence[float]
    prompt: str

    @property
    def backbone(self) -> Backbone:
        return self.student.backbone


@dataclass(frozen=True)
class Drawn:
    """pixels: [3, H, W], or [F, 3, H, W] of a video, in [0, 1]. seconds: of sampling and decoding."""

    pixels: Tensor
    seconds: float
    steps: int
    evaluations: int

    @property
    def caption(self) -> str:
        calls = "" if self.evaluations == self.steps else f", {self.evaluations} network evaluations"
        return f"{self.steps} {'step' if self.steps == 1 else 'steps'}{calls}, {self.seconds:.2f} s"


def load_pair(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pair:
    """The student of a run or an export with its teacher, which share one VAE and one set of text encoders. Raises
    ValueError if `path` is neither of these nor a pipeline folder, if its samples are no pictures and no videos, and
    if they are made from images."""
    folder = export_folder(path)
    if folder is None:
        return plain_pipeline(path, device, dtype)
    config, recipe = original(folder)
    if config.output not in ("pixels", "frames"):
        raise ValueError(f"{path} makes {config.output}; the demo shows pictures and videos")
    check_prompts_alone(path, config)
    if recipe.rollout.chunks is not None:
        raise ValueError(f"{path} makes videos chunk by chunk; fastgen stream shows them")
    backbone: Any = config.build(torch.device(device), dtype, 0)
    student = Sampler(backbone, backbone.load_exported(folder), recipe.rollout, 1.0, folder)
    assert isinstance(config, PipelineConfig)  # as it makes pictures or videos
    teacher_steps = max(recipe.eval.teacher_steps, default=0)
    if teacher_steps <= recipe.rollout.num_steps:  # which compares with a teacher that is as fast, not with a good one
        source = config.local_folder()
        said = {} if source is None else recommended_call(source)
        teacher_steps = backbone.call_with(said)[0]
    known = recipe.eval.prompts or prompt_file(config.path)
    return Pair(student, backbone.load("teacher"), teacher_steps, recipe.teacher_guidance, first_prompt(known))


def first_prompt(prompts: str | Sequence[str] | None) -> str:
    """The first of a file or a list; that of any pipeline's, if there is none or the file is elsewhere."""
    try:
        return read_prompts(prompts or "neutral")[0]
    except ValueError:
        return read_prompts("neutral")[0]


def plain_pipeline(path: Path, device: str, dtype: torch.dtype) -> Pair:
    """A pipeline that was not distilled, in the sizes and with the steps and the guidance that its card recommends,
    else with those of its stock call."""
    folder = source_of(path)
    section, said = recommended_config(folder)[0], recommended_call(folder)
    check_prompts_alone(path, section)
    section.check()
    backbone: Any = section.build(torch.device(device), dtype, 0)
    steps, scale = backbone.call_with(said)
    sampler = teacher_sampler(backbone, steps, scale, weights=folder)
    return Pair(sampler, None, steps, scale, first_prompt(prompt_file(str(path))))


def check_prompts_alone(path: Path, config: BackboneConfig) -> None:
    if config.takes_given:
        kinds = ", ".join(config.given)
        raise ValueError(f"{path} makes its samples from {kinds}; fastgen sample --image does, and the demo does not")


def draw_student(
    pair: Pair, prompt: str, seed: int, steps: int, guidance: float | Sequence[float] | None = None
) -> Drawn:
    """guidance: of a pipeline that was not distilled; by default the pair's. Raises ValueError for a number of steps
    that the student cannot make."""
    student, scale = pair.student, pair.guidance if guidance is None else guidance
    if pair.teacher is None:  # it was not distilled
        return timed(teacher_sampler(pair.backbone, steps, scale, student.denoiser), prompt, seed)
    return timed(Sampler(pair.backbone, student.denoiser, student.policy.with_steps(steps)), prompt, seed)


def draw_teacher(pair: Pair, prompt: str, seed: int, steps: int, guidance: float | Sequence[float]) -> Drawn | None:
    """None if there is no teacher."""
    if pair.teacher is None:
        return None
    return timed(teacher_sampler(pair.backbone, steps, guidance, pair.teacher), prompt, seed)


def timed(sampler: Sampler, prompt: str, seed: int) -> Drawn:
    sampler.backbone.encode_both([prompt])  # once for both sides; kept for the call below
    synchronise(sampler.backbone.device)
    start = time.perf_counter()
    pixels = sampler.sample([prompt], [seed])[0]  # on the CPU, so that it has ended
    seconds = time.perf_counter() - start
    return Drawn(pixels, seconds, sampler.policy.num_steps, sampler.network_evaluations)


def shown(drawn: Drawn | None, fps: int | None) -> Any:
    """What gradio shows: an array [H, W, 3] of bytes, in which the pixels of a small picture are squares, or the path
    of a video."""
    if drawn is None:
        return None
    if drawn.pixels.dim() == 4:
        assert fps is not None
        path = Path(mkdtemp()) / "sample.mp4"
        save_video(drawn.pixels, path, fps)
        return str(path)
    times = max(1, SMALLEST // max(drawn.pixels.shape))
    large = drawn.pixels.repeat_interleave(times, 1).repeat_interleave(times, 2)
    return (large.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def make_page(pair: Pair, title: str) -> Any:
    """The page, a gradio.Blocks. Raises ValueError if gradio is not installed."""
    try:
        import gradio
    except ImportError:
        raise ValueError(NO_GRADIO) from None
    video, policy = pair.backbone.output == "frames", pair.student.policy
    picture = partial(gradio.Video, autoplay=True, loop=True, height=384) if video else gradio.Image
    free = policy.any_step or bool(policy.step_counts) or pair.teacher is None

    def compare(prompt: str, seed: float, steps: float, teacher_steps: float, guidance: float | None) -> Iterator[Any]:
        scale = pair.guidance if guidance is None else guidance
        try:
            left = draw_student(pair, prompt, int(seed), int(steps), scale)
            first = (shown(left, pair.backbone.fps), left.caption)
            yield *first, None, "" if pair.teacher is None else "the teacher is at work"
            right = draw_teacher(pair, prompt, int(seed), int(teacher_steps), scale)
            yield *first, shown(right, pair.backbone.fps), right.caption if right else ""
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title="fastgen", analytics_enabled=False) as page:
        gradio.Markdown(f"## {title}")
        prompt = gradio.Textbox(pair.prompt, label="prompt")
        with gradio.Row():
            seed = gradio.Number(0, label="seed", precision=0, minimum=0)
            steps = gradio.Number(policy.num_steps, label="steps", precision=0, minimum=1, interactive=free)
            asked = pair.teacher is not None
            teacher_steps = gradio.Number(
                pair.teacher_steps, label="teacher's steps", precision=0, minimum=1, visible=asked
            )
            one = isinstance(pair.guidance, float | int)
            whose = "teacher's guidance" if asked else "guidance"
            guidance = gradio.Number(pair.guidance if one else None, label=whose, minimum=0, visible=one)
        button = gradio.Button("sample", variant="primary")
        sides = []
        with gradio.Row():
            for name in ("student", "teacher") if asked else ("pipeline", ""):
                with gradio.Column(visible=bool(name)):
                    sides += [picture(label=name, interactive=False), gradio.Markdown()]
        inputs = [prompt, seed, steps, teacher_steps, guidance]
        gradio.on([button.click, prompt.submit], compare, inputs, sides)
    return page


def serve(path: Path, host: str, port: int) -> None:
    """Shows the page until it is interrupted. Raises ValueError, before weights load, if gradio is not installed."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ValueError(NO_GRADIO)
    gpu = torch.cuda.is_available()
    pair = load_pair(path, "cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)
    if pair.backbone.output == "frames":
        check_writer()
    draw_student(pair, "", 0, pair.student.policy.num_steps)  # loads what the first sample would wait for
    make_page(pair, str(path)).launch(server_name=host, server_port=port)
