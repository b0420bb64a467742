"""Whether the tests notice a changed formula: one sign, weight, norm, stop-gradient or level at a time.

    python benchmarks/mutation_test.py                  # what is not in the table yet; then the survivors
    python benchmarks/mutation_test.py --files dmd2 --list

Mutations are found by pattern in the syntax trees of the objectives, signals, flow maps and rollout:

    sign           a + b becomes a - b and the reverse; -a becomes a
    weight         a * b and a / b become a (or b, where a is a number); a ** b becomes a
    norm           mean and sum are exchanged, and so are square and abs; a root is left out
    stop-gradient  detach() and no_grad are left out; frozen networks are not frozen
    level          t and s are exchanged, where a function has both

Index arithmetic, messages and types are left alone, and so are the defaults of fields, which tests/golden_*.py pin.
Each mutation runs the unmarked tests of its file (TESTS below) until one fails. A process that has torch and diffusers
in memory forks for every mutation; the child imports fastgen with the one changed module. The table,
mutation_test.jsonl, has a row for each mutation, so that an interrupted run goes on where it was. A mutation that
hangs counts as caught. --share tries a part of them, chosen by a hash of their names, so that it is the same part in
every run."""

import argparse
import ast
import copy
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import append_row, read_rows, sort_rows

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".jsonl")
STREAMING = ["streaming_terms", "teacher_forcing", "causal_objectives", "streaming", "streaming_order"]
DMD = ["dmd2", "dmd2_options", "dmd2_levels", "golden", "phased_dmd", "streaming_terms", "ar1_streaming"]
ROLLOUT = ["rollout", "shared_rollouts", "streaming", "streaming_training", "streaming_order", "ar1_streaming", "dmd2"]
TESTS = {  # file of fastgen/ -> test files, the likeliest first
    "objectives/ac_dmd.py": ["rtdmd", "golden", "phased_dmd", "streaming_terms"],
    "objectives/adm.py": ["adm", "golden", "streaming_terms", "two_time"],
    "objectives/adp.py": ["adm", "golden", "streaming_terms", "two_time"],
    "objectives/any_flow.py": ["any_flow"],
    "objectives/asd.py": ["streaming_methods", "streaming_terms"],
    "objectives/causal.py": [*STREAMING, "streaming_methods", "any_flow"],
    "objectives/cdm.py": ["cdm", "golden"],
    "objectives/collected.py": ["rtdmd", "crd"],
    "objectives/consistency.py": [
        "consistency",
        "truncation",
        "feedback",
        "golden",
        "scm",
        "causal_objectives",
        "streaming_terms",
    ],
    "objectives/context_forcing.py": ["context_forcing"],
    "objectives/crd.py": ["crd", "golden", "streaming_terms"],
    "objectives/ctm.py": ["ctm", "golden"],
    "objectives/disback.py": ["dmd2_options", "golden", "streaming_terms"],
    "objectives/dmd2.py": [*DMD, "embedding"],
    "objectives/embedding.py": ["embedding", "streaming_terms"],
    "objectives/embedding_loss.py": ["embedding", "streaming_terms"],
    "objectives/f_distill.py": ["dmd2_options", "golden", "streaming_terms"],
    "objectives/fake_score.py": DMD,
    "objectives/feedback.py": ["feedback"],
    "objectives/flash_dmd.py": ["flash_dmd"],
    "objectives/flow_map.py": ["flow_map", "golden", "two_time", "any_flow"],
    "objectives/gdd.py": ["gdd", "golden"],
    "objectives/gndm.py": ["gndm", "golden", "streaming_terms"],
    "objectives/hiar.py": ["streaming_methods"],
    "objectives/ladd.py": ["scm", "consistency", "golden"],
    "objectives/long_tuning.py": ["long_tuning"],
    "objectives/mdt.py": ["mdt", "golden"],
    "objectives/mean_flow.py": ["mean_flow", "golden"],
    "objectives/ode_regression.py": ["ode_regression", "golden", "causal_objectives", "streaming_methods"],
    "objectives/phased_dmd.py": ["phased_dmd", "golden", "streaming_terms"],
    "objectives/progressive.py": ["reflow"],
    "objectives/rcm.py": ["scm", "golden"],
    "objectives/re_dmd.py": ["dmd2_options", "golden", "streaming_terms", "streaming_methods"],
    "objectives/reflow.py": ["reflow", "golden"],
    "objectives/replay.py": ["gndm", "streaming_terms", "ar1_streaming", "rtdmd", "adm"],
    "objectives/rtdmd.py": ["rtdmd", "golden", "streaming_terms"],
    "objectives/salt.py": ["streaming_methods"],
    "objectives/sc_dmd.py": ["dmd2_options", "golden", "streaming_methods"],
    "objectives/scm.py": ["scm", "golden", "streaming_terms"],
    "objectives/self_e.py": ["self_e"],
    "objectives/sid.py": ["sid", "golden", "streaming_terms"],
    "objectives/sim.py": ["sid"],
    "objectives/step_lists.py": ["streaming_methods"],
    "objectives/stream_r1.py": ["streaming_methods", "streaming_terms"],
    "objectives/tdm.py": ["tdm", "golden"],
    "objectives/teacher_forcing.py": STREAMING,
    "objectives/truncation.py": ["truncation", "golden"],
    "objectives/transition_matching.py": ["inner_flow"],
    "objectives/pi_flow.py": ["pi_flow", "golden"],
    "objectives/vdot.py": ["vdot"],
    "signals.py": ["signals", "golden", "dmd2", "rtdmd", "crd", "gndm", "dmd2_options", "hacking"],
    "flow/flow_maps.py": ["flow_maps", "golden", "flow_map", "mean_flow", "scm", "consistency"],
    "flow/tangents.py": ["tangents", "flow_maps", "golden", "scm", "mean_flow"],
    "flow/time_pairs.py": ["flow_maps", "mean_flow", "flow_map", "consistency", "golden"],
    "modules/inner_flow.py": ["inner_flow"],
    "pipelines/inner_flow.py": ["inner_flow"],
    "modules/segment_flow.py": ["pi_flow"],
    "pipelines/segment_flow.py": ["pi_flow"],
    "policy.py": [*ROLLOUT, "two_time", "few_step", "config"],
    "rollout/data.py": ["dmd2_levels", "golden"],
    "rollout/passes.py": ROLLOUT,
    "rollout/rolling.py": ["streaming_rolling"],
    "rollout/simulation.py": ROLLOUT,
    "rollout/steps.py": ["rollout", "few_step", "golden", "rtdmd", "streaming_order"],
    "schedule.py": ["schedule", "signals", "dmd2_levels", "shared_numerics", "golden", "sd"],
}
EXCHANGED = {"mean": "sum", "sum": "mean", "square": "abs", "abs": "square"}
LEVELS = {"t": "s", "s": "t"}
TEXT = (ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp)


