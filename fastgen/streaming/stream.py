"""A running video: pictures as they come, prompts that change on the way, and a state to save and continue from."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastgen.batch import Conditioning, Draws
from fastgen.denoiser import Denoiser
from fastgen.registry import current_names
from fastgen.rollout import RolloutPolicy, commit, recommitted
from fastgen.rollout.rolling import Making
from fastgen.rollout.simulation import next_chunk
from fastgen.streaming.actions import lasting
from fastgen.streaming.context import Context
from fastgen.streaming.sound import Sound, by_frame

Encode = Callable[[str], Conditioning]
REPEAT = "Rep"  # what AutoencoderKLWan stores for a layer that has seen one latent and kept nothing of it


class VideoDecoder:
    """Decodes a video latent by latent with a stock AutoencoderKLWan, to the pictures that it gives for the whole.

    What its causal convolutions remember of earlier latents belongs to this object, and nothing in the VAE changes: it
    may serve several videos in turn. Both kinds of VAE work, that of Wan 2.1 and the residual one of Wan 2.2.

    sound_rows: of the latents, the last ones, which hold the sound and are no picture (`streaming.sound`)."""

    def __init__(self, vae: Any, sound_rows: int = 0):
        self.vae, self.sound_rows = vae, sound_rows
        self.memory: list[Tensor | str | None] = [None] * sum(isinstance(m, nn.Conv3d) for m in vae.decoder.modules())
        self.latents = 0
        mean, std = (torch.tensor(vae.config[f"latents_{name}"], device=vae.device) for name in ("mean", "std"))
        self.mean, self.std = (value.view(-1, 1, 1, 1) for value in (mean, std))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The next latents [B, F, C, h, w], normalised as a network makes them, to pictures [B, n, 3, H, W] in [0, 1],
        float32. The first latent of a video gives one picture, every other as many as the VAE compresses into one,
        which is four."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify  # takes seconds to import

        parts = []
        for latent in latents[..., : latents.shape[-2] - self.sound_rows, :].split(1, dim=1):
            z = (latent.transpose(1, 2).float() * self.std + self.mean).to(self.vae.dtype)
            x = self.vae.post_quant_conv(z)
            named = {"feat_cache": self.memory, "feat_idx": [0], "first_chunk": self.latents == 0}
            parts.append(self.vae.decoder(x, **named))
            self.latents += 1
        video = torch.cat(parts, dim=2)
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        return (video.clamp(-1, 1).float() / 2 + 0.5).transpose(1, 2)

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers, as tensors for safetensors. An empty tensor stands for `REPEAT`."""
        state = {"latents": torch.tensor(self.latents)}
        for i, kept in enumerate(self.memory):
            if kept is not None:
                state[str(i)] = torch.empty(0) if isinstance(kept, str) else kept
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.latents = int(state["latents"])
        kept = [state.get(str(i)) for i in range(len(self.memory))]
        self.memory = [REPEAT if value is not None and not value.numel() else value for value in kept]


