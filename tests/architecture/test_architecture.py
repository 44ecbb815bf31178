"""The arrows of docs/architecture.md: which package imports which, and what starts without torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safegen

ROOT = Path(safegen.__file__).parent
FRAMEWORKS = {"torch", "diffusers", "transformers", "safetensors", "peft", "accelerate"}

# What each part may import of safegen, one way; whoever is not listed here may not exist.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "files": set(),
    "resources": {"errors"},
    "text": {"errors"},
    "spans": {"text"},
    "prompts": {"errors"},
    "policy": {"errors", "resources", "spans", "text"},
    "bundle": {"errors", "resources"},
    "audit": {"errors", "files", "_version"},
    "transport": {"errors", "text"},
    "membrane": {"errors", "files", "transport"},
    "backend": {"errors", "transport", "membrane"},
    "decision": {"errors", "backend", "transport", "membrane", "policy"},
    "gatekeeper": {"backend", "decision", "transport", "policy"},
    "explain": {"decision", "gatekeeper", "transport"},
    "record": {"errors", "audit", "backend", "decision", "policy", "gatekeeper"},
    "run": {"errors", "backend", "gatekeeper", "record"},
    "composition": {"errors", "backend", "policy", "gatekeeper"},
    "guard": {
        *("errors", "audit", "backend", "bundle", "membrane", "policy", "gatekeeper", "composition", "record", "run")
    },
    "training": {"errors", "files", "resources", "backend", "membrane", "policy"},
}
ABOVE = {"evaluation", "mini", "cli", "serving", "integrations", "__main__", "__init__"}  # nobody below imports them
WITHOUT_TORCH = {"errors", "files", "_version", "resources", "spans", "text", "prompts", "policy", "bundle", "audit"}
# `load_pipeline("mini")` loads the embedded model where a host would be loaded; only when asked for.
EXCEPTIONS = {("backend/loading.py", "mini")}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yields the dotted names that a module imports, wherever, save for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


FILES = {path.relative_to(ROOT).as_posix(): set(imports(ast.parse(path.read_bytes()))) for path in ROOT.rglob("*.py")}


@pytest.mark.parametrize("file", sorted(FILES))
def test_imports_point_one_way(file: str) -> None:
    part = file.split("/")[0].removesuffix(".py")
    assert part in ALLOWED or part in ABOVE, f"{part} has no place in the architecture"
    found = {name.split(".")[1] for name in FILES[file] if name.startswith("safegen.")} - {part}
    found -= {name for name in found if (file, name) in EXCEPTIONS}
    if part in ALLOWED:
        assert found <= ALLOWED[part], f"{file} imports {sorted(found - ALLOWED[part])}"
    if part in WITHOUT_TORCH:
        assert not {name.split(".")[0] for name in FILES[file]} & FRAMEWORKS


def test_the_arrows_have_no_circle() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = sorted(part for part, needs in ALLOWED.items() if part not in order and needs <= set(order))
        assert ready, f"a circle among {sorted(set(ALLOWED) - set(order))}"
        order += ready


def test_the_check_sees_imports_wherever_they_stand() -> None:
    source = "import a\ndef f():\n    from b.c import d\nif TYPE_CHECKING:\n    import e\nclass X:\n    import f.g\n"
    assert set(imports(ast.parse(source))) == {"a", "b.c.d", "f.g"}
    assert {"safegen.errors.AuditWriteError", "safegen.audit.AuditLog"} <= FILES["record.py"]


def test_only_the_renderer_knows_rich() -> None:
    drawing = {file for file, names in FILES.items() if any(name.split(".")[0] == "rich" for name in names)}
    assert {file for file in drawing if file.startswith("cli/")} <= {"cli/render.py"}
    assert not {file.split("/")[0] for file in drawing} - {"cli", "mini"}


@pytest.mark.parametrize("module", ["safegen", *(f"safegen.{part}" for part in sorted(WITHOUT_TORCH))])
def test_it_starts_without_torch(module: str) -> None:
    if module == "safegen":  # once for all of them
        names = ["safegen", *(f"safegen.{part}" for part in sorted(WITHOUT_TORCH))]
        names += [f"safegen.{f[:-3].replace('/', '.')}" for f in FILES if f.split("/")[0] in WITHOUT_TORCH and "/" in f]
        code = (
            f"import sys, importlib\nfor n in {names!r}:\n    importlib.import_module(n.removesuffix('.__init__'))\n"
            f"print(sorted(set(sys.modules) & {FRAMEWORKS | {'numpy'}!r}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
        assert done.stdout.strip() == "[]"
    assert importlib.import_module(module)


def test_public_names_are_sorted_and_importable() -> None:
    assert safegen.__all__ == sorted(safegen.__all__)
    assert dir(safegen) == safegen.__all__
    for name in safegen.__all__:
        assert getattr(safegen, name) is not None
    homes = safegen._HOMES
    assert set(homes) == set(safegen.__all__) - {"__version__"}
    assert list(homes) == sorted(homes)
    for name, home in homes.items():
        assert getattr(safegen, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = safegen.nothing


def test_every_error_is_in_the_tree_that_its_docstring_draws() -> None:
    from safegen import errors

    classes = {
        name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    drawn: list[tuple[int, str, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.strip(" │├└─").split(" ")[0]
        if name in classes:
            drawn.append((line.index(name), name, line.rsplit("exit ", 1)[1].strip() if "exit " in line else ""))
    assert {name for _, name, _ in drawn} == set(classes)
    for k, (depth, name, code) in enumerate(drawn[1:], 1):
        parent = next(other for d, other, _ in reversed(drawn[:k]) if d < depth)
        assert classes[name].__bases__ == (classes[parent],), name
        if code:
            assert getattr(classes[name], "exit_code", None) == int(code), name
