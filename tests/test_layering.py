"""Which part of ktcompile may import which: its own layer and those above it, as in ARCHITECTURE.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from helpers.processes import run_python

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("_native",),
    ("collector", "env", "log", "openmp", "owned_folder"),
    ("machine",),
    ("quant",),
    ("config",),
    ("ops",),
    ("graph",),
    ("plan",),
    ("passes", "runtime"),
    ("backend",),
    ("models",),
    ("kv",),
    ("cache",),
    ("scheduler",),
    ("lora",),
    ("engine",),
    ("server",),
    ("bench",),
    ("cli", "integrations"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Pure policy over plain numbers, testable without torch.
WITHOUT_TORCH = (
    "ktcompile.plan",
    "ktcompile.kv.block_pool",
    "ktcompile.kv.layout",
    "ktcompile.cache.block",
    "ktcompile.cache.leaf_first",
    "ktcompile.cache.contest",
    "ktcompile.cache.lru",
    "ktcompile.cache.reuse",
    "ktcompile.cache.value",
    "ktcompile.cache.polic",
    "ktcompile.cache.key",
    "ktcompile.scheduler",
)


def test_no_module_imports_a_lower_layer() -> None:
    assert violations(modules()) == []


def test_every_part_has_a_layer() -> None:
    parts = {name.split(".")[1] for name, _ in modules()} - {"__init__"}
    assert parts <= set(RANK), f"not in LAYERS: {parts - set(RANK)}"


def test_the_command_line_needs_no_server() -> None:
    """What the extra `serve` brings is imported by the commands that serve, when they run."""
    extra = {"fastapi", "llguidance", "orjson", "prometheus_client", "pydantic", "starlette", "uvicorn"}
    program = f"import ktcompile.cli, ktcompile.engine.llm, sys; print(sorted({extra} & set(sys.modules)))"
    assert run_python(program).strip() == "[]"


def test_a_violation_is_found() -> None:
    wrong = {
        "ktcompile.ops.bad": "import ktcompile.backend",
        "ktcompile.passes.bad": "from ktcompile import runtime",
        "ktcompile.runtime.bad": "def f():\n    from ktcompile.passes import fuse_moe",
        "ktcompile.graph.bad": "from ..models import tiny_model",
        "ktcompile.plan.bad": "import torch.nn",
    }
    for name, source in wrong.items():
        assert violations([(name, source)]), name
    assert not violations([("ktcompile.backend.good", "from ktcompile.passes import fuse_moe\nimport torch")])


def violations(sources: list[tuple[str, str]]) -> list[str]:
    found = []
    for name, source in sources:
        for target in imports(name, source):
            if name.startswith(WITHOUT_TORCH) and target.split(".")[0] == "torch":
                found.append(f"{name} imports torch")
            own, other = part(name), part(target)
            if own is None or other is None or own == other:
                continue
            if RANK[other] >= RANK[own]:
                found.append(f"{name} imports {target}")
    return found


def modules() -> list[tuple[str, str]]:
    result = []
    for folder, prefix in (("ktcompile", ()), ("passes", ("ktcompile",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
            result.append((".".join(parts), path.read_text()))
    return result


def imports(name: str, source: str) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it; imports for types alone do not count."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield full
            yield from (f"{full}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "ktcompile" and len(names) > 1 and names[1] in RANK else None
