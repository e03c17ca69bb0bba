"""The order of the packages, checked from the source: a module imports only from its own package and from earlier ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"nasq": ROOT / "nasq", "nasq.search_spaces": ROOT / "search_spaces", "nasq.proxies": ROOT / "proxies"}

# Groups in order; inside a group imports may go either way, as long as no cycle arises.
ORDER = [
    {"version", "errors"},
    {"files", "space", "targets", "plugins"},
    {"cuda"},
    {"elastic", "quant"},
    {"supernet", "cost"},
    {"data", "ranking"},
    {"training"},
    {"deploy"},
    {"search"},
    {"run", "report"},
    {"cli", "testing"},
]
RANK = {part: index for index, group in enumerate(ORDER) for part in group}
MEMBERS = ("search_spaces", "proxies")


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PLACES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts])
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def lazy() -> dict[str, str]:
    """What `from nasq import X` loads, from the table in nasq/__init__.py."""
    tree = ast.parse(MODULES["nasq"].read_text())
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    tables = {name: ast.literal_eval(assigned[name]) for name in ("_PLACES", "_MODULES")}
    return {**tables["_PLACES"], **{name: f"nasq.{name}" for name in tables["_MODULES"]}, "__version__": "nasq.version"}


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Every imported nasq module, with whether it is imported when the module loads (not in a function or for types)."""
    tree = ast.parse(source)
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or type_checking(node)
        for inner in ast.walk(node)
    }
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (alias.name, id(node) not in late) for alias in node.names if alias.name.split(".")[0] == "nasq"
            )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")
                base = ".".join([*up[: len(up) - node.level + 1], *([base] if base else [])])
            if base.split(".")[0] == "nasq":
                for alias in node.names:
                    yield resolve(base, alias.name), id(node) not in late


def resolve(base: str, name: str) -> str:
    if base == "nasq" and name in lazy():
        return lazy()[name]
    return f"{base}.{name}" if f"{base}.{name}" in MODULES else base


def found(module: str) -> list[tuple[str, bool]]:
    path = MODULES[module]
    return list(imports(path.read_text(), module, path.name == "__init__.py"))


def loaded(module: str) -> set[str]:
    """What a module imports when it runs, in functions too; not what it imports for types alone."""
    source = MODULES[module].read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not type_checking(node)]
    return {target for target, _ in imports(ast.unparse(tree), module, MODULES[module].name == "__init__.py")}


def part(module: str) -> str:
    """The package, or the single module, directly below nasq."""
    return module.split(".")[1] if "." in module else ""


CORE = [module for module in MODULES if part(module) not in MEMBERS and module != "nasq"]


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part(module) for module in CORE} <= set(RANK), "a new package: say where it stands"
    assert len(CORE) > 50


@pytest.mark.parametrize("module", CORE)
def test_imports_go_to_earlier_packages_only(module: str) -> None:
    mine = RANK[part(module)]
    for target, _ in found(module):
        assert target != "nasq", f"{module} imports the facade; import the module itself"
        assert part(target) not in MEMBERS, f"{module} imports {target}: the core never imports its members"
        assert part(target) == part(module) or RANK[part(target)] <= mine, (
            f"{module} imports {target}, which comes later"
        )


def test_the_facade_loads_nothing_but_the_version() -> None:
    assert {target for target, early in found("nasq") if early} == {"nasq.version"}
    missing = {place for place in lazy().values() if place not in MODULES}
    assert missing == set()


def test_members_use_public_names_and_import_siblings_relatively() -> None:
    for module, path in MODULES.items():
        if part(module) not in MEMBERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("nasq"):
                assert not any(f"nasq.{member}" in (node.module or "") for member in MEMBERS), (
                    f"{module}: relative, please"
                )
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private and "._" not in (node.module or ""), f"{module} imports {private}"


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """A cycle of a graph, or nothing."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(edges.get(node, ())):
            if ring := walk(other, [*trail, node]):
                return ring
        done.add(node)
        return []

    return next((ring for node in sorted(edges) if (ring := walk(node, []))), [])


def test_no_module_imports_itself_through_others() -> None:
    edges: dict[str, set[str]] = {}
    for module in CORE:
        for target in loaded(module):
            # A package's __init__ gathers its modules; a module that imports a sibling does not import the package.
            if target != module and not module.startswith(f"{target}."):
                edges.setdefault(module, set()).add(target)
    assert cycle(edges) == []


def test_packages_of_one_group_do_not_import_each_other_both_ways() -> None:
    edges: dict[str, set[str]] = {}
    for module in CORE:
        for target, _ in found(module):
            if part(target) != part(module):
                edges.setdefault(part(module), set()).add(part(target))
    assert cycle(edges) == []


def test_the_checks_see_what_they_are_for() -> None:
    source = (
        "from __future__ import annotations\nimport nasq.cli\nfrom nasq import Supernet\nfrom . import graph\n"
        "from .trace import trace\nfrom nasq.space import Choice\n\ndef f():\n    import nasq.search.study\n"
    )
    assert list(imports(source, "nasq.elastic.flow", False)) == [
        ("nasq.cli", True), ("nasq.supernet", True), ("nasq.elastic.graph", True), ("nasq.elastic.trace", True),
        ("nasq.space", True), ("nasq.search.study", False),
    ]  # fmt: skip
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and cycle({"a": {"b"}, "b": set()}) == []
