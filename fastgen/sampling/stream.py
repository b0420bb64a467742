"""`fastgen stream`: writes a video chunk by chunk, as it is made, and measures how fast that goes."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.backbones.folder import STREAMING, read_index, read_json
from fastgen.data.files import check_output
from fastgen.data.sounds import check_whole, read_sound
from fastgen.registry import current_names
from fastgen.rollout import RolloutPolicy
from fastgen.run.terminal import progress_bar
from fastgen.sampling.sampler import METADATA, read_metadata
from fastgen.sampling.sound import sound_file, write_sound
from fastgen.sampling.speed import Speed, Timer, peak_memory
from fastgen.sampling.video import check_writer, video_writer
from fastgen.streaming.actions import Actions
from fastgen.streaming.sound import FILE as SOUND
from fastgen.streaming.sound import Sound
from fastgen.streaming.stream import Stream, with_window


@dataclass(frozen=True, kw_only=True)
class StreamRequest:
    """What `fastgen stream` is asked for. changes: (seconds, prompt), each from the first chunk on that begins then or
    later. recache: whether the context is computed again at each change. num_steps,
    first_steps: of a chunk and of the first one, for a flow map. window, sink, force: as in `with_window`.
    sound: the file of the sound that the video is driven by (`data.sounds`), for a student whose videos are."""

    path: Path
    prompt: str
    seconds: float
    output: Path
    changes: tuple[tuple[float, str], ...] = ()
    recache: bool = False
    num_steps: int | None = None
    first_steps: int | None = None
    window: int | None = None
    sink: int | None = None
    force: bool = False
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    report: Path | None = None
    overwrite: bool = False
    sound: Path | None = None

    def check(self) -> Path:
        """The export that is streamed. Raises ValueError for what cannot be, before anything heavy is imported."""
        folder = streaming_export(self.path)
        policy = RolloutPolicy(**current_names("rollout", read_metadata(folder)["policy"]))
        policy = with_window(policy.with_counts(self.num_steps, self.first_steps), self.window, self.sink, self.force)
        assert policy.chunks is not None
        if self.recache:
            try:
                policy.chunks.check_recache()
            except ValueError as error:
                raise ValueError(f"--recache: {error}") from None
        check_changes(self.changes, self.seconds)
        self.check_prompts(folder)
        if self.output.suffix != ".mp4":
            raise ValueError(f"--output must end in .mp4, got {self.output}")
        driven = driven_by(folder)
        self.check_sound(folder, driven)
        made = sound_file(self.output, None) if driven is None and (folder / SOUND).is_file() else None
        for file in (self.output, self.report, made):
            if file is not None:
                check_output(file, self.overwrite)
        if self.report is not None and self.report.absolute() == self.output.absolute():
            raise ValueError(f"--report and --output are both {self.output}; give each its own file")
        check_device(self.device)
        check_writer()
        return folder

    def check_prompts(self, folder: Path) -> None:
        """Raises ValueError for a prompt with a word after its bar that is none of the student's actions."""
        stored = read_metadata(folder)["backbone"].get("actions")
        if stored is None:
            return
        for option, prompt in (("--prompt", self.prompt), *(("--at", prompt) for _, prompt in self.changes)):
            try:
                Actions(**stored).listed(prompt)
            except ValueError as error:
                raise ValueError(f"{option}: {error}") from None

    def check_sound(self, folder: Path, driven: Sound | None) -> None:
        """Raises ValueError unless there is a sound exactly where one drives the video, and it lasts as long."""
        if (self.sound is None) != (driven is None):
            raise ValueError(
                "--sound: the videos of this student are not driven by a sound; leave it out"
                if driven is None
                else "--sound: the videos of this student are driven by a sound; give its file"
            )
        if self.sound is not None and driven is not None:
            fps = read_metadata(folder)["backbone"].get("fps", 16)
            step = read_json(folder / "vae/config.json").get("scale_factor_temporal", 4)
            try:
                check_whole(self.sound, driven, 1 + -(-(pictures_of(self.seconds, fps) - 1) // step))
            except ValueError as error:
                raise ValueError(f"--sound: {str(error).removeprefix('sounds: ')}") from None


def driven_by(folder: Path) -> Sound | None:
    """The sound that drives the videos of an exported student; None if none does."""
    stored = read_metadata(folder)["backbone"].get("sound")
    return Sound(**stored) if stored is not None and stored.get("given") else None


def pictures_of(seconds: float, fps: int) -> int:
    return max(1, round(seconds * fps))


def streaming_export(path: Path) -> Path:
    """The export of a run, or the exported folder itself. Raises ValueError for anything that does not stream."""
    folder = path / "export" if (path / "export" / METADATA).is_file() else path
    if not (folder / METADATA).is_file():
        if (path / "recipe.yaml").is_file():
            raise ValueError(f"{path} has no export yet: run `fastgen export {path}`")
        raise ValueError(f"{path} is neither a run nor an export of fastgen")
    if read_metadata(folder)["policy"].get("chunks") is None:
        raise ValueError(f"{folder} does not stream: it makes samples whole, with `fastgen sample`")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline, so that it makes no pictures to stream")
    if not (name := read_index(folder)["_class_name"]).startswith(STREAMING):
        raise ValueError(f"{folder} holds a {name}, which does not stream; export the run again")
    return folder


def parse_change(text: str) -> tuple[float, str]:
    """A prompt that begins on the way, from SECONDS:PROMPT. Raises ValueError for anything else."""
    seconds, colon, prompt = text.partition(":")
    try:
        at = float(seconds)
    except ValueError:
        at = math.nan
    if not colon or not math.isfinite(at) or not prompt.strip():
        raise ValueError(f'--at is SECONDS:PROMPT, such as 12:"a red fox", got {text!r}')
    return at, prompt


def check_changes(changes: Sequence[tuple[float, str]], seconds: float) -> None:
    """Raises ValueError unless the changes come one after another, within the video."""
    times = [0.0, *(at for at, _ in changes)]
    if any(b <= a for a, b in pairwise(times)):
        raise ValueError(f"--at: the times must increase and be above 0, got {times[1:]}")
    if times[-1] >= seconds:
        raise ValueError(f"--at: {times[-1]:g} seconds is not before the end of a video of {seconds:g} seconds")


def check_device(name: str) -> None:
    """Raises ValueError for a device that is not there."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device is cpu, cuda or cuda:N, got {name!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this machine has no GPU that torch can use; give --device cpu")


def stream_video(request: StreamRequest) -> dict[str, Any]:
    """Writes the video, and beside it the sound of a student that makes some; returns what was measured. Ctrl-C ends
    the video where it is; the result then says `interrupted`. Raises ValueError as `StreamRequest.check` does, and for
    pictures that are not finite."""
    folder = request.check()
    from fastgen.pipelines.streaming import StreamingWanPipeline  # with diffusers

    device, speed, interrupted = torch.device(request.device), Speed(), False
    pipeline = StreamingWanPipeline.from_pretrained(folder, torch_dtype=request.dtype, local_files_only=True)
    pipeline.to(device)
    fps, timer = pipeline.trained("fps"), Timer(device)
    wanted, written, sounds = pictures_of(request.seconds, fps), 0, list[Tensor]()
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        video_writer(request.output, fps, playable=True) as append,
        progress_bar(wanted, "streaming", "picture") as bar,
    ):
        try:
            begin = time.perf_counter()
            schedule = {"window": request.window, "sink": request.sink, "force": request.force}
            steps = {"num_inference_steps": request.num_steps, "first_steps": request.first_steps}
            stream = pipeline.stream(request.prompt, request.seed, **steps, **schedule)
            if request.sound is not None:
                stream.listen(whole_sound(request.sound, pipeline, wanted))
            text_seconds = time.perf_counter() - begin
            for pictures, moments in timed_chunks(stream, request.changes, request.recache, fps, timer):
                if not bool(pictures.isfinite().all()):
                    raise ValueError(f"the pictures of {folder} are not finite: its weights hold NaN, or overflow")
                if not written:
                    first_picture_seconds = time.perf_counter() - begin
                append(pictures[: wanted - written])
                sounds += [] if stream.sound is None else [stream.sound]
                speed.add(len(pictures), timer.seconds([*moments, timer.now()]))
                bar.update(min(len(pictures), wanted - written))
                written = min(written + len(pictures), wanted)
                if written == wanted:
                    break
        except KeyboardInterrupt:
            if not speed.chunks:
                raise
            interrupted = True
    if sounds:
        length = moments_of(pipeline.made_sound, written, pipeline.vae_scale_factor_temporal)
        write_sound(torch.cat(sounds)[:length], request.output)
    return {
        "first_picture_seconds": first_picture_seconds,
        "text_seconds": text_seconds,
        **speed.report(),
        **peak_memory(device),
        "interrupted": interrupted,
        "pictures": written,
        "video_fps": fps,
        "height": pictures.shape[2],
        "width": pictures.shape[3],
        "steps": stream.policy.num_steps,
        "window": stream.context.chunks.window,
        "sink": stream.context.chunks.sink,
        "device": torch.cuda.get_device_name(device) if timer.cuda else "cpu",
        "dtype": str(request.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def whole_sound(file: Path, pipeline: Any, pictures: int) -> Tensor:
    """The sound of so many pictures, and of what the last chunk makes beyond them, in which its end goes on."""
    driven, chunks = pipeline.driven, pipeline.policy.chunks
    frames = 1 + -(-(pictures - 1) // pipeline.vae_scale_factor_temporal)
    sound = read_sound(file, driven, 0, driven.length(frames))
    more = driven.moments * max(chunks.frames, chunks.first or 0)
    return torch.cat([sound, sound[-1:].expand(more, -1)])


def moments_of(sound: Sound, pictures: int, step: int) -> int:
    """Moments that last as long as so many pictures. step: pictures of a latent frame after the first one."""
    return 1 + -(-sound.moments * (pictures - 1) // step)


def timed_chunks(
    stream: Stream, changes: Sequence[tuple[float, str]], recache: bool, fps: int, timer: Timer
) -> Iterator[tuple[Tensor, list[Any]]]:
    """The pictures of chunk after chunk, and the moments before and after all `STAGES` but the last."""
    made, waiting = 0, list(changes)
    while True:
        moments = [timer.now()]
        stream.commit()
        moments.append(timer.now())
        while waiting and waiting[0][0] * fps <= made:
            stream.prompt = waiting.pop(0)[1]
            if recache:
                stream.recache()
        moments.append(timer.now())
        latents = stream.denoise()
        moments.append(timer.now())
        pictures = stream.decode(latents)
        moments.append(timer.now())
        yield pictures, moments
        made += len(pictures)
