"""Which of several students makes a sample: the router of multi-student distillation (arXiv 2410.23274).

K students divide the prompts among them. Each is distilled by itself, with any objective, on its own part. Together
they have K times the capacity of one student, at the time and memory bandwidth of one."""

import hashlib
import re
from pathlib import Path

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from fastgen.registry import MOST_WIDTH

MOST_STUDENTS = 1000


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Router:
    """A partition of all prompts: each belongs to exactly one of the students 0, ..., K - 1. Give one of these:

    labels: for prompts that are numbers 0, ..., labels - 1, the classes of a label-conditional teacher, together with
        of: K. Student k has the k-th of K blocks of consecutive labels, as equal as can be (the paper's rule for
        ImageNet).
    words: one list of words or phrases for each student. A prompt belongs to the first student one of whose words it
        contains, in upper or lower case, and to the last one if it contains none.
    of: K, alone. A prompt belongs to the student sha256(prompt) mod K. The parts are equal in size and alike in kind:
        no student is spared any kind of prompt.

    The paper divides texts by clusters of their embeddings, which are not offered here; `words` is ours."""

    of: int | None = Field(default=None, ge=2, le=MOST_STUDENTS)
    labels: int | None = Field(default=None, ge=2, le=MOST_WIDTH)
    words: tuple[tuple[str, ...], ...] = ()

    @model_validator(mode="after")
    def _one_rule(self) -> "Router":
        if bool(self.words) == (self.of is not None):
            raise ValueError("give either words, one list for each student, or of, their number")
        if self.words and (self.labels is not None or len(self.words) < 2):
            raise ValueError("words: give at least two lists, one for each student, and no labels")
        if any(not word.strip() for words in self.words for word in words):
            raise ValueError("words: an empty word is in every prompt; remove it")
        if not all(self.words[:-1]):
            raise ValueError("words: only the last list may be empty; its student has all other prompts")
        if self.labels is not None and self.of is not None and self.labels < self.of:
            raise ValueError(f"labels: {self.of} students need at least as many labels, got {self.labels}")
        return self

    @property
    def num_parts(self) -> int:
        """K."""
        return self.of or len(self.words)

    def route(self, prompt: str) -> int:
        """The student of a prompt. Raises ValueError for a prompt that is no label, if prompts are labels."""
        if self.labels is not None:
            if not prompt.isdecimal() or int(prompt) >= self.labels:
                raise ValueError(f"the prompts of these students are labels 0 to {self.labels - 1}, got {prompt!r}")
            return int(prompt) * self.num_parts // self.labels
        if not self.words:
            return int.from_bytes(hashlib.sha256(prompt.encode()).digest()) % self.num_parts
        found = (k for k, words in enumerate(self.words) if any(contains(prompt, word) for word in words))
        return next(found, self.num_parts - 1)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Part(Router):
    """The recipe's `part:` section: the router, and which of its students this run distils.

    index: k. The run sees only prompts of part k. The other keys are those of the router, and the same in all runs."""

    index: int = Field(default=0, ge=0, le=MOST_STUDENTS)

    @model_validator(mode="after")
    def _index(self) -> "Part":
        if self.index >= self.num_parts:
            raise ValueError(f"index: there are {self.num_parts} students, 0 to {self.num_parts - 1}")
        return self

    @property
    def router(self) -> Router:
        return Router(self.of, self.labels, self.words)

    def has(self, prompt: str) -> bool:
        return self.route(prompt) == self.index


def student_folders(folder: Path, num_parts: int) -> list[Path]:
    """Where a folder of several students has the network of each: the first one's is that of the pipeline itself."""
    return [folder, *(folder / f"student_{k}" for k in range(1, num_parts))]


def contains(prompt: str, words: str) -> bool:
    """Whether a text contains these words as whole words: "cat" is in "a Cat", and not in "a caterpillar"."""
    return re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", prompt, re.IGNORECASE) is not None
