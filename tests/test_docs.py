"""Every Markdown page: a table has the same number of cells in each row, and is one in GitHub's eyes."""

import re
from pathlib import Path

import pytest
import yaml

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


CLAIMS = re.compile(r"\]\([^)]+\)|arXiv \d{4}\.\d{5}|`fastgen objectives`")


def test_every_advice_points_at_its_evidence() -> None:
    text = (ROOT / "docs/choosing.md").read_text()
    rows = text.partition("| you want |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) > 8
    for row in rows:
        assert CLAIMS.search(row.split("|")[3]), row


def test_every_question_has_an_answer_with_a_link() -> None:
    answers = re.findall(r"^\*\*(.+?)\*\*\n(.+?)(?=\n\n|\Z)", (ROOT / "docs/faq.md").read_text(), re.M | re.S)
    assert len(answers) > 20
    for question, answer in answers:
        assert "](" in answer, question
        sentences = re.findall(r"[.:](?:\s|$)", re.sub(r"\[[^]]+\]\([^)]+\)", "", answer))
        assert len(sentences) <= 6, question


def made(page: str) -> list[list[str]]:
    """The rows of the table that tools/plan_costs.py wrote into a page."""
    text = (ROOT / page).read_text().partition("<!-- made by")[2].partition("<!-- end -->")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "](../recipes" in line]


def recipe_named(cell: str) -> dict:
    (name,) = re.findall(r"recipes/(\w+)\.yaml", cell)
    return yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text())


def test_planned_costs_and_rates_are_those_of_the_recipes() -> None:
    """`python tools/plan_costs.py` writes them again."""
    assert made("docs/cost.md") and made("docs/choosing.md")
    for row in made("docs/cost.md"):
        assert int(row[1].replace(",", "")) == recipe_named(row[0])["train"]["steps"], row
    for row in made("docs/choosing.md"):
        recipe = recipe_named(row[1])
        assert int(row[2]) == len(recipe["rollout"]["timesteps"]), row
        assert row[3].startswith("adapter") == ("student" in recipe.get("lora", {})), row
        for cell, role in zip(row[4:6], ("student", "fake_score"), strict=True):
            assert cell == "none" or float(cell) == float(recipe["optimizers"][role]["lr"]), row
