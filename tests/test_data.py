"""Data sources: every format, random access, an order for every epoch; errors come before weights load."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.batch import Batch
from fastgen.config import load_recipe
from fastgen.data import (
    DATA,
    DataError,
    DataSource,
    HubData,
    ImageData,
    PromptData,
    Stream,
    WebDatasetData,
    make_batch,
    read_prompts,
    shuffled,
)
from fastgen.data.digits import assets_dir, label_of, load_digits, prompt_for
from fastgen.data.hub import BlockStream
from fastgen.registry import RecipeError, build_section
from fastgen.train import main, train

ROOT = Path(__file__).parents[1]
CONFIG = SD3Config(path=str(assets_dir() / "teachers/digits"))
COUNT = 8
IMAGES = frozenset({"latents", "pixels", "images"})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return CONFIG.build(torch.device("cpu"), torch.float32, 0)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [prompt_for(int(label), i % 4) for i, label in enumerate(load_digits("train")[1][:COUNT])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> Path:
    """Eight training digits as a user would bring them: pictures with captions."""
    path = tmp_path_factory.mktemp("images")
    for i, prompt in enumerate(prompts):
        save_image(load_digits("train")[0][i], path / f"{i}.png")
        (path / f"{i}.txt").write_text(prompt + "\n")
    return path


@pytest.fixture(scope="module")
def sources(folder: Path, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataSource]:
    """The same eight digits in every format."""
    root = tmp_path_factory.mktemp("formats")
    pictures = [(folder / f"{i}.png").read_bytes() for i in range(COUNT)]
    for kind in ("csv", "jsonl"):
        (root / kind).mkdir()
        for i in range(COUNT):
            (root / kind / f"{i}.png").write_bytes(pictures[i])
    rows = [f'{i}.png,"{prompt}"' for i, prompt in enumerate(prompts)]
    (root / "csv/metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    lines = [json.dumps({"file_name": f"{i}.png", "caption": p}) for i, p in enumerate(prompts)]
    (root / "jsonl/metadata.jsonl").write_text("\n".join(lines))
    for number, part in enumerate((range(0, 5), range(5, COUNT))):
        write_tar(
            root / f"digits-{number:03d}.tar",
            {
                f"{i:06d}.{suffix}": data
                for i in part
                for suffix, data in (("png", pictures[i]), ("txt", prompts[i].encode()))
            },
        )
    data = datasets.Dataset.from_dict({"image": [{"bytes": p, "path": None} for p in pictures], "caption": prompts})
    data = data.cast_column("image", datasets.Image())
    (root / "hub").mkdir()
    data.to_parquet(root / "hub/train-00000-of-00001.parquet")
    data.save_to_disk(root / "disk")
    return {
        "folder": ImageData(folder=str(folder)),
        "csv": ImageData(folder=str(root / "csv")),
        "jsonl": ImageData(folder=str(root / "jsonl"), column="caption"),
        "webdataset": WebDatasetData(shards=str(root / "digits-{000..001}.tar")),
        "parquet": HubData(path=str(root / "hub"), image_column="image"),
        "disk": HubData(path=str(root / "disk"), image_column="image"),
        "streaming": HubData(path=str(root / "hub"), image_column="image", streaming=True, shuffle_buffer=4),
    }


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def png(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def batch_of(stream: Stream, backbone: SD3, positions: Tensor) -> Batch:
    return make_batch(stream, backbone, positions, 1, IMAGES)


def test_a_saved_data_set_has_the_split_that_is_asked_for(sources: dict[str, Any]) -> None:
    disk = sources["disk"]
    for keys in ({"split": "test"}, {"split": "train[:3]"}, {"subset": "large"}, {"revision": "abc"}):
        with pytest.raises(ValueError, match="leave out"):
            replace(disk, **keys).load(streaming=False)


def test_joined_files_of_prompts_have_no_marks_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "joined.txt").write_text("\ufeffa three\n\ufeffa four\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "joined.txt")) == ["a three", "a four"]


def test_every_epoch_visits_every_row_once_in_its_own_order() -> None:
    order = shuffled(torch.arange(30), 10, key=3)
    epochs = order.reshape(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(shuffled(torch.tensor([17, 4]), 10, key=3), order[[17, 4]])


FORMATS = ["folder", "csv", "jsonl", "webdataset", "parquet", "disk", "streaming"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_each_picture_with_its_own_caption(
    name: str, sources: dict[str, DataSource], backbone: SD3, prompts: list[str]
) -> None:
    source = sources[name]
    source.check(CONFIG)
    assert source.provides == IMAGES
    batch = batch_of(source.open(backbone, seed=0), backbone, torch.arange(COUNT))
    assert sorted(batch.prompts) == sorted(prompts)
    assert batch.latents is not None and batch.pixels is not None
    pixels, labels = load_digits("train")
    for shown, latent, prompt in zip(batch.pixels, batch.latents, batch.prompts, strict=True):
        nearest = int((pixels[:COUNT] - shown).square().flatten(1).mean(1).argmin())
        assert (pixels[nearest] - shown).abs().max() < 1 / 255
        assert int(labels[nearest]) == label_of(prompt)
        assert (backbone.decode(latent[None])[0] - shown).square().mean() < 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_processes_split_the_stream_and_a_run_resumes_at_the_sample(
    name: str, sources: dict[str, DataSource], backbone: SD3
) -> None:
    """Micro-batches of two for two processes, over three epochs, each from a stream of its own; and a stream that is
    opened anew at position 12: bit for bit what one process gets from 24 positions."""
    source = sources[name]
    whole = batch_of(source.open(backbone, 5), backbone, torch.arange(24))
    ranks = [source.open(backbone, 5), source.open(backbone, 5)]
    parts = [batch_of(ranks[i % 2], backbone, torch.arange(2 * i, 2 * i + 2)) for i in range(12)]
    resumed = batch_of(source.open(backbone, 5), backbone, torch.arange(12, 24))
    assert whole.latents is not None and resumed.latents is not None and whole.pixels is not None
    assert [p for part in parts for p in part.prompts] == list(whole.prompts)
    assert list(resumed.prompts) == list(whole.prompts[12:])
    assert torch.equal(torch.cat([part.latents for part in parts if part.latents is not None]), whole.latents)
    assert torch.equal(torch.cat([part.pixels for part in parts if part.pixels is not None]), whole.pixels)
    assert torch.equal(resumed.latents, whole.latents[12:])
    assert whole.prompts != batch_of(source.open(backbone, 6), backbone, torch.arange(24)).prompts


def test_a_stream_reads_in_order_from_its_block_and_remembers_its_first_captions(tmp_path: Path) -> None:
    """Ten rows repeated, in blocks of four: position 4 b + i is one of raw samples 4 b ... 4 b + 3."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": str(i)}) for i in range(10)))
    stream = HubData(path=str(tmp_path), streaming=True, shuffle_buffer=4).open(None, 0)  # type: ignore[arg-type]
    assert isinstance(stream, BlockStream)
    found = [int(p) for p in stream.prompts(torch.arange(40))]
    blocks = torch.tensor(found).reshape(10, 4)
    expected = torch.arange(40).remainder(10).reshape(10, 4)
    assert torch.equal(blocks.sort(dim=1).values, expected.sort(dim=1).values)
    assert not torch.equal(blocks, expected)
    late = HubData(path=str(tmp_path), streaming=True, shuffle_buffer=4).open(None, 0)  # type: ignore[arg-type]
    assert [int(p) for p in late.prompts(torch.arange(30, 34))] == found[30:34]  # beyond the end of an epoch
    assert [int(p) for p in late.prompts(torch.arange(3))] == found[:3]
    assert [int(p) for p in late.prompts(torch.arange(34, 40))] == found[34:]


