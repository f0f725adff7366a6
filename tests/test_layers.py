"""Data flows one way: a module imports from strictly lower layers and from its own package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    ["libs.files"],
    ["sde", "libs.rng", "libs.run", "libs.build"],
    ["libs.models"],
    ["libs.checkpoints"],
    ["libs.exits"],
    ["libs.data", "libs.codecs", "libs.losses"],
    ["libs.regimes"],
    ["libs.sampling"],
    ["libs.metrics"],
    ["libs.evaluation"],
    ["libs.trainer", "libs.report"],
    ["libs.analysis"],
    ["configs"],
    ["utils"],
    ["scripts"],
    ["benchmarks", "train", "eval", "train_ldm", "eval_ldm", "train_t2i_discrete", "eval_t2i_discrete"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def unit(module: str) -> str | None:
    """The entry of LAYERS that `module` belongs to; None for libraries."""
    parts = module.split(".")
    return next((name for n in (2, 1) if (name := ".".join(parts[:n])) in RANK), None)


def edges():
    for path in [
        *ROOT.glob("*.py"),
        *(p for d in ("libs", "scripts", "benchmarks") for p in ROOT.glob(f"{d}/**/*.py")),
    ]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "libs":
                names = [f"libs.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            yield from ((module, name) for name in names)


def wrong(module: str, imported: str) -> bool:
    mine, theirs = unit(module), unit(imported)
    return None not in (mine, theirs) and mine != theirs and RANK[theirs] >= RANK[mine]


def test_imports_point_down():
    """Catches a library module that imports a command, or two neighbours that know each other."""
    assert [edge for edge in edges() if wrong(*edge)] == []


@pytest.mark.parametrize(
    "edge", [("libs.run", "utils"), ("libs.exits", "libs.sampling.plans"), ("sde", "libs.models.uvit")]
)
def test_a_wrong_import_would_be_seen(edge):
    """Catches a test that cannot fail."""
    assert wrong(*edge)


def test_every_module_has_a_layer():
    """Catches a new module that the table above does not know."""
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in [*ROOT.glob("*.py"), *ROOT.glob("libs/*.py")]
    }
    unknown = {m for m in modules if unit(m.removesuffix(".__init__")) is None} - {"libs.__init__"}
    assert not unknown
