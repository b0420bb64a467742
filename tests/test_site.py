"""The documentation as a website."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen.registry import OBJECTIVES


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(project: Path, tmp_path: Path) -> None:
    """Every link leads somewhere, every objective has its page, and nothing is loaded from elsewhere."""
    command = [sys.executable, project / "tools/make_site.py", "--output", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    for name in OBJECTIVES:
        assert "<td><code>" in (tmp_path / f"site/objectives/{name}.html").read_text()
    for path in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?://', path.read_text()), path
