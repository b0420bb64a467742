"""The README's own recipe is one that would run."""

import re
from pathlib import Path

from fastgen.config import load_recipe

ROOT = Path(__file__).parents[1]


def test_the_recipe_in_the_readme_is_accepted(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block)
    (tmp_path / "prompts.txt").write_text("a handwritten two\n")
    given = [
        f"backbone.path={ROOT / 'assets/teachers/digits'}",
        f"data.prompts={tmp_path / 'prompts.txt'}",
        f"eval.prompts={tmp_path / 'prompts.txt'}",
    ]
    recipe = load_recipe(tmp_path / "recipe.yaml", given)
    assert recipe.train.mixed_precision == "bf16" and recipe.rollout.num_steps == 4
