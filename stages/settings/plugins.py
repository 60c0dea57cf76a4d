"""Functions from outside of the package, named `package.module:function` in a config: found without importing them.

A module is looked for in the working directory first, then wherever Python finds modules.
"""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from ...cache.errors import InputError

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""What `package.module:function` looks like."""


def is_function(spec: str) -> bool:
    """Whether a name in a config is written as `package.module:function`."""
    return FUNCTION.fullmatch(spec) is not None


def require_function(spec: str, *, key: str = "") -> str:
    """Give `spec` back if there is such a function, importing nothing: config loading stays fast and without torch.

    Args:
        spec: `package.module:function`.
        key: of the config, for the message; leave it out in a pydantic validator, which adds its own.

    Raises:
        InputError: one line (a ValueError, so that a validator may raise it) if the text has another form, there is no
            such module, or its source has no such name at top level.
    """
    where = f"{key}: " if key else ""
    if not is_function(spec):
        raise InputError(f"{where}{spec!r}: wanted package.module:function")
    module, _, name = spec.partition(":")
    found = _find_module(module)
    if found is None:
        raise InputError(f"{where}{spec}: no module {module!r} in {Path.cwd()} or where Python looks for modules")
    names = _top_level_names(found)
    if names is not None and name not in names:
        raise InputError(f"{where}{spec}: {found.origin} defines no {name!r}; wanted a function at its top level")
    return spec


def load_function(spec: str, takes: Iterable[str] = ()) -> Callable[..., Any]:
    """Import a function.

    Args:
        spec: `package.module:function`.
        takes: names of the arguments that it will be called with, all by name.

    Raises:
        InputError: one line if it cannot be imported, or cannot be called so.
    """
    module, _, name = spec.partition(":")
    _search_working_directory()
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{spec}: cannot be imported ({reason}); wanted package.module:function") from error
    names = list(takes)
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        call = ", ".join(f"{name}=…" for name in names)
        raise InputError(f"{spec}: cannot be called as function({call}) ({error})") from error
    return function


def _search_working_directory() -> None:
    """A console script's `sys.path` begins with its own folder, not with the one where it is run."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def _find_module(name: str) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, which would import the packages above the module."""
    _search_working_directory()
    importlib.invalidate_caches()
    first, *inner = name.split(".")
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    found = next((spec for find in finders if find is not None and (spec := find(first, None))), None)
    for part in inner:
        if found is None or found.submodule_search_locations is None:
            return None
        found = PathFinder.find_spec(part, list(found.submodule_search_locations))  # the whole name wants its parents
    return found


def _top_level_names(module: ModuleSpec) -> set[str] | None:
    """Names that a module's source binds; None where only importing it would tell."""
    if module.origin is None or not module.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(module.origin).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # importing it gives a better error
    names = set(_bound(tree))
    return None if names & {"*", "__getattr__"} else names


def _bound(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
            continue  # what stands inside is not at top level
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        yield from _bound(child)
