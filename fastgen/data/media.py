"""The two kinds of files that samples are read from: pictures and videos, known by the endings of their names."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Medium:
    """word: what messages call one such file. suffixes: the endings of their names, in lower case."""

    word: str
    suffixes: tuple[str, ...]

    @property
    def endings(self) -> str:
        """The endings as text, such as "mp4, webm or gif"."""
        *first, last = (suffix[1:] for suffix in self.suffixes)
        return f"{', '.join(first)} or {last}"

    @property
    def one(self) -> str:
        """The word with its article."""
        return f"an {self.word}" if self.word[0] in "aeiou" else f"a {self.word}"

    def files(self, folder: Path) -> list[Path]:
        """The files of this kind in a folder, sorted by name. Raises ValueError if there are none."""
        if not folder.is_dir():
            raise ValueError(f"there is no {self.word} folder at {folder}")
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in self.suffixes and not f.is_dir())
        if not files:
            raise ValueError(f"{folder} contains no {self.endings} {self.word}")
        if odd := next((f for f in files if not f.is_file()), None):
            raise ValueError(f"{odd} is not a file; remove it")
        return files


IMAGES = Medium("image", (".png", ".jpg", ".jpeg", ".webp"))
VIDEOS = Medium("video", (".mp4", ".webm", ".gif"))
