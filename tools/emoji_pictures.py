"""The pictures of the emoji world: two styles of the same emoji, with captions, and which of them nobody trains on.

3d: Microsoft's Fluent Emoji (MIT), from the npm package @lobehub/fluent-emoji-3d. flat: Twemoji (CC BY 4.0), from
emoji-datasource-twitter, whose emoji.json (MIT) has the names. A picture is 64 x 64 pixels on white."""

import hashlib
import json
import re
import subprocess
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training import save_whole

SIZE = 64
STYLES = ("3d", "flat")
FLUENT, TWEMOJI = "@lobehub/fluent-emoji-3d", "emoji-datasource-twitter"
VERSIONS = {FLUENT: "1.1.0", TWEMOJI: "16.0.0"}
TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium dark skin",
    "1F3FF": "dark skin",
}
HELD_OUT = 0.1  # of the pairs of an emoji and a skin tone, and of the pairs of an emoji without tones and a style
WORDINGS = (
    "{name}, {style}",
    "a {style} picture of {name}",
    "{name} in {style} style",
    "{style} emoji: {name}",
    "{name}",
    "a picture of {name}",
)  # the last two leave the style open


@dataclass(frozen=True)
class Emoji:
    """One picture. code: its code points. name: in lower case, with the skin tone. base: the emoji without it.
    group: as Unicode groups emoji. held_out: whether it belongs to the reference, which nobody trains on."""

    code: str
    name: str
    base: str
    group: str
    style: str
    held_out: bool

    def prompt(self, wording: int) -> str:
        return WORDINGS[wording].format(name=self.name, style=self.style)


def unstyled(code: str) -> str:
    """The code without variation selectors and leading zeros, by which both packages are matched."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f").lstrip("0")


def plain(name: str) -> str:
    """Lower-case words of a to z and 0 to 9."""
    ascii_ = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("'", "")
    return " ".join(re.findall("[a-z0-9]+", ascii_))


def tone_words(tones: str) -> str:
    """The words for "1F3FB" or, for two people, "1F3FB-1F3FF"."""
    return " and ".join(TONES[tone] for tone in tones.split("-"))


def held_out(seed: int, *parts: str) -> bool:
    """Chosen by a hash, so that an emoji that is added to the packages moves no other."""
    digest = hashlib.sha256("|".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT * 2**32


def install(folder: Path) -> Path:
    """Installs the npm packages into a folder, unless they are there; returns node_modules."""
    modules = folder / "node_modules"
    wanted = [f"{name}@{version}" for name, version in VERSIONS.items()]
    if not all((modules / name / "package.json").is_file() for name in VERSIONS):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-save", "--ignore-scripts", "--prefix", folder, *wanted], check=True)
    for name, version in VERSIONS.items():
        found = json.loads((modules / name / "package.json").read_text())["version"]
        if found != version:
            raise ValueError(f"{modules / name} has version {found}, the pictures are those of {version}")
    return modules


def listed(modules: Path, seed: int) -> list[tuple[Emoji, Path]]:
    """Every emoji that both packages have, in both styles, in the order of emoji.json, with its picture's file."""
    fluent = {unstyled(path.stem): path for path in (modules / FLUENT / "assets").glob("*.webp")}
    twemoji = {unstyled(path.stem): path for path in (modules / TWEMOJI / "img/twitter/64").glob("*.png")}
    result = list[tuple[Emoji, Path]]()
    for entry in json.loads((modules / TWEMOJI / "emoji.json").read_text()):
        base, variations = plain(entry["name"]), entry.get("skin_variations") or {}
        if "ideograph" in base:  # its name is a number
            continue
        codes = {"": entry["unified"]} | {tones: value["unified"] for tones, value in variations.items()}
        for tones, code in codes.items():
            if (key := unstyled(code)) not in fluent or key not in twemoji:
                continue
            name = f"{base} with {tone_words(tones)}" if tones else base
            for style, files in zip(STYLES, (fluent, twemoji), strict=True):
                apart = held_out(seed, base, tones) if variations else held_out(seed, base, style)
                apart = apart and bool(tones or not variations)  # an emoji that has tones is always seen without one
                result.append((Emoji(key, name, base, entry["category"], style, apart), files[key]))
    return result


def read_picture(path: Path) -> Tensor:
    """[3, SIZE, SIZE] uint8, on white."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)


def make_pictures(work: Path, seed: int) -> None:
    """Writes pictures.safetensors and emoji.json into `work`, unless they are there."""
    if (work / "emoji.json").is_file():
        return
    found = listed(install(work / "packages"), seed)
    save_whole({"pixels": torch.stack([read_picture(path) for _, path in found])}, work / "pictures.safetensors")
    (work / "emoji.json").write_text(json.dumps([asdict(emoji) for emoji, _ in found]))
    print(f"{len(found)} pictures, {sum(emoji.held_out for emoji, _ in found)} of them held out")


def read_pictures(work: Path) -> tuple[list[Emoji], Tensor]:
    """All pictures: what each shows, and pixels [N, 3, SIZE, SIZE] uint8."""
    emoji = [Emoji(**entry) for entry in json.loads((work / "emoji.json").read_text())]
    return emoji, load_file(work / "pictures.safetensors")["pixels"]


def split(work: Path, held: bool) -> tuple[list[Emoji], Tensor]:
    """The pictures that are trained on, or those that are held out."""
    emoji, pixels = read_pictures(work)
    rows = [i for i, e in enumerate(emoji) if e.held_out == held]
    return [emoji[i] for i in rows], pixels[rows]


def weights(emoji: list[Emoji]) -> Tensor:
    """How often each picture is drawn: an emoji with n pictures of one style as often as sqrt(n) others together."""
    count: dict[tuple[str, str], int] = {}
    for e in emoji:
        count[e.base, e.style] = count.get((e.base, e.style), 0) + 1
    return torch.tensor([count[e.base, e.style] ** -0.5 for e in emoji])


def every_prompt(work: Path) -> list[str]:
    """Every wording of every caption, also of those that are held out: what tokenizers are made from."""
    emoji, _ = read_pictures(work)
    return [e.prompt(wording) for e in emoji for wording in range(len(WORDINGS))]


def vocabulary(prompts: Iterable[str]) -> list[str]:
    """Every word of the prompts."""
    return sorted({word for prompt in prompts for word in re.findall("[a-z0-9]+", prompt)})
