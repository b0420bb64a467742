"""What is not Python but must fit the package: the Dockerfile, and the workflow of a release."""

import json
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from fresh import RunFresh

import fastgen


def copied(dockerfile: str) -> list[str]:
    """The sources of all COPY lines."""
    return [source for line in re.findall(r"^COPY (.+)$", dockerfile, re.M) for source in line.split()[:-1]]


def test_the_dockerfile_copies_what_is_there_and_all_that_is_needed(project: Path) -> None:
    text = (project / "Dockerfile").read_text()
    sources = copied(text)
    assert sources and all((project / source).exists() for source in sources)
    (command,) = re.findall(r"^CMD (.+)$", text, re.M)
    assert json.loads(command)[1] in sources
    build = tomllib.loads((project / "pyproject.toml").read_text())
    included = build["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    for needed in (*included, build["project"]["readme"], *build["project"]["license-files"]):
        assert any(needed == source or needed.startswith(f"{source}/") for source in sources), needed
    assert text.index("COPY fastgen") < text.index("pip install --no-cache-dir -e .")


def test_nothing_that_is_copied_is_ignored(project: Path) -> None:
    lines = [line for line in (project / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*" and set(copied((project / "Dockerfile").read_text())) == kept
    assert any(fnmatch("fastgen/__pycache__", line) for line in lines)


def release(project: Path) -> dict:
    return yaml.safe_load((project / ".github/workflows/release.yml").read_text())


@pytest.mark.parametrize(("tag", "code"), [(f"v{fastgen.__version__}", 0), ("v9.9.9", 1), (fastgen.__version__, 1)])
def test_a_tag_that_is_not_the_version_ends_the_release(project: Path, tag: str, code: int) -> None:
    """The step of the workflow, as the shell runs it."""
    steps = release(project)["jobs"]["build"]["steps"]
    (step,) = [step["run"] for step in steps if step.get("name") == "The tag is the version"]
    done = subprocess.run(["bash", "-e", "-c", step], cwd=project, env=os.environ | {"GITHUB_REF_NAME": tag})
    assert done.returncode == code


def test_only_the_job_that_publishes_may_ask_for_a_token(project: Path) -> None:
    workflow = release(project)
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in workflow["jobs"]["build"]
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"


def test_the_core_does_without_the_large_packages_that_a_development_install_has(
    run_fresh: RunFresh, project: Path
) -> None:
    """The digits, and the shift of a scheduler that stores a list of steps."""
    program = """
import sys
sys.modules |= dict.fromkeys(("scipy", "sklearn", "pandas"))  # importing one of them now fails
from fastgen.data.digits import load_digits
from fastgen.pipelines.schedulers import solve_shift
print(len(load_digits("train")[0]), len(load_digits("test")[0]), round(solve_shift((1.0, 0.9, 0.75, 0.5)), 3))
"""
    assert run_fresh(program, project).stdout.split() == ["1198", "599", "2.004"]


def test_the_stored_digits_are_scikit_learns(project: Path) -> None:
    sys.path.insert(0, str(project / "tools"))
    from make_digits_data import tensors
    from safetensors.torch import load_file

    stored, made = load_file(project / "assets/digits/digits.safetensors"), tensors()
    assert stored.keys() == made.keys() and all(stored[name].equal(made[name]) for name in made)
