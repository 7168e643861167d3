"""The shape of the repository: who may import whom, and that every name means the folder in this repository."""

import ast
import importlib
import importlib.util
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# launch -> train -> {model, data}: what each package may import of the others. Nothing imports benchmarks or tests.
ALLOWED: dict[str, set[str]] = {
    "model": set(),
    "data": set(),
    "configs": set(),
    "train": {"model", "data", "configs"},
    "launch": {"train", "model", "data", "configs"},
    "benchmarks": {"launch", "train", "model", "data", "configs"},
}
PACKAGES = [name for name in ALLOWED if (ROOT / name).is_dir()]
OUR_NAMES = {*ALLOWED, "tests"}

# model is tensors in, tensors out; data is documents in, NumPy out.
FOREIGN_TO: dict[str, set[str]] = {
    "model": {"accelerate", "datasets", "deepspeed", "jsonargparse", "transformers", "yaml"},
    "data": {"accelerate", "deepspeed", "jsonargparse", "torch"},
}

# What only an extra or a separate install brings: the package must import without it.
OPTIONAL = {
    "autoregressive_diffusion_pytorch",
    "deepspeed",
    "flash_attn",
    "gradio",
    "tensorboard",
    "torch_fidelity",
    "torchvision",
    "transformers",
    "transfusion_pytorch",
    "triton",
    "webdataset",
}


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported below `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def _outside_functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Like `_imports`, for what runs when the module is imported: no function bodies, no `if TYPE_CHECKING`."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)
        pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_name_resolves_inside_this_repository(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"`import {package}` finds nothing: run from the root of the repository"
    assert spec.origin is not None, f"{package}/ has no __init__.py: any installed package of that name would win"
    assert Path(spec.origin).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str) -> None:
    missing = {path.parent for path in _files(package) if not (path.parent / "__init__.py").exists()}
    assert not missing, f"no __init__.py in {sorted(str(folder.relative_to(ROOT)) for folder in missing)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    forbidden = (OUR_NAMES - ALLOWED[package] - {package}) | FOREIGN_TO.get(package, set())
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in _files(package)
        for line, name in _imports(_parse(path))
        if name.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_literal(package: str) -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in _files(package)
        for line, name in _imports(_parse(path))
        if name.startswith(".")
    ]
    assert not relative, f"relative imports in {relative}: write the full name, `from data.document import ...`"


def test_deepspeed_is_imported_in_one_module() -> None:
    modules = {
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in _files(package)
        for _, name in _imports(_parse(path))
        if name.split(".")[0] == "deepspeed"
    }
    assert len(modules) <= 1, f"deepspeed is imported in {sorted(map(str, modules))}"
    assert all(module.parts[0] == "train" for module in modules)


@pytest.mark.parametrize("package", PACKAGES)
def test_optional_libraries_are_imported_where_they_are_used(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name} when the module is imported"
        for path in _files(package)
        for line, name in _outside_functions(_parse(path))
        if name.split(".")[0] in OPTIONAL and path.name not in ("deepspeed_engine.py", "kernel.py")  # on demand
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_are_listed_explicitly() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"]["find"]["include"])
    assert listed == {pattern for name in ALLOWED for pattern in (name, f"{name}.*")}


def test_tests_are_not_packages() -> None:
    # With an __init__.py, tests/model could become what `import model` finds.
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("ignored", ["data/document.py", "model/config.py", "train/engine.py"])
def test_gitignore_hides_no_package(ignored: str) -> None:
    names = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    assert ignored.split("/")[0] not in names


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_config_loads_and_says_how_to_run_it(path: Path) -> None:
    settings = importlib.import_module("train.settings")
    settings.parse(["--config", str(path)])
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert f"--config configs/{path.name}" in header, "the header comment must hold the command that runs the file"
