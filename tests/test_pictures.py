"""One reader of images: every mode has its right colours, and what is no image is refused by name, everywhere."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import draws, mutated
from PIL import Image

from fastgen.data.base import DataError
from fastgen.data.digits import load_digits
from fastgen.data.images import read_image
from fastgen.data.pictures import PictureError, image_files, picture_size, read_picture
from fastgen.evaluation.evaluate import evaluate_images_with_samples
from fastgen.metrics.reference import check_one_size, open_reference, read_images
from fastgen.recipe import EvalConfig


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return io.BytesIO(buffer.getvalue())


def pixel(image: Image.Image, kind: str = "PNG", **options: object) -> tuple[int, int, int]:
    read = read_picture(saved(image, kind, **options), "a picture")
    assert read.mode == "RGB"
    return read.getpixel((0, 0))  # type: ignore[return-value]


GREY16 = Image.fromarray(np.full((4, 4), 32768, np.uint16))


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("RGB", (4, 4), (10, 20, 30)), (10, 20, 30)),
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(4), (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), (255, 255, 255)),  # red that the file hides
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (GREY16, (128, 128, 128)),
    ],
    ids=["RGB", "L", "1", "P", "RGBA", "hidden", "half", "LA", "I;16"],
)
def test_modes_have_their_colours(image: Image.Image, wanted: tuple[int, int, int]) -> None:
    assert pixel(image) == wanted


def test_a_transparent_palette_and_cmyk() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0] + [0] * 765)
    assert pixel(palette, transparency=0) == (255, 255, 255)
    cyan = pixel(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)
    assert cyan[0] < 5 and cyan[1] > 250 and cyan[2] > 250


def test_floating_point_has_no_known_scale() -> None:
    with pytest.raises(PictureError, match=r"scan\.tiff: its mode is F, whose scale is not known"):
        read_picture(saved(Image.new("F", (4, 4), 0.5), "TIFF"), "scan.tiff")


def test_exif_turns_a_picture_everywhere(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 64), "black")
    image.paste((255, 0, 0), (0, 0, 32, 32))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right to be seen
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    (tmp_path / "a.txt").write_text("\ufeffa red half\n", encoding="utf-8")
    assert picture_size(path, "a") == (64, 32)
    scored = read_images([path])
    trained = read_image(path, (32, 32), "a", False)
    assert scored.shape == (1, 3, 32, 64) and scored[0, 0, 16, 60] == 1 and scored[0, 0, 16, 4] == 0
    assert torch.equal(trained, scored[0, :, :, 16:48])  # the centre of the turned picture
    assert open_reference(str(tmp_path)).prompts == ("a red half",)


def broken_files(folder: Path) -> list[Path]:
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))).getvalue()
    contents = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.png": b"hello",
        "lfs.png": b"version https",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in contents]


def test_what_is_no_image_is_named_everywhere(tmp_path: Path) -> None:
    for path in broken_files(tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_image(path, (32, 32), str(path), True)
        with pytest.raises(ValueError, match=path.name):
            read_images([path])


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # one and a half times as many are a warning, twice an error
    for read in (lambda: read_image(path, (32, 32), str(path), True), lambda: read_images([path])):
        with pytest.raises((DataError, PictureError), match=r"bomb\.png"):
            read()
    assert picture_size(path, "bomb.png") is None, "the header is refused, too"


def test_the_header_tells_what_the_picture_is(tmp_path: Path) -> None:
    """Its size is that of the picture that is read, turned by XMP alone, too; without a known scale it is none."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"></rdf></x:xmpmeta>'
    Image.new("RGB", (32, 64)).save(tmp_path / "a.jpg", xmp=xmp)
    assert picture_size(tmp_path / "a.jpg", "a") == read_picture(tmp_path / "a.jpg", "a").size == (64, 32)
    Image.new("F", (4, 4)).save(tmp_path / "a.tiff")
    assert picture_size(tmp_path / "a.tiff", "a") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is not a file"):
        image_files(tmp_path)
    with pytest.raises(PictureError, match=r"b\.png is not a file"):
        read_picture(tmp_path / "b.png", str(tmp_path / "b.png"))


def test_sizes_are_compared_whatever_the_batch(tmp_path: Path) -> None:
    for name, side in (("a", 32), ("b", 32), ("c", 48)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"c\.png has 48x48, .*a\.png has 32x32"):
        evaluate_images_with_samples(tmp_path, EvalConfig(metrics=("jpeg_size",), num_samples=3, batch_size=1))
    with pytest.raises(ValueError, match="same size"):
        check_one_size(sorted(tmp_path.iterdir()))


@pytest.mark.slow
def test_fuzzed_pictures_are_read_alike_or_refused_by_name(tmp_path: Path) -> None:
    """Damage to four formats: training and scoring agree, or both name the file."""
    digit = Image.fromarray((load_digits("test")[0][0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).resize(
        (40, 40)
    )
    digit = Image.merge("RGBA", (*digit.split(), Image.new("L", digit.size, 200)))
    bases = [
        (f".{k.lower()}", saved(digit.convert(m), k).getvalue())
        for k, m in (("PNG", "RGBA"), ("PNG", "L"), ("WEBP", "RGBA"), ("JPEG", "RGB"))
    ]
    read, refused = 0, 0
    for draw in draws():
        suffix, data = draw.choice(bases)
        path = tmp_path / f"fuzz{suffix}"
        path.write_bytes(mutated(draw, data))
        try:
            trained = read_image(path, (8, 8), str(path), True)
        except DataError as error:
            refused += 1
            assert path.name in str(error)
            with pytest.raises(ValueError, match=path.name):
                read_images([path])
        else:
            read += 1
            assert trained.shape == (3, 8, 8) and bool(trained.isfinite().all()) and len(read_images([path])) == 1
    print(f"{read} read, {refused} refused")
    assert read > 100 and refused > 100