class Stream:
    """A video without end. Iterating gives the pictures of each chunk, [n, 3, H, W] float32 in [0, 1]; `sound` is then
    the sound of the same chunk, [moments, bins], of a student that makes some. A video that is driven by a sound
    pauses where that ends (StopIteration), and goes on with what `listen` is given.

    denoiser, policy: the student and its sampler, which has `chunks`.
    draws: the noise, of one sample; its first axis counts frames and may have any length.
    encode: a prompt to the conditioning of one sample.  decoder: that of this video alone.
    hear: the sound of latents [1, F, ...], and whether they begin the video (`streaming.sound.heard`); None without.
    driven: the sound that it is driven by, if it is.

    A chunk is committed to the context when the next one is asked for, so that its pictures do not wait for it. The
    memory is flat if the schedule has a window; without one, the context grows with the video. A sound that drives it
    is kept from its beginning on."""

    def __init__(
        self,
        denoiser: Denoiser,
        policy: RolloutPolicy,
        draws: Draws,
        encode: Encode,
        prompt: str,
        decoder: VideoDecoder,
        hear: Callable[[Tensor, bool], Tensor] | None = None,
        driven: Sound | None = None,
    ):
        if policy.chunks is None:
            raise ValueError("this student does not stream: its policy has no chunks")
        self.denoiser, self.policy, self.draws, self.encode, self.decoder = denoiser, policy, draws, encode, decoder
        self.hear, self.sound = hear, None if hear is None else torch.empty(0)
        self.context = Context(policy.chunks)
        # frame -> what was committed of it [passes, 1, C, h, w], its clean latents last, of all frames in the context
        self.kept: dict[int, Tensor] = {}
        self.making: Making = ()  # later chunks that have been begun, with `order: rolling`
        # a chunk to commit, and what it was made with
        self.finished: tuple[Sequence[Tensor], Conditioning] | None = None
        self.moves: Tensor | None = None  # those of all frames until now, and what is still listed, [1, n, axes]
        self.driven = driven
        # the moments from the beginning on, [n, bins], by which it is driven
        self.moments: Tensor | None = None
        self.driving: Tensor | None = None  # these by frames, [1, F, m, bins], as far as frames are whole
        if driven is not None:
            self.hold(torch.empty(0, driven.bins))
        self.prompt = prompt

    @property
    def prompt(self) -> str:
        """What the next chunk shows. Chunks that are finished stay as they are, also in the context (`recache`). The
        actions after its bar begin with the next frame; without any, the view stays where it is. One that is refused
        (ValueError) changes nothing."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        with torch.no_grad():
            cond = self.encode(prompt)
        self._prompt, self.cond = prompt, cond
        if "actions" in self.cond:
            self.moves = continued(self.moves, self.cond["actions"], self.made)

    def listen(self, sound: Tensor) -> None:
        """Takes the next moments [n, bins] of the sound that drives the video. Raises ValueError for another shape,
        for numbers that are not finite, and if nothing drives the video."""
        if self.driven is None or self.moments is None:
            raise ValueError("this student is not driven by a sound")
        if sound.dim() != 2 or sound.shape[1] != self.driven.bins or not bool(sound.isfinite().all()):
            raise ValueError(f"the sound is [moments, {self.driven.bins}] and finite, got {list(sound.shape)}")
        self.hold(torch.cat([self.moments, sound.to(self.moments)]))

    def hold(self, moments: Tensor) -> None:
        """Takes these moments, from the beginning on, as the sound that has been given so far."""
        assert self.driven is not None
        whole = (len(moments) - 1) // self.driven.moments * self.driven.moments + 1
        self.moments, self.driving = moments, None
        if len(moments):
            self.driving = by_frame(self.driven, moments[None, :whole]).to(self.draws.ids.device)

    @property
    def made(self) -> int:
        """The number of finished frames."""
        return self.context.frames if self.finished is None else self.context.chunk.stop

    @property
    def acting(self) -> Conditioning:
        """The conditioning of the next chunk, with the actions and the sound of all frames up to it."""
        cond = Conditioning(self.cond)
        if self.moves is not None:
            ahead = self.policy.num_steps * self.context.chunks.frames  # of chunks in the making
            cond["actions"] = lasting(self.moves, self.context.chunk.stop + ahead)
        if self.driving is not None:
            cond["sound"] = self.driving
        return cond

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Tensor:
        self.commit()
        given = 0 if self.driving is None else self.driving.shape[1]
        if self.driven is not None and given < self.context.chunk.stop:
            raise StopIteration
        return self.decode(self.denoise())

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """The latents of the next chunk, [1, frames, C, h, w]. The chunk before it must be committed."""
        if self.finished is not None:
            raise RuntimeError("commit the last chunk before the next one is made")
        cond = self.acting
        left, self.making = next_chunk(self.denoiser, self.policy, cond, self.draws, self.context, self.making)
        self.finished = (left, cond)
        return left[-1]

    @torch.no_grad()
    def commit(self) -> None:
        """Adds the finished chunk, if there is one, to the context, with the prompt that it was made with."""
        if self.finished is None:
            return
        (left, cond), frames = self.finished, self.context.chunk
        self.context = commit(self.denoiser, self.policy, left, cond, self.draws.chunk(frames), self.context)
        kept = self.kept | dict(zip(frames, torch.stack([*left]).unbind(2), strict=True))
        self.kept = {frame: kept[frame] for block in self.context.blocks for frame in block.frames}
        self.finished = None

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures of a chunk, whose sound is then `sound`. Call it once for each chunk, in order."""
        if self.hear is not None:
            self.sound = self.hear(latents, self.decoder.latents == 0)[0]
        return self.decoder(latents)[0]

    @torch.no_grad()
    def recache(self) -> None:
        """Computes the context again with the present prompt, so that nothing in it remembers the prompts before.

        See `rollout.recommitted`. While no frame has left the window, and with the same prompt, this gives the context
        that is there. Raises ValueError as `ChunkSchedule.check_recache` does."""
        self.commit()

        def left(frames: range) -> Sequence[Tensor]:
            return torch.stack([self.kept[frame] for frame in frames], dim=2).unbind()

        held = [block.frames for block in self.context.blocks]
        self.context = recommitted(
            self.denoiser, self.policy, held, left, self.acting, self.draws.chunk, self.context.frames
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that continues the video to the same bits, but the weights, as tensors for safetensors."""
        self.commit()
        parts = {"context": self.context.state_dict(), "decoder": self.decoder.state_dict()}
        state = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        state |= {f"kept.{frame}": value for frame, value in self.kept.items()}
        state |= {f"making.{i}": value for i, value in enumerate(self.making)}
        if self.moves is not None:
            state["moves"] = self.moves
        if self.moments is not None:
            state["moments"] = self.moments
        about = self.about | {"policy": dataclasses.asdict(self.policy)}
        about |= {"prompt": self.prompt, "seed": int(self.draws.ids)}
        state["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the place of the stream whose state this is. Raises ValueError if it is that of a stream of another
        policy, size or precision, or with other actions or sound, or no state of a stream; then nothing changes."""
        about = read_about(state)
        here = {**self.about, **told(self.moves, self.moments)}
        for name, saved in {**about, **told(state.get("moves"), state.get("moments"))}.items():
            if name in here and saved != here[name]:
                raise ValueError(f"the stream was saved with {name} {saved}, and cannot go on with {here[name]}")
        with torch.no_grad():
            cond = self.encode(about["prompt"])
        try:
            context = Context.load(self.context.chunks, part_of(state, "context."))
            kept = {int(frame): value for frame, value in part_of(state, "kept.").items()}
            making = part_of(state, "making.")
            parts = tuple(making[str(i)] for i in range(len(making)))
            self.decoder.load_state_dict(part_of(state, "decoder."))
        except KeyError as error:
            raise ValueError(f"this is no stream: {error} is missing") from None
        self.context, self.kept, self.making, self.finished = context, kept, parts, None
        self.draws = replace(self.draws, ids=torch.full_like(self.draws.ids, about["seed"]))
        self._prompt, self.cond, self.moves = about["prompt"], cond, state.get("moves")
        if self.moments is not None:
            self.hold(state["moments"].cpu())

    @property
    def about(self) -> dict[str, Any]:
        """What has to be alike where a stream is saved and where it goes on."""
        return {
            "policy": self.policy,
            "latents": self.draws.shape[1:],
            "dtype": str(self.draws.dtype).removeprefix("torch."),
        }


def told(moves: Tensor | None, moments: Tensor | None) -> dict[str, int]:
    """How many numbers a stream is told besides its prompt, of the moves [1, n, axes] and of the moments of a sound
    that drives it [n, bins]; 0 for what it is not told."""
    return {name: 0 if x is None else x.shape[-1] for name, x in (("action axes", moves), ("sound bins", moments))}


def continued(before: Tensor | None, moves: Tensor, made: int) -> Tensor:
    """The moves [1, n, axes] of a video of which `made` frames are finished: those before, then the new ones, whose
    first is that of a first frame."""
    if before is None or not made:
        return moves
    return torch.cat([lasting(before, made), moves[:, 1:] if moves.shape[1] > 1 else moves], dim=1)


def read_about(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a stream says of itself in its state: policy, latents, dtype, prompt and seed. Raises ValueError if it is
    no such state."""
    try:
        about = json.loads(bytes(state["about"].tolist()))
        policy = RolloutPolicy(**current_names("rollout", about["policy"]))
        return {**about, "policy": policy, "latents": tuple(about["latents"]), "prompt": str(about["prompt"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no saved stream: {error}") from None


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def with_window(policy: RolloutPolicy, window: int | None, sink: int | None, force: bool) -> RolloutPolicy:
    """The policy with another window and sink; None leaves them. Raises ValueError for those that the student was not
    trained with, unless `force` is set, and for a policy that does not stream."""
    chunks = policy.chunks
    if chunks is None:
        raise ValueError("this student does not stream: it makes videos whole")
    wanted = {"window": chunks.window if window is None else window, "sink": chunks.sink if sink is None else sink}
    trained = {"window": chunks.window, "sink": chunks.sink}
    if wanted == trained:
        return policy
    if not force:
        raise ValueError(
            f"this student was trained with {words(trained)}, and {words(wanted)} are asked for; leave these out, or "
            "force them (force=True, --force)"
        )
    try:
        return replace(policy, chunks=replace(chunks, **wanted))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def words(window: Mapping[str, int | None]) -> str:
    return f"a window of {window['window'] or 'all'} latent frames and a sink of {window['sink']}"
