"""Sound beside the file of a video: waveforms as WAV, and what is no waveform as tensors."""

import wave
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastgen.data.sounds import ENDING, KEY


def sound_file(video: Path, rate: int | None) -> Path:
    """The file of a video's sound: NAME.wav, or NAME.sound.safetensors. rate: samples per second of a waveform; None
    for a sound that is none."""
    return video.with_suffix(ENDING if rate is None else ".wav")


def write_sound(sound: Tensor, video: Path, rate: int | None = None) -> None:
    """Writes the sound of a video beside it. sound: a waveform [channels, samples] in [-1, 1], as 16-bit PCM; or the
    moments [moments, bins] of `streaming.sound`, as the tensor "sound"."""
    path = sound_file(video, rate)
    if rate is None:
        save_file({KEY: sound.float().cpu().contiguous()}, path)
        return
    samples = (sound.float().cpu().clamp(-1, 1) * 32767).round().short().mT.contiguous()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().astype("<i2").tobytes())
