"""Other trainers beside us: reads a checkout that the user names with --peer. Nothing of it is part of this project."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from errors import UserError


def import_model(checkout: Path, file: str = "model.py", project: str = "nanoGPT") -> ModuleType:
    """The checkout's file with its model, under a name of its own beside our module of that name. Raises UserError."""
    path = checkout / file
    if not path.is_file():
        raise UserError(f"--peer={checkout}: no {file} there; expected a checkout of {project}")
    spec = importlib.util.spec_from_file_location(name := f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def extract_function(path: Path, name: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """One function of a script that cannot be imported (it trains at once), run with `scope` as its globals. Raises UserError."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(found) != 1:
        raise UserError(f"{path}: expected one function {name}, found {len(found)}; is it a checkout of nanoGPT?")
    module = ast.Module(body=list(found), type_ignores=[])
    exec(compile(module, str(path), "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function
