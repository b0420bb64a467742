"""The rooms of the package and the directions of its imports, as docs/architecture.md draws them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fastgen

PACKAGE = Path(fastgen.__file__).parent

# From the ground up. A name is a module, or a room with all its modules that are not named themselves. A module may
# import from its own layer and from those above it in this list, wherever the import statement stands.
LAYERS = (
    (
        *("registry", "noise", "schedule", "data.digits", "data.files", "sampling.video", "sampling.captions"),
        *("sampling.pictures", "run.terminal", "run.quiet", "run.refusal"),
    ),
    tuple(
        f"streaming.{module}" for module in ("schedule", "precision", "block", "linear_state", "retention", "context")
    ),
    ("batch", "policy"),
    ("signals",),
    ("denoiser", "modules"),  # the network contract, and what implements, wraps and extends it
    ("rollout",),
    ("flow", "ops", "pipelines"),
    ("streaming",),  # causal networks, and a running stream
    ("backbones", "pipelines.streaming"),
    ("sampling.sampler",),
    ("data",),
    ("rewards",),
    ("networks", "metrics", "run.checkpoint"),
    ("recipe",),
    ("objectives",),
    ("config",),
    ("sampling", "evaluation"),
    ("run",),
    ("exporting",),
    ("planning",),
    ("starting",),
    ("train",),
    ("api",),
    ("commands",),
    ("cli", "__main__"),
)
MOST_FLAT_MODULES = 13


def modules() -> dict[str, Path]:
    """Dotted name below the package, "" for the package itself -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this package that a file imports: at its top, inside functions, and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("fastgen.") in known else node.module for n in names]
        else:
            continue
        for name in names:
            if name.startswith("fastgen.") and name.removeprefix("fastgen.") in known:
                yield name.removeprefix("fastgen.")


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; [] if there is none."""
    state, path = dict[str, str](), list[str]()

    def visit(name: str) -> list[str]:
        state[name] = "open"
        path.append(name)
        for other in sorted(edges[name]):
            if state.get(other) == "open":
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        path.pop()
        state[name] = "done"
        return []

    return next((found for name in sorted(edges) if name not in state and (found := visit(name))), [])


def layer(module: str) -> int:
    """The layer of a module: that of the longest name in LAYERS that it is or lies in."""
    fitting = {
        name: i for i, names in enumerate(LAYERS) for name in names if module == name or module.startswith(f"{name}.")
    }
    assert fitting, f"fastgen.{module} belongs to no layer; add it, or its room, to LAYERS and to docs/architecture.md"
    return fitting[max(fitting, key=len)]


def test_no_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle(graph()) == []


def test_imports_run_one_way() -> None:
    wrong = [
        f"fastgen.{name} imports fastgen.{other}, which lies above it"
        for name, others in graph().items()
        for other in others
        if name and layer(other) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_is_hidden_from_the_interpreter() -> None:
    """TYPE_CHECKING served to hide circles; there are none left to hide."""
    assert [name for name, path in modules().items() if "TYPE_CHECKING" in path.read_text()] == []


def test_few_modules_are_flat() -> None:
    flat = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))
    print(f"{len(flat)} flat modules: {', '.join(flat)}")
    assert len(flat) <= MOST_FLAT_MODULES


def test_the_page_names_every_room_and_flat_module() -> None:
    page = (PACKAGE.parent / "docs/architecture.md").read_text()
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in ("__pycache__",)}
    flat = {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")}
    missing = [name for name in sorted(rooms | flat) if f"`{name}`" not in page and f"`{name}/`" not in page]
    assert not missing, f"docs/architecture.md does not name {missing}"


def test_formatting_is_the_formatters() -> None:
    marked = [
        str(path) for path in modules().values() for line in path.read_text().splitlines() if "# fmt: skip" in line
    ]
    print(f"{len(marked)} lines are exempt from the formatter")
    assert len(marked) <= 10, marked
