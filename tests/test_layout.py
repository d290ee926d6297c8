"""The rules that keep the house in order: names, one-way imports, a pure model, no pickle. All read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "platform" / "springtide"
TOP_LEVEL = {
    ".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "benchmarks", "cluster.yaml", "constraints.txt", "jobs",
    "platform", "pyproject.toml", "serve_configs", "tests",
}  # fmt: skip

# A part may import from its own layer and from lower ones, and parts that share a layer only where PEERS says so.
# Modules of the package's root that are no part of the order themselves stand on the layer of what they serve.
LAYERS = {
    "errors": 0, "schemas": 0, "files": 0, "config": 0, "config_data": 0, "presets": 0, "ranks": 0,
    "data": 1, "text": 1, "cluster": 1,
    "model": 2, "bundle": 2, "parity": 2, "local_cluster": 2,
    "training": 3, "tuning": 3, "evaluation": 3,
    "serving": 4,
    "jobs": 5, "quickstart": 5,
    "cli": 6, "__main__": 7,
}  # fmt: skip
PEERS = {("data", "cluster"), ("text", "cluster"), ("text", "data"), ("bundle", "model"), ("bundle", "parity"),
         ("parity", "model"), ("tuning", "training"), ("training", "evaluation"), ("tuning", "evaluation"),
         ("evaluation", "training")}  # fmt: skip
HTTP_AND_FILES = {"aiohttp", "fastapi", "httpx", "io", "os", "pathlib", "requests", "shutil", "starlette", "tempfile",
                  "urllib", "uvicorn"}  # fmt: skip
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PURE = [
    PACKAGE / "ranks.py",
    *PACKAGE.glob("model/**/*.py"),
    *(
        PACKAGE / "evaluation" / f"{name}.py"
        for name in ("ab", "metrics", "ranking", "prequential", "slices", "ties", "leakage")
    ),
]


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, top_only: bool = False) -> set[str]:
    """Absolute names of what a file imports, but for types only; `from a import b` gives a and a.b."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                prefix = package[: len(package) - node.level + 1]
                base = ".".join([*prefix, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(path))
    return found


def graph(top_only: bool = False) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    names = {module_name(path): path for path in python_files()}
    return {name: {i for i in imports_of(path, top_only) if i in names and i != name} for name, path in names.items()}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def is_in_git() -> bool:
    return subprocess.run(["git", "rev-parse"], cwd=REPO, check=False, capture_output=True).returncode == 0


# ---------------------------------------------------------------- names
def test_platform_is_no_package() -> None:
    """With platform/__init__.py, `import platform` finds this folder, and torch, ray and pandas break on workers."""
    assert not (REPO / "platform" / "__init__.py").exists()
    assert [p.name for p in (REPO / "platform").glob("*.py")] == []


def test_import_platform_is_the_standard_library() -> None:
    code = "import platform; print(platform.__file__); platform.system()"
    for path in (REPO, REPO / "platform"):
        done = subprocess.run([sys.executable, "-c", code], cwd=path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not done.stdout.startswith(str(REPO / "platform"))


def test_top_level_names_are_the_agreed_ones() -> None:
    if not is_in_git():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} <= TOP_LEVEL


def test_no_python_name_hides_the_standard_library() -> None:
    """The working directory of a job comes first on the workers' import path."""
    roots = [REPO, REPO / "platform"]
    for root in roots:
        modules = {p.stem for p in root.glob("*.py")} | {p.parent.name for p in root.glob("*/__init__.py")}
        assert modules & sys.stdlib_module_names == set(), root
    # Scripts put their own folder first instead.
    for folder in ("jobs", "benchmarks", "tests"):
        modules = {p.stem for p in (REPO / folder).glob("*.py")}
        assert modules & sys.stdlib_module_names == set(), folder


def test_modules_can_be_read_in_one_sitting() -> None:
    long = {str(p.relative_to(REPO)): n for p in python_files() if (n := len(p.read_text().splitlines())) >= 400}
    assert long == {}


def test_every_module_says_what_it_is_for() -> None:
    files = [p for folder in ("platform", "jobs", "benchmarks", "tests") for p in (REPO / folder).rglob("*.py")]
    assert [str(p.relative_to(REPO)) for p in files if not ast.get_docstring(tree_of(p))] == []


# ---------------------------------------------------------------- imports
def test_every_part_has_its_place() -> None:
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert parts - {"__init__"} <= set(LAYERS)


def test_imports_run_one_way() -> None:
    wrong = []
    for module, imported in graph().items():
        here = part_of(module)
        if not here:
            continue
        for other in sorted(imported):
            there = part_of(other)
            if not there or there == here or LAYERS[there] < LAYERS[here]:
                continue
            if LAYERS[there] == LAYERS[here] and ((here, there) in PEERS or LAYERS[here] == 0):
                continue
            wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    edges = graph()
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for other in sorted(edges[module]):
            walk(other, (*trail, module))
        done.add(module)

    for module in sorted(edges):
        walk(module, ())


def test_model_and_metrics_know_no_ray_files_or_http() -> None:
    for path in (p for p in PURE if p.exists()):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots & {"ray", *HTTP_AND_FILES} == set(), path.name
        opened = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "open"]
        assert opened == [], path.name


def test_ray_stays_out_of_what_notebooks_import() -> None:
    """Nothing that a module without Ray pulls in at import time may pull in Ray, or the pure parts are not pure."""
    edges = graph(top_only=True)
    with_ray = {module_name(p) for p in python_files() if any(i.split(".")[0] == "ray" for i in imports_of(p, True))}
    for path in (p for p in [*PURE, PACKAGE / "bundle.py", PACKAGE / "config.py"] if p.exists()):
        seen, queue = set(), [module_name(path)]
        while queue:
            module = queue.pop()
            if module not in seen:
                seen.add(module)
                queue += edges[module]
        assert seen & with_ray == set(), path.name


def test_nothing_is_unpickled() -> None:
    wrong = []
    for path in python_files():
        roots = {name.split(".")[0] for name in imports_of(path)}
        wrong += [f"{path.name}: {name}" for name in roots & PICKLES]
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("torch.load", "np.load", "numpy.load", "torch.jit.load", "pd.read_pickle"):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if called.endswith("np.load") and keywords.get("allow_pickle", "False") == "False":
                    continue
                wrong.append(f"{path.name}:{node.lineno} {called}")
    assert wrong == []


def test_no_import_does_work() -> None:
    """Module level holds definitions only: no call as a statement, except logging set-up and test markers."""
    wrong = []
    for path in python_files():
        for node in tree_of(path).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                wrong.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:60]}")
            elif isinstance(node, (ast.For, ast.While, ast.With)):
                wrong.append(f"{path.name}:{node.lineno} {type(node).__name__}")
    assert wrong == []