def test_larger_images_are_cropped_and_smaller_ones_need_permission(backbone: SD3, tmp_path: Path) -> None:
    save_image(torch.rand(3, 50, 70), tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a seven")
    source = ImageData(folder=str(tmp_path))
    source.check(CONFIG)
    assert batch_of(source.open(backbone, 0), backbone, torch.arange(2)).pixels.shape == (2, 3, 32, 32)  # type: ignore[union-attr]
    save_image(torch.rand(3, 24, 70), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png with 70x24; remove them, set data\.allow_upscaling"):
        source.check(CONFIG)
    permitted = ImageData(folder=str(tmp_path), allow_upscaling=True)
    permitted.check(CONFIG)
    assert batch_of(permitted.open(backbone, 0), backbone, torch.arange(1)).pixels.shape == (1, 3, 32, 32)  # type: ignore[union-attr]


def test_an_image_cut_short_is_named_when_it_is_read(backbone: SD3, tmp_path: Path) -> None:
    save_image(torch.rand(3, 64, 64), tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    (tmp_path / "cut.txt").write_text("a seven")
    source = ImageData(folder=str(tmp_path))
    source.check(CONFIG)
    with pytest.raises(DataError, match=r"cut\.png"):
        source.open(backbone, 0).pixels(torch.arange(1))


@pytest.mark.slow
def test_the_gan_trains_on_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    overrides = [
        "train.steps=1",
        "train.batch_size=4",
        "train.eval_every=0",
        "train.sample_every=0",
        f"data={{name: images, folder: {folder}}}",
        "objective.gan_weight=0.01",
        "objective.fake_updates=1",
        "optimizers.discriminator={lr: 2e-4}",
        "eval.quick_num_samples=4",
        "eval.metrics=[accuracy]",
        "eval.teacher_steps=[2]",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert (
        train(load_recipe(ROOT / "recipes/digits_quickstart.yaml", overrides)) / "export/model_index.json"
    ).is_file()


def test_prompts_come_from_every_format_or_a_list(tmp_path: Path) -> None:
    wanted = ["a one, of two", "ein Böotier\nin two lines"]
    (tmp_path / "a.txt").write_text("a one\n\n a two \n")
    (tmp_path / "a.csv").write_text(f'id,caption\n1,"{wanted[0]}"\n2,"{wanted[1]}"\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("prompt\tid\na one, of two\t2\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": p}) for p in wanted))
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "label": wanted}), tmp_path / "a.parquet")
    assert read_prompts(str(tmp_path / "a.txt")) == ["a one", "a two"]
    assert read_prompts(str(tmp_path / "a.csv")) == wanted
    assert read_prompts(str(tmp_path / "a.tsv")) == wanted[:1]
    assert read_prompts(str(tmp_path / "a.jsonl")) == wanted
    assert read_prompts(str(tmp_path / "a.parquet"), "label") == wanted
    stream = PromptData(prompts=str(tmp_path / "a.csv")).open(None, 0)  # type: ignore[arg-type]
    assert sorted(stream.prompts(torch.arange(2))) == wanted
    assert stream.latents(torch.arange(2)) is None and stream.pixels(torch.arange(2)) is None
    assert PromptData(prompts=("a three",)).open(None, 0).prompts(torch.arange(2)) == ["a three"] * 2  # type: ignore[arg-type]


def test_a_webdataset_caption_may_be_in_its_json(tmp_path: Path) -> None:
    row = json.dumps({"caption": "in json", "width": 32}).encode()
    write_tar(
        tmp_path / "a.tar",
        {"x/1.json": row, "x/1.png": png(32), "x/1.txt": b"in txt", "2.png": png(32), "2.json": row, "2.cls": b"7"},
    )
    assert [e.caption for _, e in WebDatasetData(shards=str(tmp_path)).entries()] == ["in txt", "in json"]
    assert [e.caption for _, e in WebDatasetData(shards=str(tmp_path), column="caption").entries()] == ["in json"] * 2


Make = Callable[[Path], object]

REFUSED: dict[str, tuple[str, str, Make]] = {
    "no image folder": ("{name: images, folder: F/nowhere}", "no image folder", lambda f: None),
    "no images": ("{name: images, folder: F}", "contains no png", lambda f: None),
    "no caption": ("{name: images, folder: F}", "have no caption", lambda f: (f / "a.png").write_bytes(png(32))),
    "no prompt file": ("{name: prompts, prompts: nowhere.txt}", "no prompt file", lambda f: None),
    "no prompts": ("{name: prompts, prompts: []}", "no prompts", lambda f: None),
    "empty txt": ("{name: prompts, prompts: F/a.txt}", "the file is empty", lambda f: (f / "a.txt").write_text("\n")),
    "empty csv": (
        "{name: prompts, prompts: F/a.csv}",
        "it has no rows",
        lambda f: (f / "a.csv").write_text("prompt\n"),
    ),
    "empty jsonl": ("{name: prompts, prompts: F/a.jsonl}", "no rows", lambda f: (f / "a.jsonl").write_text("")),
    "not UTF-8": (
        "{name: prompts, prompts: F/a.csv}",
        "line 3 of .*a.csv is not UTF-8; convert the file",
        lambda f: (f / "a.csv").write_bytes("prompt\na\nein Böotier\n".encode("latin-1")),
    ),
    "no column": (
        "{name: prompts, prompts: F/a.csv, column: title}",
        "data: column: .* has no column 'title'; choose one of id, prompt",
        lambda f: (f / "a.csv").write_text("id,prompt\n1,a\n"),
    ),
    "no usual column": (
        "{name: prompts, prompts: F/a.csv}",
        "no column prompt, caption or text; choose one of id, title",
        lambda f: (f / "a.csv").write_text("id,title\n1,a\n"),
    ),
    "ragged": (
        "{name: prompts, prompts: F/a.csv}",
        "line 2 of .* has 3 cells, but the header has 2",
        lambda f: (f / "a.csv").write_text("id,prompt\n1,a, b\n"),
    ),
    "null": (
        "{name: prompts, prompts: F/a.jsonl}",
        "prompt in row 2 of .*a.jsonl is null, not text; correct or remove it",
        lambda f: (f / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n'),
    ),
    "list": (
        "{name: prompts, prompts: F/a.jsonl}",
        r"row 1 of .* is \"\['a'\]\" \(list\), not text",
        lambda f: (f / "a.jsonl").write_text('{"prompt": ["a"]}\n'),
    ),
    "blank": (
        "{name: prompts, prompts: F/a.csv}",
        "row 2 of .* has an empty prompt",
        lambda f: (f / "a.csv").write_text("id,prompt\n1,a\n2,\n"),
    ),
    "not JSON": (
        "{name: prompts, prompts: F/a.jsonl}",
        "line 2 of .* is not JSON",
        lambda f: (f / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n'),
    ),
    "parquet of numbers": (
        "{name: prompts, prompts: F/a.parquet}",
        r"prompt in row 1 of .* is '7' \(int\), not text",
        lambda f: pyarrow.parquet.write_table(pyarrow.table({"prompt": [7]}), f / "a.parquet"),
    ),
    "not parquet": (
        "{name: prompts, prompts: F/a.parquet}",
        "not a readable parquet file",
        lambda f: (f / "a.parquet").write_text("x"),
    ),
    "small image": (
        "{name: images, folder: F}",
        "1 image is smaller than the backbone's 32x32 pixels, the first is .*a.png with 24x24",
        lambda f: ((f / "a.png").write_bytes(png(24)), (f / "a.txt").write_text("a")),
    ),
    "no image": (
        "{name: images, folder: F}",
        "a.png is not a readable image",
        lambda f: ((f / "a.png").write_text("x"), (f / "a.txt").write_text("a")),
    ),
    "listed image missing": (
        "{name: images, folder: F}",
        "row 1 of .*metadata.csv names b.png, which does not exist",
        lambda f: (f / "metadata.csv").write_text("file_name,text\nb.png,a\n"),
    ),
    "no tar": ("{name: webdataset, shards: F}", "shards: there is no tar file", lambda f: None),
    "remote tar": ("{name: webdataset, shards: 'https://x/a.tar'}", "not a local file", lambda f: None),
    "tar without caption": (
        "{name: webdataset, shards: F}",
        "1.png in .*a.tar has no caption",
        lambda f: write_tar(f / "a.tar", {"1.png": png(32)}),
    ),
    "tar of small images": (
        "{name: webdataset, shards: F}",
        "the first is 1.png in .*a.tar with 24x24",
        lambda f: write_tar(f / "a.tar", {"1.png": png(24), "1.txt": b"a"}),
    ),
    "tar cut short": (
        "{name: webdataset, shards: F}",
        "a.tar is not a complete, uncompressed tar file",
        lambda f: (
            write_tar(f / "b", {"1.txt": b"a", "1.png": png(32) * 9}),
            (f / "a.tar").write_bytes((f / "b").read_bytes()[:1800]),
        ),
    ),
    "hub without the column": (
        "{name: hub, path: F, image_column: picture}",
        "image_column: .* has no column 'picture'; choose one of text",
        lambda f: (f / "a.jsonl").write_text('{"text": "a"}\n'),
    ),
    "hub with null": (
        "{name: hub, path: F}",
        "text in row 2 of .* is null, not text",
        lambda f: (f / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n'),
    ),
    "hub without the split": (
        "{name: hub, path: F, split: val}",
        "path: cannot load .*, split val",
        lambda f: (f / "a.jsonl").write_text('{"text": "a"}\n'),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_data_is_refused_before_weights_load(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, words, make = REFUSED[case]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    override = "data=" + data.replace("F", str(tmp_path / "data"))
    assert main([str(ROOT / "recipes/digits_quickstart.yaml"), override, f"output_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    print(error)
    assert error.startswith("refused: data: ") and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=words):
        raise ValueError(error)


def test_images_are_refused_for_points(folder: Path) -> None:
    with pytest.raises(RecipeError, match="data: name: image data needs a backbone that makes images"):
        load_recipe(ROOT / "recipes/mixture_dmd2_4step.yaml", [f"data={{name: images, folder: {folder}}}"])


def test_a_missing_extra_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    (tmp_path / "a.parquet").write_text("")
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"needs datasets; install it with pip install 'fastgen-distill\[data\]'"):
        HubData(path="org/name").check(CONFIG)
    with pytest.raises(ValueError, match="needs pyarrow"):
        read_prompts(str(tmp_path / "a.parquet"))


def test_every_section_in_the_documentation_is_accepted() -> None:
    text = (ROOT / "docs/data.md").read_text()
    sections = [yaml.safe_load(line)["data"] for line in text.splitlines() if line.startswith("data: ")]
    assert {section["name"] for section in sections} >= {"prompts", "images", "webdataset", "hub", "prepared"}
    for section in sections:
        build_section("data", section, DATA, DataSource)