@dataclass(frozen=True)
class Mutation:
    """One changed node. name: file, function, and the changed expression; the key of its row. index: the node's place
    in ast.walk of the file's tree, and which of the node's mutations it is."""

    name: str
    kind: str
    file: str
    line: int
    index: tuple[int, int]


# --- finding mutations


def mutants(node: ast.AST, names: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """The mutations of one node: (kind, the node that takes its place). names: the variables of its function."""
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, right) if not isinstance(left, TEXT):
            yield "sign", ast.BinOp(left, ast.Sub() if isinstance(op, ast.Add) else ast.Add(), right)
        case ast.BinOp(ast.Constant(), ast.Mult(), right):
            yield "weight", right
        case ast.BinOp(left, ast.Mult() | ast.Div() | ast.Pow(), _) if not isinstance(left, TEXT):
            yield "weight", left
        case ast.UnaryOp(ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield "sign", operand
        case ast.Call(ast.Attribute(value, "sqrt"), []):
            yield "norm", value
        case ast.Call(ast.Attribute(value, "detach"), []):
            yield "stop-gradient", value
        case ast.Call(ast.Attribute(value, attr, ctx), arguments, keywords) if attr in EXCHANGED:
            if not isinstance(value, ast.Name) or value.id != "torch":
                changed = ast.Attribute(value, EXCHANGED[attr], ctx)
                yield "norm", ast.Call(changed, arguments, keywords)
        case ast.With(items, body) if any(is_call(item.context_expr, "no_grad", "frozen") for item in items):
            kept = [item for item in items if not is_call(item.context_expr, "no_grad", "frozen")]
            block = ast.If(ast.Constant(True), body, [])
            yield "stop-gradient", ast.With(kept, body) if kept else block
        case ast.FunctionDef() if any(is_call(decorator, "no_grad") for decorator in node.decorator_list):
            changed = copy.copy(node)
            changed.decorator_list = [d for d in node.decorator_list if not is_call(d, "no_grad")]
            yield "stop-gradient", changed
    if isinstance(node, ast.Call) and not is_call(node, "ones_like", "zeros_like", "full_like", "empty_like"):
        for i, argument in enumerate(node.args):
            if isinstance(argument, ast.Name) and LEVELS.get(argument.id) in names:
                changed = copy.copy(node)
                other = ast.Name(LEVELS[argument.id], ast.Load())
                changed.args = [*node.args[:i], other, *node.args[i + 1 :]]
                yield "level", changed


def is_call(node: ast.AST, *names: str) -> bool:
    """Whether this is a call of a function or method with one of these names."""
    if not isinstance(node, ast.Call):
        return False
    return getattr(node.func, "attr", getattr(node.func, "id", None)) in names


def left_alone(tree: ast.AST) -> set[ast.AST]:
    """Nodes whose parts are not mutated: messages, checks, types, indices and the defaults of fields."""
    skipped: list[ast.AST] = []
    for node in ast.walk(tree):
        match node:
            case ast.Raise() | ast.Assert() | ast.JoinedStr():
                skipped.append(node)
            case ast.Subscript():
                skipped.append(node.slice)
            case ast.AnnAssign():
                skipped.append(node.annotation)
            case ast.ClassDef():
                skipped += [item for item in node.body if isinstance(item, (ast.Assign, ast.AnnAssign))]
            case ast.FunctionDef(name=name) if name.startswith(("check", "_")) and name != "__call__":
                skipped.append(node)  # validators
            case ast.FunctionDef():
                skipped += [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation]
                skipped += [node.returns] if node.returns else []
            case ast.Call(ast.Name("range" | "enumerate")):
                skipped.append(node)
    return {part for node in skipped for part in ast.walk(node)}


def find(file: str) -> list[Mutation]:
    """All mutations of a file of fastgen/."""
    tree = ast.parse((ROOT / "fastgen" / file).read_text())
    skipped, owner = left_alone(tree), functions(tree)
    found: list[Mutation] = []
    count: dict[str, int] = {}
    for index, node in enumerate(ast.walk(tree)):
        if node in skipped:
            continue
        function, names = owner.get(node, ("", set()))
        for which, (kind, changed) in enumerate(mutants(node, names)):
            before, after = (first_line(part) for part in (node, changed))
            name = f"{file} {function}: {before} -> {after}"
            count[name] = count.get(name, 0) + 1
            name = name if count[name] == 1 else f"{name} (#{count[name]})"
            found.append(Mutation(name, kind, file, getattr(node, "lineno", 0), (index, which)))
    return found


def functions(tree: ast.AST) -> dict[ast.AST, tuple[str, set[str]]]:
    """node -> the qualified name of the innermost function that it is in, and that function's variables."""
    owner: dict[ast.AST, tuple[str, set[str]]] = {}

    def visit(node: ast.AST, path: str, names: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            owner[child] = (path, names)
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = {n.arg for n in ast.walk(child) if isinstance(n, ast.arg)}
                inner |= {n.id for n in ast.walk(child) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                is_class = isinstance(child, ast.ClassDef)
                visit(child, f"{path}.{child.name}".lstrip("."), set() if is_class else inner)
            else:
                visit(child, path, names)

    visit(tree, "", set())
    return owner


def first_line(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).replace("\n", " ")
    return text if len(text) <= 100 else text[:97] + "..."


# --- running one


class Mutated(SourceFileLoader):
    """Loads a module from a changed syntax tree."""

    def __init__(self, name: str, path: str, tree: ast.Module):
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.tree, self.path, "exec")


class Finder:
    """Finds one module, and no other."""

    def __init__(self, name: str, path: Path, tree: ast.Module):
        self.name, self.path, self.tree = name, str(path), tree

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        loader = Mutated(name, self.path, self.tree)
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


class Exchange(ast.NodeTransformer):
    def __init__(self, node: ast.AST, other: ast.AST):
        self.node, self.other = node, other

    def visit(self, node: ast.AST) -> ast.AST:
        return self.other if node is self.node else self.generic_visit(node)


def mutated_tree(mutation: Mutation) -> ast.Module:
    tree = ast.parse((ROOT / "fastgen" / mutation.file).read_text())
    index, which = mutation.index
    node = next(node for i, node in enumerate(ast.walk(tree)) if i == index)
    names = functions(tree).get(node, ("", set()))[1]
    _, changed = list(mutants(node, names))[which]
    return ast.fix_missing_locations(Exchange(node, changed).visit(tree))


def run_tests(file: str, mutation: Mutation | None) -> int:
    """In a forked child: the exit code of pytest over the tests of a file. 0 means that they pass."""
    import pytest

    if mutation is not None:
        name = "fastgen." + mutation.file.removesuffix(".py").replace("/", ".")
        finder = Finder(name, ROOT / "fastgen" / mutation.file, mutated_tree(mutation))
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    files = [str(ROOT / f"tests/test_{name}.py") for name in TESTS[file]]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu and not hub"]
    return int(pytest.main([*options, "--rootdir", str(ROOT), *files]))


def fork(file: str, mutation: Mutation | None, log: Path) -> int:
    """Starts run_tests in a child with its output in a file. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.setsid()  # so that its own children end with it
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(ROOT)
        code = run_tests(file, mutation)
    finally:
        os._exit(code)


def wait(child: int, timeout: float) -> int | None:
    """The child's exit code, or None if it had to be stopped."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def verdict(log: Path) -> str:
    """The test that failed, from pytest's report."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0].split(" ", 1)[1].split("/")[-1] if lines else "no test: it does not run"


def preload() -> None:
    """What every child needs and no mutation changes."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "WanPipeline"):
        getattr(diffusers, name)
    for name in ("CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel"):
        getattr(transformers, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", default=[], help="parts of file names; by default all of TESTS")
    parser.add_argument("--list", action="store_true", help="only say what would be changed")
    parser.add_argument("--again", action="store_true", help="run survivors again")
    parser.add_argument("--rows", type=Path, default=TABLE, help="the table to write")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until a mutation counts as hanging")
    parser.add_argument("--share", type=float, default=1.0, help="which part of the mutations is tried, in (0, 1]")
    arguments = parser.parse_args()
    chosen = [file for file in TESTS if not arguments.files or any(part in file for part in arguments.files)]
    if arguments.list:
        for mutation in (m for file in chosen for m in find(file) if drawn(m, arguments.share)):
            print(f"{mutation.kind:14} {mutation.line:4} {mutation.name}")
        return
    preload()
    for file in chosen:
        run_file(file, arguments)
    sort_rows(arguments.rows)
    report(read_rows(arguments.rows))


def run_file(file: str, arguments: argparse.Namespace) -> None:
    there, again = read_rows(arguments.rows), arguments.again
    waiting = [
        m
        for m in find(file)
        if (again and not there[m.name]["caught"] if m.name in there else drawn(m, arguments.share))
    ]
    if not waiting:
        return
    log = Path(tempfile.gettempdir()) / f"mutation_{os.getpid()}.log"
    if wait(fork(file, None, log), 10 * arguments.timeout) != 0:
        raise SystemExit(f"the tests of {file} do not pass unchanged: see {log}")
    for mutation in waiting:
        code = wait(fork(file, mutation, log), arguments.timeout)
        by = "" if code == 0 else "hangs" if code is None else verdict(log)
        row = {"name": mutation.name, "kind": mutation.kind, "caught": code != 0, "by": by}
        append_row(arguments.rows, row | commit())
        print(f"{'caught  ' if code != 0 else 'SURVIVED'} {mutation.name}  {by}", flush=True)


def drawn(mutation: Mutation, share: float) -> bool:
    """Whether it is in the part that is tried."""
    return int(hashlib.sha256(mutation.name.encode()).hexdigest()[:8], 16) < share * 2**32


def commit() -> dict[str, str]:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"commit": done.stdout.strip()}


def report(rows: dict[str, dict[str, Any]]) -> None:
    caught: Sequence[dict[str, Any]] = [row for row in rows.values() if row["caught"]]
    print(f"{len(caught)} of {len(rows)} mutations are caught")
    for row in rows.values():
        if not row["caught"]:
            print(f"survived: {row['kind']:14} {row['name']}")


if __name__ == "__main__":
    main()
