"""Feature networks of the image metrics, which map pixels to vectors. Each batch is embedded once for all metrics."""

import pickle
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.data.digits import IMAGE_SIZE, DigitsClassifier, load_classifier
from fastgen.metrics.reference import Reference

HUB_FILE = r"[\w-][\w.-]*/[\w.-]+/[\w./-]+\.pth"
FeatureName = Literal["digits", "inception", "clip", "latents"]
REGIONS = 4  # rows and columns of regions over which latents are averaged


class DigitsFeatures(nn.Module):
    """The shipped classifier's penultimate features, [B, 3, 32, 32] -> [B, 48]."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier: DigitsClassifier = load_classifier()

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            wanted = [3, IMAGE_SIZE, IMAGE_SIZE]
            raise ValueError(
                f"the digits classifier needs pictures of shape {wanted}, but these have "
                f"{list(pixels.shape[1:])}; use features: inception"
            )
        return self.classifier.features(pixels)


class InceptionFeatures(nn.Module):
    """The 2,048 pool features of the Inception v3 that published FID numbers use, on 8-bit images of any size.

    source: a local file, `weights-inception-2015-12-05-6726825d.pth` from torch-fidelity's releases, or a file on the
    hub, "org/name/file.pth", which is downloaded once. See check_inception and check_tensors for what is raised."""

    def __init__(self, source: str):
        super().__init__()
        check_inception(source)
        file = inception_file(source)
        check_tensors(file)
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels * 255).round().to(torch.uint8))


class LatentFeatures(nn.Module):
    """The latents of the pipeline's own VAE, averaged over 4 x 4 regions: [B, 3, H, W] -> [B, 16 C]. They need no
    download. They see colours and shapes of the size of a region, and no meaning.

    encode: pixels to latents [B, C, h, w]."""

    def __init__(self, encode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.encode = encode

    def forward(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.encode(pixels).float(), REGIONS).flatten(1)


class ClipFeatures(nn.Module):
    """The projected image embedding of a CLIP, [B, 3, H, W] -> [B, D], not normalised. The shorter side is resized to
    the network's size, bicubic, and the centre is cropped."""

    def __init__(self, path: str, device: torch.device | str):
        super().__init__()
        from fastgen.rewards.clip import load_clip  # it and transformers take seconds to import

        self.clip = load_clip(path, path, torch.device(device))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.clip.embedding(pixels)


def check_clip(path: str) -> None:
    """Raises ValueError if this is a local folder without the files of a CLIPModel. Makes no network requests."""
    from fastgen.rewards.clip_score import ClipScore

    try:
        ClipScore(path).ready()
    except ValueError as error:
        raise ValueError(str(error).replace("path:", "clip:", 1)) from None


def clip_files(path: str) -> list[Path]:
    """The files of a CLIP and its tokenizer. Those of a hub id are downloaded first."""
    from fastgen.rewards.clip_score import ClipScore

    return [*ClipScore(path).weight_files(), *ClipScore(path).other_files()]


def check_inception(source: str) -> None:
    """Raises ValueError if these weights are neither a local file nor one on the hub, or if the package
    torch-fidelity, which holds the network, is missing. Makes no network requests."""
    if not Path(source).is_file() and not re.fullmatch(HUB_FILE, source):
        raise ValueError(
            f"inception_weights: there is no file {source}; give a local copy of "
            "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases, or a file on the "
            "hub, org/name/file.pth"
        )
    if find_spec("torch_fidelity") is None:
        raise ValueError(
            "features: inception needs the package torch-fidelity: pip install 'fastgen-distill[inception]'"
        )


def inception_file(source: str) -> Path:
    """The path of the weights. A file on the hub is downloaded first."""
    if Path(source).is_file():
        return Path(source)
    from huggingface_hub import hf_hub_download

    org, name, file = source.split("/", 2)
    return Path(hf_hub_download(f"{org}/{name}", file))


def check_tensors(file: Path) -> None:
    """Raises ValueError if a weights file contains anything but tensors, because torch-fidelity would unpickle it."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"inception_weights: {file} is not a file of tensors only, so it was not loaded") from error


class FeatureNetwork:
    """Maps pixels [B, 3, H, W] in [0, 1] to features [B, D] float32 on the CPU. The network is loaded at first use.

    The features of the last batch are cached, so that metrics updated with the same tensor share one forward pass. The
    features of a reference are cached, too. name: digits; inception, with the file of its weights; clip, with its
    folder or hub id; or latents, with `encode`."""

    def __init__(
        self,
        name: FeatureName = "digits",
        source: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        encode: Callable[[Tensor], Tensor] | None = None,
    ):
        if name == "inception" and source is None:
            raise ValueError("features: inception needs inception_weights, a file with its weights")
        if name == "clip" and source is None:
            raise ValueError("features: clip needs clip, the folder or hub id of a CLIPModel")
        if name == "latents" and encode is None:
            raise ValueError("features: latents are those of a pipeline's VAE, and here is no pipeline; choose others")
        self.encode = encode
        self.name, self.source, self.device, self.batch_size = name, source, device, batch_size
        self._network: nn.Module | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._references: dict[tuple[str, int], Tensor] = {}

    @property
    def network(self) -> nn.Module:
        if self._network is None:
            self._network = self.load().to(self.device).eval().requires_grad_(False)
        return self._network

    def load(self) -> nn.Module:
        if self.encode is not None:
            return LatentFeatures(self.encode)
        if self.source is None:
            return DigitsFeatures()
        return ClipFeatures(self.source, self.device) if self.name == "clip" else InceptionFeatures(self.source)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not pixels:
            self._last = (pixels, self.network(pixels.to(self.device, torch.float32)).float().cpu())
        return self._last[1]

    def of_reference(self, reference: Reference, count: int) -> Tensor:
        """Features [count, D] of the first `count` images of the reference."""
        key = (reference.name, count)
        if key not in self._references:
            starts = range(0, count, self.batch_size)
            parts = [self(reference.read(i, min(i + self.batch_size, count))) for i in starts]
            self._references[key] = torch.cat(parts)
        return self._references[key]
