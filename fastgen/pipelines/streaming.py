"""A diffusers pipeline for causal video students, which make a video chunk by chunk, whole or as a stream.

    from fastgen.pipelines.streaming import StreamingWanPipeline
    pipeline = StreamingWanPipeline.from_pretrained(folder)
    video = pipeline("a prompt", num_frames=81, seed=0).frames[0]
    for pictures in pipeline.stream("a prompt", seed=0):  # without end
        ...

Its networks are stock ones. Its scheduler, `pipelines.few_step.ChunkScheduler`, stores how they are sampled. Plain
diffusers does not know the class that model_index.json names, and the scheduler takes no steps for the stock class, so
that such a student is not sampled as if its attention went both ways."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from safetensors.torch import load_file
from torch import Tensor

from fastgen.backbones.wan import WanDenoiser
from fastgen.batch import Conditioning, Draws
from fastgen.denoiser import Denoiser
from fastgen.modules.experts import Experts
from fastgen.modules.inputs import WanExtraInputs
from fastgen.pipelines.few_step import ChunkScheduler
from fastgen.pipelines.flow_map import extend
from fastgen.registry import current_names
from fastgen.rollout import RolloutPolicy, sample
from fastgen.streaming.actions import Actions, load_actions, split_prompt
from fastgen.streaming.memory_file import load_memory
from fastgen.streaming.sound import Sound, Strip, by_frame, heard, load_sound, strip_of
from fastgen.streaming.stream import Stream, VideoDecoder, read_about, with_window

SEEDS = 1 << 62  # how many there are
KEY = "sample"  # of the draws, as in `sampling.sampler.Sampler.latents`
logger = logging.getLogger(__name__)


@dataclass
class StreamingOutput(WanPipelineOutput):
    """sound: [B, 1 + m (F - 1), bins] float32 on the CPU, of a student that makes some (`streaming.sound`)."""

    sound: Tensor | None = None


class StreamingWanPipeline(WanPipeline):
    """A WanPipeline whose network makes a video chunk by chunk, at its own list of levels and without guidance.

    scheduler: a `ChunkScheduler`, which says how. The other components are those of the stock pipeline."""

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ):
        if not isinstance(scheduler, ChunkScheduler):
            raise ValueError(
                f"this is no pipeline of a streaming student: its scheduler is a {type(scheduler).__name__}, which "
                "does not say how its network makes chunks"
            )
        super().__init__(
            tokenizer, text_encoder, vae, scheduler, transformer, transformer_2, boundary_ratio, expand_timesteps
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Loads a pipeline. One whose student has added inputs (`rollout.two_time`) or a linear memory is loaded from
        a local folder, in which their weights lie beside the networks."""
        pipeline = super().from_pretrained(folder, **options)
        chunks = pipeline.policy.chunks
        if pipeline.policy.inputs:
            extend(pipeline.networks, "condition_embedder", WanExtraInputs, Path(folder))
        if chunks is not None and chunks.linear:
            load_memory(pipeline.networks, Path(folder))
        if pipeline.actions is not None:
            load_actions(pipeline.networks, Path(folder))
        if pipeline.sound is not None:
            load_sound(pipeline.networks, Path(folder))
        return pipeline

    @property
    def actions(self) -> Actions | None:
        """The words that move what is seen; None if the student knows none."""
        stored = self.scheduler.config.get("actions")
        return None if stored is None else Actions(**stored)

    @property
    def sound(self) -> Sound | None:
        """The sound of its videos, made or given; None if they have none."""
        stored = self.scheduler.config.get("sound")
        return None if stored is None else Sound(**stored)

    @property
    def made_sound(self) -> Sound | None:
        """The sound that the student makes."""
        return None if self.sound is None or self.sound.given else self.sound

    @property
    def driven(self) -> Sound | None:
        """The sound that its videos are driven by."""
        return None if self.sound is None or not self.sound.given else self.sound

    @property
    def policy(self) -> RolloutPolicy:
        """How the student makes a video."""
        return RolloutPolicy(**current_names("rollout", self.scheduler.config.policy))

    @property
    def networks(self) -> list[Any]:
        """The transformer, or its experts from high noise to low."""
        return [network for network in (self.transformer, self.transformer_2) if network is not None]

    @property
    def denoiser(self) -> Denoiser:
        """The networks behind the contract."""
        parts = [WanDenoiser(network) for network in self.networks]
        return parts[0] if len(parts) == 1 else Experts(parts, (self.config.boundary_ratio,))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        sound: Tensor | None = None,
        first_steps: int | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> StreamingOutput | tuple[Any, ...]:
        """Whole videos, one for each prompt. The size and the number of frames are by default those of training.

        seed: a video depends on its prompt and seed alone, and is the beginning of the stream with this seed; with
        several prompts, one number is that of the first, and the next ones follow. generator: draws the seeds that are
        not given. Without both, they come from torch's global generator.
        sound: of a student whose videos are driven by one, [B, moments, bins], or [moments, bins] for all prompts, of
        1 + m (F - 1) moments at least (`streaming.sound`).
        output_type: np [B, F, H, W, 3] or pt [B, F, 3, H, W], both in [0, 1]; pil; or latent [B, C, F, h, w], with the
        sound in its last rows. Without return_dict, a student that makes sound gives (frames, sound).
        Raises ValueError for a length that is no number of chunks, for a size that does not divide into patches, and
        for other steps or guidance than the student has. A flow map of chunks (any_flow) has any number of steps, and
        may have more of them for the first chunk (first_steps), where nothing that it could see is there yet."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        policy = self.policy.with_counts(num_inference_steps, first_steps)
        if guidance_scale != 1:
            raise ValueError("this student was distilled without guidance; leave out guidance_scale")
        shape = (self.latent_frames(num_frames or self.trained("num_frames")), *self.latent_shape(height, width))
        draws = self.draws(seeds_of(len(prompts), seed, generator), shape)
        cond = Conditioning.cat([self.encode(text, shape[0]) for text in prompts])
        cond |= self.encode_sound(sound, len(prompts), shape[0])
        latents = sample(self.denoiser, policy, cond, draws)
        video = latents.transpose(1, 2) if output_type == "latent" else self.pictures(latents, output_type)
        made = None if self.made_sound is None else self.hear(latents).float().cpu()
        if return_dict:
            return StreamingOutput(frames=video, sound=made)
        return (video,) if made is None else (video, made)

    def stream(
        self,
        prompt: str,
        seed: int = 0,
        window: int | None = None,
        sink: int | None = None,
        height: int | None = None,
        width: int | None = None,
        force: bool = False,
        sound: Tensor | None = None,
        num_inference_steps: int | None = None,
        first_steps: int | None = None,
    ) -> Stream:
        """A video without end: an iterator over the pictures of its chunks, [n, 3, H, W] float32 in [0, 1].

        sound: of a student whose videos are driven by one, its first moments [n, bins]. The iterator ends with them,
        and goes on after `Stream.listen`.

        window, sink: other numbers of latent frames than the student was trained with, which need `force`.
        num_inference_steps, first_steps: of a chunk and of the first one, for a flow map of chunks (any_flow), which
        has any number of steps."""
        policy = with_window(self.policy.with_counts(num_inference_steps, first_steps), window, sink, force)
        assert policy.chunks is not None
        if policy.chunks.window is None:
            logger.warning(
                "this student sees its whole past: the memory of its stream grows without end, and after %d pictures "
                "it sees more than in training",
                self.trained("num_frames"),
            )
        draws = self.draws([seed], (policy.chunks.frames, *self.latent_shape(height, width)))
        hear = None if self.made_sound is None else self.hear
        stream = Stream(self.denoiser, policy, draws, self.encode, prompt, self.decoder(), hear, self.driven)
        if sound is not None:
            stream.listen(sound)
        return stream

    def resume(self, file: str | Path) -> Stream:
        """Goes on with a stream whose `state_dict` is in this safetensors file, to the bits that it would have given.
        Raises ValueError if the file holds the stream of another student."""
        state = load_file(file, device=str(self.device))
        about = read_about(state)
        _, rows, width = about["latents"]
        height, width = (side * self.vae_scale_factor_spatial for side in (rows - self.sound_rows, width))
        chunks = about["policy"].chunks
        given: dict[str, Any] = {"height": height, "width": width, "force": True}
        if self.policy.any_step:
            first, own = chunks.first_timesteps, self.policy.chunks
            asked = first is not None and own is not None and first != own.first_timesteps
            given |= {
                "num_inference_steps": about["policy"].num_steps,
                "first_steps": len(first) if asked else None,
            }
        stream = self.stream(about["prompt"], about["seed"], chunks.window, chunks.sink, **given)
        stream.load_state_dict(state)
        return stream

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Raises ValueError."""
        raise ValueError("a stream calls every network for each chunk, so that they all stay on its device: use .to()")

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def trained(self, name: str) -> int:
        """A number that the student was trained with: height, width, num_frames, fps or max_sequence_length."""
        return int(self.scheduler.config[name])

    @torch.no_grad()
    def encode(self, prompt: str, frames: int | None = None) -> Conditioning:
        """The conditioning of one prompt. frames: how many latent frames it has actions for; None: those that it
        lists. Raises ValueError for a word after its bar that is no action."""
        actions, told = self.actions, {}
        if actions is not None:
            told["actions"] = actions.moves(prompt, frames)[None].to(self._execution_device)
            prompt = split_prompt(prompt)[0]
        length = self.trained("max_sequence_length")
        embeds, _ = self.encode_prompt(prompt, None, False, max_sequence_length=length, device=self._execution_device)
        return Conditioning({"prompt_embeds": embeds, **told})

    def encode_sound(self, sound: Tensor | None, count: int, frames: int) -> dict[str, Tensor]:
        """The conditioning of `count` videos of so many latent frames by the sound that drives them. Raises ValueError
        if there is one exactly where none drives them, and for another number of sounds, bins or too few moments."""
        if (sound is None) != (self.driven is None):
            raise ValueError(
                "this student is not driven by a sound; leave it out"
                if self.driven is None
                else "this student's videos are driven by a sound: give sound=, [moments, bins]"
            )
        if sound is None or self.driven is None:
            return {}
        wanted = self.driven.length(frames)
        each = sound.expand(count, -1, -1) if sound.dim() == 2 else sound
        if each.dim() != 3 or len(each) != count or each.shape[1] < wanted or each.shape[2] != self.driven.bins:
            raise ValueError(
                f"sound: {frames} latent frames of {count} videos take [{count}, {wanted}, {self.driven.bins}], got "
                f"{list(sound.shape)}"
            )
        return {"sound": by_frame(self.driven, each[:, :wanted].float()).to(self._execution_device)}

    def draws(self, seeds: Sequence[int], shape: tuple[int, ...]) -> Draws:
        ids = torch.tensor(seeds, dtype=torch.int64, device=self._execution_device)
        return Draws(ids, shape, KEY, self.networks[0].dtype)

    @property
    def strip(self) -> Strip:
        """The place of the sound, in latents of any width."""
        return strip_of(self.networks[0].config, 0)

    @property
    def sound_rows(self) -> int:
        """The latent rows of a frame that hold the sound that is made with it."""
        return 0 if self.made_sound is None else self.strip.high

    def decoder(self) -> VideoDecoder:
        """What decodes one video."""
        return VideoDecoder(self.vae, self.sound_rows)

    def hear(self, latents: Tensor, first: bool = True) -> Tensor:
        """The sound of latents [B, F, C, h, w], see `streaming.sound.heard`."""
        assert self.made_sound is not None
        return heard(self.made_sound, self.strip._replace(width=latents.shape[-1]), latents, first)

    def pictures(self, latents: Tensor, output_type: str) -> Any:
        """Latents [B, F, C, h, w] to pictures, one video at a time."""
        video = torch.cat([self.decoder()(one) for one in latents.split(1)])
        if output_type == "pt":
            return video
        frames = video.permute(0, 1, 3, 4, 2).cpu().numpy()
        return [self.video_processor.numpy_to_pil(one) for one in frames] if output_type == "pil" else frames

    def latent_frames(self, num_frames: int) -> int:
        """The number of latent frames of a video. Raises ValueError, with the nearest lengths, if they are not whole
        chunks."""
        assert self.policy.chunks is not None
        step = self.vae_scale_factor_temporal
        frames, rest = divmod(num_frames - 1, step)
        if rest or num_frames < 1:
            raise ValueError(f"num_frames must be {step} k + 1, got {num_frames}")
        try:
            self.policy.chunks.split(frames + 1)
        except ValueError as error:
            raise ValueError(f"num_frames: {num_frames}: {error}; n of them are {step} (n - 1) + 1 frames") from None
        return frames + 1

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """[C, h, w] of a latent frame, by default of the size of training, with the rows of its sound. Raises
        ValueError for sides that do not divide into the network's patches, and for a width without room for a frame's
        sound."""
        config = self.networks[0].config
        sides = {"height": height or self.trained("height"), "width": width or self.trained("width")}
        for (name, side), patch in zip(sides.items(), config.patch_size[1:], strict=True):
            if side % (unit := self.vae_scale_factor_spatial * patch):
                raise ValueError(f"{name} must be a multiple of {unit}, got {side}")
        high, wide = (side // self.vae_scale_factor_spatial for side in sides.values())
        if self.sound is not None:
            self.strip._replace(width=wide).check(self.sound)
        return config.in_channels, high + self.sound_rows, wide


def seeds_of(
    count: int, seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> list[int]:
    """The seeds of `count` videos, see `StreamingWanPipeline.__call__`. Raises ValueError if there are not as many."""
    if seed is not None and generator is not None:
        raise ValueError("give a seed or a generator, not both")
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if seed is not None:
        seeds = list(seed)
    elif generator is None or isinstance(generator, torch.Generator):
        seeds = [draw_seed(generator) for _ in range(count)]
    else:
        seeds = [draw_seed(one) for one in generator]
    if len(seeds) != count:
        raise ValueError(f"{count} prompts need {count} seeds, got {len(seeds)}")
    return seeds


def draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(SEEDS, (), generator=generator, device=device))
