"""Data flows one way: a module imports from strictly lower layers and from its own package."""

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
    ["libs.metrics", "libs.report"],
    ["libs.evaluation"],
    ["libs.trainer"],
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


def modules() -> dict[str, ast.Module]:
    """Every module of the checkout but the tests: its dotted name -> its tree."""
    tops = {name.split(".")[0] for name in RANK}
    paths = [*ROOT.glob("*.py"), *(p for d in sorted(tops) for p in ROOT.glob(f"{d}/**/*.py"))]
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(p.read_text("utf-8"))
        for p in paths
    }


MODULES = modules()


def edges():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "libs":
                names = [f"libs.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module} imports relatively, which this test does not follow"
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
    """Catches a new module, or a new folder of them, that the table above does not know."""
    tracked = {p.parts[0] for p in (q.relative_to(ROOT) for q in ROOT.glob("*/**/*.py")) if p.parts[0][0] != "."}
    assert tracked - {"tests"} <= {name.split(".")[0] for name in RANK}
    assert {"train", "utils", "configs.base", "scripts.sample", "benchmarks.common", "libs.exits.execute"} <= set(
        MODULES
    )
    assert {module for module in MODULES if unit(module) is None} == {"libs"}
    assert not [name for name in RANK if not any(m == name or m.startswith(f"{name}.") for m in MODULES)], "stale rows"


# What every command has: its entry, what it does between two refusals, its arguments; a benchmark's one case.
COMMAND = {"main", "work", "FLAGS", "parse", "measure"}


def reused(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Functions, classes and constants that are defined at the top of two modules."""
    places = {}
    for module, tree in trees.items():
        if module.split(".")[0] in ("configs", "tests"):  # an experiment's parts; cases
            continue
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            for name in {getattr(target, "name", getattr(target, "id", None)) for target in targets} - {None}:
                places.setdefault(name, set()).add(module)
    return {name: where for name, where in places.items() if len(where) > 1 and name not in COMMAND}


def test_a_name_means_one_thing():
    """Catches two classes `State`, or a `count` of MACs where the reader knows the one of tensors."""
    assert reused(MODULES) == {}


def test_a_second_meaning_would_be_seen():
    """Catches a test that cannot fail."""
    text = "A: int = 1\nB = 2\nclass State: ...\ndef f(): ...\ndef main(): ...\nprint(A)"
    trees = {name: ast.parse(text) for name in ("libs.exits.a", "libs.models.b")}
    assert set(reused(trees)) == {"A", "B", "State", "f"}
