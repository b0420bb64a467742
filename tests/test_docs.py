"""Every Markdown page: a table has the same number of cells in each row, and is one in GitHub's eyes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "benchmarks", "recipes", "fastgen", "assets", "tools")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def problems(text: str) -> list[str]:
    """What is wrong with the tables of a page. A table is a run of lines that begin with |, outside code blocks."""
    found, table, before = list[str](), list[tuple[int, str]](), ""
    text = re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", lambda code: "\n" * code[0].count("\n"), text)
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.lstrip().startswith("|"):
            if not table and before.strip():
                found.append(f"line {number}: no empty line before the table")
            table.append((number, line.strip()))
        elif table:
            counts = [len(re.findall(r"(?<!\\)\|", row)) for _, row in table]
            if len(table) < 2 or not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", table[1][1]):
                found.append(f"line {table[0][0]}: no line of dashes below the heads")
            for (i, row), count in zip(table, counts, strict=True):
                if count != counts[0] or not row.endswith("|"):
                    found.append(f"line {i}: {count - 1} cells below {counts[0] - 1} heads")
            table = []
        before = line
    return found


def test_broken_tables_are_found() -> None:
    whole = "words\n\n| a | b |\n|---|---:|\n| 1 | `x \\| y` |\n"
    assert problems(whole) == [] and problems(f"```\n| a |\n```\n{whole}") == []
    for broken, words in (
        (whole.replace(" \\|", " |"), "line 5: 3 cells"),
        (whole.replace("| 1 |", "| 1"), "line 5: 1 cells"),
        (whole.replace("|---|---:|\n", ""), "no line of dashes"),
        (whole.replace("words\n", "words"), "no empty line before"),
        (whole + "\n| alone |\n", "no line of dashes"),
        (whole.rstrip("|\n") + "\n", "line 5: 1 cells"),
    ):
        assert any(words in problem for problem in problems(broken)), (words, problems(broken))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_equal_rows(page: Path) -> None:
    assert problems(page.read_text()) == []
