"""Writes the table of docs/faithfulness.md from the comparisons of tests/golden_*.py.

python tools/golden/table.py
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = "| row | objective | what is compared | source | relative error | convention |\n|---|---|---|---|---|---|\n"


def table() -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    for module in sorted((ROOT / "tests").glob("golden_*.py")):
        importlib.import_module(module.stem)
    from golden_rows import COMPARISONS, load_golden

    lines = []
    for name, row in sorted(COMPARISONS.items(), key=lambda item: (item[1].objective, item[0])):
        source = load_golden(name).source
        cells = [f"`{name}`", row.objective, row.quantity, source, f"{row.error():.0e}", row.convention or "the same"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(lines)


def main() -> None:
    page = ROOT / "docs/faithfulness.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")  # a table needs empty lines around it


if __name__ == "__main__":
    main()
