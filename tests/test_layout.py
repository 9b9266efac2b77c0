"""Who may import whom, read from the source of every module, imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    "imgbatch": 3,
    "imgbatch.__version__": 0,
    "imgbatch.cli": 3,
    "imgbatch.commands": 3,
    "imgbatch.demo": 3,
    "imgbatch.demo_steps": 3,
    "imgbatch.satellite_demo": 3,
    "jobs": 3,
    "imgbatch.runtime": 2,
    "imgbatch.report": 2,
    "imgbatch.core": 1,
    "imgbatch.schema": 0,
    "imgbatch.errors": 0,
    "imgbatch.config": 0,
}
"""Package or module to its layer; a module may import from its own layer and from those below."""

TORCH_FREE = [
    "imgbatch.core.manifest*",
    "imgbatch.core.storage",
    "imgbatch.core.images",
    "imgbatch.core.decoder",
    "imgbatch.core.fetch",
    "imgbatch.core.units",
    "imgbatch.core.results",
    "imgbatch.core.plan",
    "imgbatch.core.finalize",
    "imgbatch.core.verify",
]
"""What decode processes and the driver load: importing it may not import torch, however indirectly."""

MAY_IMPORT_RAY = ("jobs.bench.peers.ray_data", "jobs.bench.peers.ray_data_tuned", "jobs.bench.scaling")
"""What the job is compared with uses Ray without us; what measures it over several nodes builds them."""


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    on_load: bool
    """Whether importing the importing module executes it: not inside a function, not for type checkers only."""


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name to file of every module of ``imgbatch`` and ``jobs`` below ``root``."""
    modules = {}
    for package in ("imgbatch", "jobs"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(name: str, modules: dict[str, Path]) -> list[Import]:
    """What module ``name`` imports; names taken from a package count as its submodule where there is one."""
    path = modules[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node, on_load in _import_nodes(ast.parse(path.read_text()), on_load=True):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            targets = [sub if sub in modules or sub in LAYERS else base for sub in submodules]
        found += [Import(target, node.lineno, on_load) for target in dict.fromkeys(targets)]
    return found


def _import_nodes(node: ast.AST, *, on_load: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, on_load
        else:
            yield from _import_nodes(child, on_load=on_load and not _is_deferred(child))


def _is_deferred(node: ast.AST) -> bool:
    """Whether loading the module leaves the inside of ``node`` out."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def layer_of(module: str) -> int | None:
    """The layer of the longest entry of :data:`LAYERS` that ``module`` is or lies in; none for other packages."""
    if module.split(".")[0] not in ("imgbatch", "jobs"):
        return None
    return next((LAYERS[prefix] for prefix in reversed(with_packages(module)) if prefix in LAYERS), None)


def with_packages(module: str) -> list[str]:
    """What importing ``module`` executes by its name alone: the packages it lies in, outermost first, and itself."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def layout_violations(root: Path) -> list[str]:
    """One line per import that breaks the rules, in the code below ``root``."""
    modules = find_modules(root)
    imports = {name: imports_of(name, modules) for name in modules}
    violations = []
    for name, found in imports.items():
        own_layer = layer_of(name)
        may_import_ray = name in MAY_IMPORT_RAY or (
            name.startswith("imgbatch.runtime") and name != "imgbatch.runtime.local"
        )
        for item in found:
            layer = layer_of(item.module)
            if own_layer is not None and layer is not None and layer > own_layer:
                violations.append(f"{name}:{item.line}: {item.module} is above it")
            if item.module.split(".")[0] == "ray" and not may_import_ray:
                violations.append(f"{name}:{item.line}: ray belongs to imgbatch.runtime, outside its local loop")
    for name in modules:
        if any(fnmatch(name, pattern) for pattern in TORCH_FREE):
            chain = import_chain(name, {"torch", "torchvision"}, imports)
            if chain:
                violations.append(f"{name}: loads torch: {' -> '.join(chain)}")
    return violations


def import_chain(start: str, packages: set[str], imports: dict[str, list[Import]]) -> list[str] | None:
    """The modules from ``start`` to one of ``packages`` along imports executed on loading; none if there is no way."""
    waiting, seen = [[start], *([start, package] for package in with_packages(start)[:-1])], {start}
    while waiting:
        chain = waiting.pop(0)
        for module in (item.module for item in imports.get(chain[-1], []) if item.on_load):
            if module.split(".")[0] in packages:
                return [*chain, module]
            new = [loaded for loaded in with_packages(module) if loaded not in seen]
            seen.update(new)
            waiting += [[*chain, loaded] for loaded in new]
    return None


def test_imports_go_one_way():
    assert layout_violations(ROOT) == []


def test_every_rule_about_torch_names_a_module_that_exists():
    modules = find_modules(ROOT)
    unmatched = [pattern for pattern in TORCH_FREE if not any(fnmatch(name, pattern) for name in modules)]
    assert unmatched == []


def test_every_module_has_a_layer():
    top_level = {name for name in find_modules(ROOT) if name.startswith("imgbatch.") and name.count(".") == 1}
    assert top_level <= set(LAYERS)


@pytest.fixture
def planted(tmp_path):
    """Writes modules below ``tmp_path`` and returns the violations found there."""

    def plant(sources: dict[str, str]) -> list[str]:
        for name, source in sources.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return layout_violations(tmp_path)

    return plant


def test_a_sound_layout_passes(planted):
    assert (
        planted(
            {
                "imgbatch/errors.py": "import enum\n",
                "imgbatch/core/plan.py": "from imgbatch.errors import X\ndef f():\n    import torch\n",
                "imgbatch/core/model.py": "import torch\n",
                "imgbatch/runtime/ray_data.py": "import ray\nfrom imgbatch.core import plan\n",
                "imgbatch/cli.py": "from imgbatch.runtime import ray_data\n",
                "jobs/classify.py": "from imgbatch.cli import main\n",
            }
        )
        == []
    )


@pytest.mark.parametrize(
    "source",
    [
        "from imgbatch.runtime import local\n",
        "import imgbatch.runtime.local\n",
        "from ..runtime import local\n",
        "def late():\n    from imgbatch.runtime.local import run\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from imgbatch.runtime import local\n",
        "from imgbatch import classify\n",
    ],
)
def test_a_planted_import_of_a_layer_above_is_found(planted, source):
    violations = planted({"imgbatch/core/plan.py": source, "imgbatch/runtime/local.py": "", "imgbatch/__init__.py": ""})
    assert len(violations) == 1
    assert violations[0].startswith("imgbatch.core.plan:")
    assert violations[0].endswith("is above it")


@pytest.mark.parametrize(
    "module", ["imgbatch/core/plan.py", "imgbatch/runtime/local.py", "imgbatch/cli.py", "jobs/run.py"]
)
def test_ray_outside_the_runtime_is_found(planted, module):
    violations = planted({module: "def late():\n    import ray.data\n"})
    assert len(violations) == 1
    assert "ray belongs to imgbatch.runtime" in violations[0]


def test_torch_behind_another_module_is_found(planted):
    assert planted(
        {
            "imgbatch/core/units.py": "from imgbatch.core.helper import x\n",
            "imgbatch/core/helper.py": "class Late:\n    import torch.nn\n",
        }
    ) == ["imgbatch.core.units: loads torch: imgbatch.core.units -> imgbatch.core.helper -> torch.nn"]


def test_torch_behind_a_package_is_found(planted):
    assert planted(
        {
            "imgbatch/core/__init__.py": "from imgbatch.core import model\n",
            "imgbatch/core/model.py": "import torch\n",
            "imgbatch/core/units.py": "from imgbatch.core.helper import x\n",
            "imgbatch/core/helper.py": "",
        }
    ) == ["imgbatch.core.units: loads torch: imgbatch.core.units -> imgbatch.core -> imgbatch.core.model -> torch"]
