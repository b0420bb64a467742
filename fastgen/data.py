"""Where prompts and real images come from. Every source is random access: sample number -> sample.

So a run resumes at the sample it stopped at, and ranks and micro-batches split the same stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch


class DataSource(ABC):
    """Samples by global position. `open` is called once, with the backbone, before `prompts` and `fetch`."""

    name: str
    provides: ClassVar[frozenset[str]] = frozenset()  # fields of Batch beside the prompts

    def check(self, backbone: Any) -> None:  # noqa: B027 - most sources have nothing to check
        """Raises ValueError, before weights load, if files are missing or the backbone's config does not fit."""

    @abstractmethod
    def open(self, backbone: Backbone, seed: int) -> "Stream":
        """The stream of this source; the order is a function of the seed."""


class Stream(ABC):
    """prompts and latents by global sample position [B] int64."""

    @abstractmethod
    def prompts(self, positions: Tensor) -> list[str]:
        """One prompt a position."""

    def latents(self, positions: Tensor) -> Tensor | None:
        """Real data [B, *latent_shape] for the same positions, where the source has any."""
        return None


def shuffled(positions: Tensor, size: int, key: int) -> Tensor:
    """Index into a list of `size` for each global position: every epoch is its own permutation of the list."""
    epochs = positions // size
    result = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        result[epochs == epoch] = permutation(size, key, epoch)[positions[epochs == epoch] % size]
    return result


@lru_cache(maxsize=4)
def permutation(size: int, key: int, epoch: int) -> Tensor:
    """The order of one epoch: [size] int64."""
    return noise.uniform(torch.arange(size), (), noise.make_key(key, "epoch", epoch), torch.float64).argsort()


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PromptData(DataSource):
    """Prompts only, for data-free objectives. prompts: a list, or a text file with one a line."""

    prompts: str | tuple[str, ...]
    name: Literal["prompts"] = "prompts"

    def check(self, backbone: Any) -> None:
        read_prompts(self.prompts)

    def open(self, backbone: Backbone, seed: int) -> Stream:
        return ListStream(read_prompts(self.prompts), None, noise.make_key(seed, "data"))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ImageData(DataSource):
    """A folder of images (png, jpg, jpeg, webp), each with its caption in a .txt file of the same name.

    Images are resized and centre-cropped to the backbone's resolution and encoded once, at the start."""

    folder: str
    name: Literal["images"] = "images"
    provides: ClassVar[frozenset[str]] = frozenset({"latents"})

    def check(self, backbone: Any) -> None:
        files = image_files(Path(self.folder))
        missing = [f.name for f in files if not f.with_suffix(".txt").is_file()]
        if missing:
            raise ValueError(f"{len(missing)} images in {self.folder} have no caption, first {missing[0]}; put the "
                             "caption in a .txt file of the same name")  # fmt: skip

    def open(self, backbone: Backbone, seed: int) -> Stream:
        files = image_files(Path(self.folder))
        prompts = [f.with_suffix(".txt").read_text().strip() for f in files]
        return ListStream(prompts, encode_images(files, backbone), noise.make_key(seed, "data"))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DigitsData(DataSource):
    """scikit-learn's handwritten digits, the training two thirds, with a wording drawn for each sample."""

    name: Literal["digits"] = "digits"
    provides: ClassVar[frozenset[str]] = frozenset({"latents"})

    def open(self, backbone: Backbone, seed: int) -> Stream:
        from fastgen.digits import PROMPTS, load_digits, prompt_for

        pixels, labels = load_digits("train")
        rows = [(prompt_for(int(label), w), i) for i, label in enumerate(labels) for w in range(len(PROMPTS))]
        latents = encode_in_chunks(pixels, backbone)
        return ListStream([p for p, _ in rows], latents, noise.make_key(seed, "data"), [i for _, i in rows])


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MixtureData(DataSource):
    """Class labels drawn by their weight, and exact samples of the mixture, for the gaussian_mixture backbone."""

    name: Literal["mixture"] = "mixture"
    provides: ClassVar[frozenset[str]] = frozenset({"latents"})

    def check(self, backbone: Any) -> None:
        if backbone.name != "gaussian_mixture":
            raise ValueError(f"mixture data needs the gaussian_mixture backbone, not {backbone.name}")

    def open(self, backbone: Backbone, seed: int) -> Stream:
        return MixtureStream(backbone, noise.make_key(seed, "data"))


