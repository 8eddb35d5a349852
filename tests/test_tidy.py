"""The rules of the house that a program can check: layers, sizes, docstrings, the stub."""

from __future__ import annotations

import ast
import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cow"

# Each layer may import only what stands before it, and itself; `cow` is the public face.
LAYERS = (
    "cow.units",
    "cow.errors",
    "cow._core",
    "cow.image",
    "cow.store",
    "cow.target",
    "cow.targets",
    "cow.table",
    "cow.device",
    "cow.mapper",
    "cow.lvm.errors",
    "cow.lvm.text",
    "cow.lvm.names",
    "cow.lvm.metadata",
    "cow.lvm.metadata_text",
    "cow.lvm.label",
    "cow.lvm.mda",
    "cow.lvm.check",
    "cow.lvm.label_scan",
    "cow.lvm.size",
    "cow.lvm.allocation",
    "cow.lvm.create",
    "cow.lvm.edit",
    "cow.lvm.devices",
    "cow.lvm.pv",
    "cow.lvm.commit",
    "cow.lvm.backups",
    "cow.lvm.cow_size",
    "cow.lvm.snapshot_record",
    "cow.lvm.tables",
    "cow.lvm.activation",
    "cow.lvm.merge",
    "cow.lvm.monitor",
    "cow.lvm.active",
    "cow.lvm.snapshots",
    "cow.lvm.vg_changes",
    "cow.lvm.group",
    "cow.lvm.manage",
    "cow.lvm",
    "cow.volume",
    "cow.export",
    "cow.daemon",
    "cow",
    "cow.cli",
    "cow.__main__",
)
LONGEST_FILE = 600
LONGEST_LINE = 100


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    """Return the dotted name of a file in cow/, of a package for its `__init__.py`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer_of(module: str) -> str | None:
    """Return the layer a module of cow belongs to; the public face is `cow` alone."""
    if module == "cow":
        return "cow"
    return next((layer for layer in LAYERS if layer != "cow" and within(module, layer)), None)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or any(path.with_suffix(end).exists() for end in (".py", ".pyx"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, module of cow) for each import, wherever in the file it stands."""
    package = module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found = [name if is_module(name) else base for name in inner]
        else:
            continue
        for name in found:
            if within(name, "cow"):
                yield node.lineno, name


def core_imports() -> Iterator[tuple[str, int, str]]:
    """Yield (file, line number, module of cow) for each import in the extension's sources."""
    statement = re.compile(r"^\s*(?:from|c?import)\s+(cow(?:\.\w+)*|\.+\w*)")
    for path in core_sources():
        for number, line in enumerate(lines(path), 1):
            if match := statement.match(line):
                yield shown(path), number, re.sub(r"^\.+", "cow.", match[1]).rstrip(".")


def core_sources() -> list[Path]:
    return sorted([*PACKAGE.glob("*.pyx"), *PACKAGE.glob("core/*.pxi")])


def too_low(importer: str, imported: str) -> bool:
    """Say whether the module `imported` stands in a layer below that of `importer`."""
    above, below = layer_of(imported), layer_of(importer)
    return above is None or below is None or LAYERS.index(above) > LAYERS.index(below)


def test_every_module_stands_in_a_layer():
    assert [shown(p) for p in python_files() if layer_of(module_name(p)) is None] == []


def test_a_layer_imports_only_what_stands_above_it():
    wrong = [
        f"{shown(path)}:{line}: {module_name(path)} imports {name}"
        for path in python_files()
        for line, name in imports(path)
        if too_low(module_name(path), name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_extension_imports_only_what_stands_above_it():
    wrong = [
        f"{path}:{line}: cow._core imports {name}"
        for path, line, name in core_imports()
        if too_low("cow._core", name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("cow.device", "cow.table", False),
        ("cow.table", "cow.device", True),
        ("cow.targets.snapshot", "cow.targets.origin", False),
        ("cow.targets.snapshot", "cow.table", True),
        ("cow.mapper", "cow", True),
        ("cow.cli.main", "cow", False),
        ("cow", "cow.mapper", False),
        ("cow.store", "cow.elsewhere", True),
    ],
)
def test_the_layer_rule_itself(importer, imported, wrong):
    assert too_low(importer, imported) is wrong


def test_no_file_is_too_long():
    lengths = {shown(path): len(lines(path)) for path in python_files()}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_line_is_too_long():
    sources = [ROOT / "setup.py", *core_sources(), *PACKAGE.glob("core/*.h")]
    for folder in ("cow", "tests", "benchmarks", "examples"):
        sources += (ROOT / folder).rglob("*.py")
        sources += (ROOT / folder).rglob("*.pyi")
    wrong = [
        f"{shown(path)}:{number}: {len(line.expandtabs())} columns"
        for path in sorted(sources)
        for number, line in enumerate(lines(path), 1)
        if len(line.expandtabs()) > LONGEST_LINE
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_prints():
    wrong = [
        f"{shown(path)}:{node.lineno}"
        for path in python_files()
        if layer_of(module_name(path)) not in ("cow.cli", "cow.__main__")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_docstring():
    assert [shown(path) for path in python_files() if not ast.get_docstring(parse(path))] == []


def stub_names(path: Path) -> set[str]:
    """Return the public names that a stub defines at its top level."""
    names: set[str] = set()
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in names if not name.startswith("_")}


def test_the_stub_lists_the_public_names_of_the_extension():
    core = importlib.import_module("cow._core")
    public = {
        name
        for name, value in vars(core).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", core.__name__) == core.__name__
    }
    assert stub_names(PACKAGE / "_core.pyi") == public
