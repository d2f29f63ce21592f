"""Imports point one way, and `import opensora` needs none of the optional packages.

The rules are read from the source (ast), then from a real import of every module with those packages out of reach.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PEERS = [{"models", "data", "diffusion"}, {"parallel"}, {"inference"}, {"training"}, {"scripts"}]

# A layer may import itself and what is below it; the names of one set in PEERS don't know each other. The modules that
# lie directly in opensora/ (config, registry, common, ...) are the leaves.
BELOW = {"leaf": {"leaf"}}
for _names in PEERS:
    _lower = set(BELOW)
    BELOW.update({name: _lower | {name} for name in _names})

OPTIONAL = {
    "bitsandbytes",
    "colossalai",
    "diffusers",
    "flash_attn",
    "gradio",
    "liger_kernel",
    "matplotlib",
    "tensornvme",
    "transformers",
    "triton",
    "wandb",
}


def layer_of(parts: tuple[str, ...], root: Path) -> str | None:
    """The layer of a module by its dotted parts; None for `opensora` itself and for what is not ours."""
    if parts[0] == "scripts":
        return "scripts"
    if parts[0] != "opensora" or len(parts) == 1:
        return None
    return "leaf" if (root / "opensora" / f"{parts[1]}.py").exists() else parts[1]


def module_parts(path: Path, root: Path) -> tuple[str, ...]:
    parts = path.relative_to(root).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(node: ast.AST, path: Path, root: Path) -> list[str]:
    """The absolute names that an import statement may load: `from a import b` gives `a` and `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = path.relative_to(root).parent.parts
        package = package[: len(package) - node.level + 1]
        base = ".".join((*package, *([node.module] if node.module else [])))
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: all but the bodies of functions and of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        if is_type_checking(child):
            for other in child.orelse:
                yield from (other, *import_time_nodes(other))
        else:
            yield from import_time_nodes(child)


def may_import_colossalai(parts: tuple[str, ...]) -> bool:
    return parts[:2] == ("opensora", "parallel") or (
        parts[:2] == ("opensora", "training") and len(parts) > 2 and parts[2].startswith("checkpoint")
    )


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted([*root.glob("opensora/**/*.py"), *root.glob("scripts/**/*.py")]):
        parts, tree = module_parts(path, root), ast.parse(path.read_text(encoding="utf-8"))
        layer, where = layer_of(parts, root), path.relative_to(root)
        if layer is not None and layer not in BELOW:
            found.append(f"{where}: '{layer}' is in no layer of tests/test_layers.py")
            continue
        at_import = set(map(id, import_time_nodes(tree)))
        for node in ast.walk(tree):
            for name in imported(node, path, root):
                target = layer_of(tuple(name.split(".")), root) if name else None
                line, package = f"{where}:{getattr(node, 'lineno', 0)}", name.split(".")[0]
                if layer and target in BELOW and target not in BELOW[layer]:
                    found.append(f"{line}: {layer} imports {name}, which is not below it")
                if package == "colossalai" and not may_import_colossalai(parts):
                    found.append(f"{line}: {name} belongs in opensora/parallel or opensora/training/checkpoint*.py")
                if package in OPTIONAL and parts[0] == "opensora" and id(node) in at_import:
                    found.append(f"{line}: {name} is optional: import it in the function that needs it")
    return sorted(set(found))


def test_imports_point_one_way():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("opensora/data/bucket.py", "from opensora.models import mmdit", "data imports opensora.models"),
        ("opensora/data/bucket.py", "from ..models.mmdit import MMDiT", "data imports opensora.models.mmdit"),
        ("opensora/diffusion/flow.py", "def f():\n    import opensora.models", "diffusion imports opensora.models"),
        ("opensora/common.py", "from opensora import data", "leaf imports opensora.data"),
        ("opensora/models/a.py", "import opensora.parallel.engine", "models imports opensora.parallel.engine"),
        ("opensora/inference/a.py", "from opensora.training import ema", "inference imports opensora.training"),
        ("opensora/parallel/a.py", "from opensora.training.step import f", "parallel imports opensora.training.step"),
        ("opensora/training/step.py", "def f():\n    import colossalai", "belongs in opensora/parallel"),
        ("scripts/cnv/meta.py", "def f():\n    from colossalai import x", "belongs in opensora/parallel"),
        ("opensora/parallel/a.py", "import colossalai.booster", "is optional"),
        ("opensora/models/a.py", "try:\n    import triton\nexcept ImportError:\n    triton = None", "is optional"),
        ("opensora/models/a.py", "class A:\n    from transformers import T5EncoderModel", "is optional"),
        ("opensora/utils/a.py", "", "is in no layer"),
    ],
)
def test_wrong_imports_are_found(tmp_path, module, source, complaint):
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert any(complaint in line for line in violations(tmp_path))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("opensora/models/a.py", "from opensora.registry import MODELS\nfrom opensora.models import attention"),
        ("opensora/parallel/a.py", "def f():\n    from colossalai.booster import Booster"),
        ("opensora/training/checkpoint.py", "def f():\n    import colossalai"),
        ("opensora/models/a.py", "if TYPE_CHECKING:\n    from transformers import T5EncoderModel"),
        ("opensora/inference/a.py", "import opensora.parallel\nimport opensora.models.mmdit\nimport opensora.config"),
        ("scripts/demo/score.py", "import matplotlib\nfrom opensora.training import trainer"),
    ],
)
def test_right_imports_are_not(tmp_path, module, source):
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


def test_every_module_imports_without_the_optional_packages():
    program = f"""
import importlib, pkgutil, sys

class OutOfReach:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(OPTIONAL)!r}:
            raise ModuleNotFoundError(f"{{name}} is out of reach", name=name)

sys.meta_path.insert(0, OutOfReach())
import opensora
for module in pkgutil.walk_packages(opensora.__path__, "opensora."):
    importlib.import_module(module.name)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
