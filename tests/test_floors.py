"""The structure that docs/DESIGN.md draws: imports go down its floors; functions stay short."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FUNCTION_LINES = 60


def read_floors() -> dict[str, int]:
    """Package (a file, or a folder with a slash at the end) → floor, from the drawing in docs/DESIGN.md."""
    section = (ROOT / "docs" / "DESIGN.md").read_text("utf-8").partition("## The floors")[2]
    drawing = section.split("```")[1]
    floors = {}
    for line in drawing.strip().splitlines():
        number, *packages = line.split()
        floors |= dict.fromkeys(packages, int(number))
    return floors


FLOORS = read_floors()


def room_of(path: str) -> str | None:
    """The package of a file: its own entry in the drawing, or else its top-level folder."""
    return next((package for package in (path, path.partition("/")[0] + "/") if package in FLOORS), None)


def sources() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def imported_files(path: str) -> set[str]:
    """The project's files that a file imports, anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}: a relative import"
            continue
        for name in names:
            stem = name.replace(".", "/")
            found |= {file for file in (f"{stem}.py", f"{stem}/__init__.py") if (ROOT / file).is_file()}
    return found


def broken_rule(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`; None where it may."""
    one, other = room_of(importer), room_of(imported)
    if one is None or one == other:
        return None
    if other is None:
        return f"{imported} has no floor in docs/DESIGN.md"
    if FLOORS[other] >= FLOORS[one]:
        return f"{one} is on floor {FLOORS[one]}, {other} on floor {FLOORS[other]}"
    return None


def test_imports_go_down_the_floors():
    broken = [
        f"{path} imports {imported}: {rule}"
        for path in sources()
        for imported in sorted(imported_files(path))
        if (rule := broken_rule(path, imported))
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("training/state.py", "checkpoint.py", True),
        ("training/state.py", "training/optim.py", True),
        ("training/setup.py", "prepare_data/pipeline.py", True),
        ("training/setup.py", "generation/text.py", False),  # the same floor
        ("generation/engine.py", "training/data.py", False),
        ("generation/engine.py", "server/queue.py", False),
        ("training/setup.py", "config/loader.py", False),
        ("common/option.py", "config/loader.py", False),
        ("prepare_data/__main__.py", "config/__init__.py", True),
        ("prepare_data/pipeline.py", "config/__init__.py", False),
        ("model.py", "errors.py", False),
    ],
)
def test_the_rule_itself(importer, imported, allowed):
    assert (broken_rule(importer, imported) is None) == allowed


def test_the_drawing_names_every_room():
    assert sorted(FLOORS.values(), reverse=True) == list(FLOORS.values()), "the highest floor comes first"
    unnamed = {path for path in sources() if room_of(path) is None and not path.startswith(("tests/", "bench/"))}
    assert unnamed == set()
    assert all((ROOT / package).exists() for package in FLOORS)


def test_no_function_is_longer_than_a_screen():
    found = []
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    assert found == []


def test_every_module_says_what_it_is():
    silent = [path for path in sources() if not ast.get_docstring(ast.parse((ROOT / path).read_text("utf-8")))]
    assert [path for path in silent if path != "tests/__init__.py"] == []


def test_the_map_names_what_exists():
    """Every file that the map of docs/DESIGN.md names."""
    drawing = (ROOT / "docs" / "DESIGN.md").read_text("utf-8").partition("## The map")[2].split("```")[1]
    package, missing = "", []
    for line in drawing.strip().splitlines():
        name = line.split()[0].rstrip(",")
        if not line.startswith(" "):
            package = name if name.endswith("/") else ""
            missing += [] if (ROOT / name).exists() else [name]
        elif re.fullmatch(r"[\w/]+(\.py|/)", name):
            missing += [] if (ROOT / package / name).exists() else [package + name]
    assert missing == []