DATA: dict[str, type[DataSource]] = {
    "prompts": PromptData,
    "images": ImageData,
    "digits": DigitsData,
    "mixture": MixtureData,
}


class ListStream(Stream):
    """A list of prompts, shuffled anew each epoch; row i shows latents[rows[i]] (or latents[i])."""

    def __init__(self, prompts: Sequence[str], latents: Tensor | None, key: int, rows: Sequence[int] | None = None):
        self._prompts, self._latents, self._key = list(prompts), latents, key
        self._rows = torch.tensor(rows if rows is not None else range(len(prompts)))

    def prompts(self, positions: Tensor) -> list[str]:
        return [self._prompts[i] for i in shuffled(positions, len(self._prompts), self._key).tolist()]

    def latents(self, positions: Tensor) -> Tensor | None:
        if self._latents is None:
            return None
        return self._latents[self._rows[shuffled(positions, len(self._prompts), self._key)]]


class MixtureStream(Stream):
    def __init__(self, backbone: Any, key: int):
        self._mixture, self._key, self._classes = backbone.mixture, key, backbone.config.classes
        self._num_classes, self._weights = backbone.num_classes, backbone.config.weights

    def labels(self, positions: Tensor) -> Tensor:
        """The class of each position; the label of the empty prompt when there are no classes."""
        if not self._classes:
            return torch.zeros_like(positions)
        weights = torch.tensor(self._weights or (1.0,) * len(self._classes), dtype=torch.float64)
        share = torch.zeros(self._num_classes, dtype=torch.float64).index_add_(0, torch.tensor(self._classes), weights)
        u = noise.uniform(positions, (), noise.make_key(self._key, "label"), torch.float64)
        return torch.bucketize(u, (share / share.sum()).cumsum(0)).clamp(max=self._num_classes - 1)

    def prompts(self, positions: Tensor) -> list[str]:
        return [str(c) for c in self.labels(positions).tolist()] if self._classes else [""] * len(positions)

    def latents(self, positions: Tensor) -> Tensor:
        return self._mixture.sample(positions, self.labels(positions), self._key)


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """A list as it is, or the non-empty lines of a file. Raises ValueError if there are none."""
    if isinstance(prompts, str):
        path = Path(prompts)
        if not path.is_file():
            raise ValueError(f"no prompt file at {prompts}; give a text file with one prompt a line, or a list")
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError("there are no prompts")
    return list(prompts)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, sorted by name. Raises ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"no image folder at {folder}")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    if not files:
        raise ValueError(f"{folder} holds no png, jpg, jpeg or webp image")
    return files


def read_image(path: Path, size: int) -> Tensor:
    """[3, size, size] in [0, 1]: the shorter side resized (bicubic, antialiased), the centre cropped."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return pil_to_tensor(image).float() / 255


def encode_images(files: Sequence[Path], backbone: Backbone) -> Tensor:
    from tqdm import tqdm

    size = backbone.image_size
    if size is None:
        raise ValueError("data images needs a backbone of images")
    chunks = [files[i : i + 16] for i in range(0, len(files), 16)]
    return torch.cat([backbone.encode(torch.stack([read_image(f, size) for f in chunk]).to(backbone.device)).cpu()
                      for chunk in tqdm(chunks, desc="encoding images")])  # fmt: skip


def encode_in_chunks(pixels: Tensor, backbone: Backbone, size: int = 256) -> Tensor:
    return torch.cat([backbone.encode(chunk.to(backbone.device)).cpu() for chunk in pixels.split(size)])


def make_batch(stream: Stream, backbone: Backbone, positions: Tensor, key: int, needs: frozenset[str]) -> Batch:
    """The batch of these global positions, with the fields in `needs`, in the backbone's dtype."""
    prompts = stream.prompts(positions)
    both = backbone.encode_prompts([*prompts, *[""] * len(prompts)])
    latents = stream.latents(positions) if "latents" in needs else None
    device = backbone.device
    return Batch(
        ids=positions.to(device),
        key=key,
        cond=both.select(slice(0, len(prompts))),
        uncond=both.select(slice(len(prompts), None)),
        latent_shape=backbone.latent_shape,
        prompts=tuple(prompts),
        latents=None if latents is None else latents.to(device, backbone.dtype),
        dtype=backbone.dtype,
    )
