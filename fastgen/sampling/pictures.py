"""Samples as pictures: grids of images and video frames, and scatter plots of points."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from fastgen.data.files import replace_file
from fastgen.sampling.captions import PADDING, captioned
from fastgen.sampling.video import stills

EXACT = "exact"  # points with this name are drawn behind the others
BLUE, GREY = "#2f6fab", "#b5b5b5"


def png(picture: Figure | Image.Image) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        FigureCanvasAgg(picture).print_png(buffer)
    else:
        picture.save(buffer, format="PNG")
    return buffer.getvalue()


def grid(pixels: Tensor, columns: int = 8, captions: Sequence[str] = (), padding: int = PADDING) -> Image.Image:
    """Images in a grid. pixels: [B, 3, H, W] in [0, 1], or videos [B, F, 3, H, W]. Each video becomes a row of a few
    frames, at most 256 pixels wide each. captions: a text below each image or video, such as its prompt. padding:
    white pixels around each image that has no caption."""
    pixels = pixels.detach().float().cpu()
    samples = list(pixels.split(1))
    if pixels.dim() == 5:
        stack = stills(pixels)
        columns = 1 if any(captions) else stack.shape[1]
        pixels = stack.flatten(0, 1)
        smaller = min(1.0, 256 / pixels.shape[-1])
        pixels = F.interpolate(pixels, scale_factor=smaller, mode="area") if smaller < 1 else pixels
        samples = list(pixels.split(stack.shape[1]))
    if any(captions):
        return captioned([sheet(sample, len(sample)) for sample in samples], captions, columns)
    return sheet(pixels, columns, padding)


def sheet(pixels: Tensor, columns: int, padding: int = PADDING) -> Image.Image:
    grid = make_grid(pixels.clamp(0, 1), nrow=columns, padding=padding, pad_value=1.0)
    return Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())


def save_grid(pixels: Tensor, path: Path, columns: int = 8, captions: Sequence[str] = ()) -> None:
    """Writes a PNG of images in a grid, or of a few frames per video. pixels, captions: as in `grid`, on any
    device."""
    replace_file(path, png(grid(pixels, columns, captions)))


def plot_points(points_by_name: Mapping[str, Tensor], path: Path) -> None:
    """Writes a PNG with one scatter plot per name. points: [B, D], on any device. With more than two axes, only the
    first two are drawn; with one axis, a histogram is drawn. Points named "exact" are drawn in grey behind all
    others."""
    replace_file(path, png(scatter_figure(points_by_name)))


def scatter_figure(points_by_name: Mapping[str, Tensor]) -> Figure:
    sets = {name: points.detach().float().cpu() for name, points in points_by_name.items()}
    names = [name for name in sets if name != EXACT] or [EXACT]
    width, height = 3.4 * len(names), 3.4
    figure = Figure(figsize=(width, height))  # fixed margins: matplotlib's own layouts draw every figure twice
    axes = figure.subplots(1, len(names), squeeze=False, sharex=True, sharey=True)[0]
    figure.subplots_adjust(0.45 / width, 0.3 / height, 1 - 0.1 / width, 1 - 0.3 / height, wspace=0.05)
    for axis, name in zip(axes, names, strict=True):
        layers = [(EXACT, GREY), (name, BLUE)] if EXACT in sets and name != EXACT else [(name, BLUE)]
        for label, colour in layers:
            points = sets[label]
            if points.shape[1] == 1:
                axis.hist(points[:, 0].numpy(), bins=60, density=True, color=colour, alpha=0.6, label=label)
            else:
                axis.scatter(
                    points[:, 0].numpy(), points[:, 1].numpy(), s=3, linewidths=0, color=colour, alpha=0.6, label=label
                )
                axis.set_aspect("equal")
        axis.set_title(plain(name), fontsize=9)
        if len(layers) > 1:
            axis.legend(markerscale=3, fontsize=7, loc="upper right")
    return figure


def plain(text: str) -> str:
    """Shortens a text to fit an axis, and escapes it so that matplotlib does not read it as a formula."""
    text = text if len(text) <= 32 else text[:31] + "…"
    return text.replace("$", r"\$")
