"""The rules of the house, checked: layers, cycles, abstract-or-final, public names and their pages.

The rules about imports and syntax read the source by `ast` and need no import of the package; those
about classes and docstrings look at the imported package.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import equinox as eqx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flowsolve"
API_PAGES = ROOT / "docs" / "api"

# Room -> layer. A room is a module or a sub-package at the top of flowsolve/. A room imports from
# strictly lower layers, from its own package folder, and within its layer if that makes no cycle.
# A file that is not in this table or the next fails the test: a new room is a decision.
LAYERS: dict[str, float] = {
    "_types": 0,
    "_numerics": 0,
    "_checks": 0,
    "_features": 0,
    "_progress": 0,
    "paths": 1,
    "predictions": 1,
    "conversions": 1.5,
    "times": 1,
    "weights": 1.5,
    "grids": 1,
    "couplings": 1,
    "sources": 1,
    "flow": 2,
    "preconditioning": 2,
    "bridges": 2,
    "flowmaps": 2,
    "guidance": 2,
    "posterior": 2,
    "brownian": 3,
    "dynamics": 3,
    "solvers": 3,
    "_settings": 3.25,
    "_steps": 3.25,
    "_integrate": 3.5,
    "batching": 3.5,
    "sampling": 4,
    "divergence": 4,
    "likelihood": 4,
    "particles": 4,
    "losses": 4,
    "distillation": 5,
    "alignment": 4,
    "sharding": 4,
    "averages": 4,
    "data": 4,
    "_store": 4.5,
    "editing": 4.5,
    "training": 5,
    "reflow": 5,
    "checkpoints": 5,
    "metrics": 5,
    "tuning": 5,
}
# Side room -> the highest layer it may import. No other room imports a side room. `latent` bounds a likelihood and adds
# its terms to a loss of latents, which are rooms of layer 4; `plots` draws what is solved.
SIDE_ROOMS: dict[str, float] = {"nn": 0, "latent": 4, "plots": 4, "testing": 2}


# --- the source, read by ast ---------------------------------------------------------------------


def source_files() -> dict[str, Path]:
    """Dotted module name -> file; a sub-package goes by its own name."""
    files = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("flowsolve", *file.relative_to(PACKAGE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


FILES = source_files()
TREES = {name: ast.parse(file.read_text(), str(file)) for name, file in FILES.items()}


def where(module: str, node: ast.AST) -> str:
    return f"{FILES[module].relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def room(module: str) -> str:
    """The part of a module's name that the layer table knows; the package itself has none."""
    return module.split(".")[1] if "." in module else ""


def is_package(module: str) -> bool:
    return FILES[module].name == "__init__.py"


def imports(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """The modules of flowsolve imported anywhere in the text of `module`, with the statements."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "flowsolve":
                    yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                here = module.split(".")
                here = here if is_package(module) else here[:-1]
                here = here[: len(here) - (node.level - 1)]
                base = ".".join([*here, *([node.module] if node.module else [])])
            else:
                base = node.module or ""
            if base.split(".")[0] != "flowsolve":
                continue
            for alias in node.names:
                # `from . import paths` and `from .paths import Linear` both import flowsolve.paths.
                name = f"{base}.{alias.name}"
                yield (name if name in FILES else base), node


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return None
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*trail, node]):
                return cycle
        done.add(node)
        return None

    for start in sorted(graph):
        if cycle := visit(start, []):
            return cycle
    return None


@pytest.mark.quick
def test_every_room_is_in_the_table():
    unknown = sorted({room(m) for m in FILES} - {""} - set(LAYERS) - set(SIDE_ROOMS))
    assert not unknown, f"not in the layer table: {unknown}. Give each a layer, here and in the documentation."


@pytest.mark.quick
def test_imports_go_downwards():
    wrong = []
    for module in FILES:
        source = room(module)
        if not source:
            continue
        for target_module, node in imports(module):
            target = room(target_module)
            known = {**LAYERS, **SIDE_ROOMS, "": 0}
            if target == source or source not in known or target not in known:
                continue  # what is not in the table fails the test above
            line = f"{where(module, node)} imports {target_module}"
            if not target:
                wrong.append(f"{line}: import from the module that defines the name, not from the package.")
            elif target in SIDE_ROOMS:
                wrong.append(f"{line}: nothing in the library imports the side room {target!r}.")
            elif source in SIDE_ROOMS and LAYERS[target] > SIDE_ROOMS[source]:
                wrong.append(f"{line}: {source!r} may import up to layer {SIDE_ROOMS[source]:g} only.")
            elif source not in SIDE_ROOMS and LAYERS[target] > LAYERS[source]:
                wrong.append(f"{line}: layer {LAYERS[source]:g} imports layer {LAYERS[target]:g}.")
    assert not wrong, "imports go downwards only:\n" + "\n".join(wrong)


@pytest.mark.quick
def test_no_import_cycles():
    modules = {m: {t for t, _ in imports(m)} - {m} for m in FILES}
    # A module gives names to its package's __init__, never the other way round.
    for module in FILES:
        for target in set(modules[module]):
            assert not module.startswith(target + "."), (
                f"{FILES[module].relative_to(ROOT)} imports its own package {target}: import the sibling module."
            )
    cycle = find_cycle(modules)
    assert cycle is None, "import cycle: " + " -> ".join(cycle or [])

    rooms: dict[str, set[str]] = {}
    for module, targets in modules.items():
        if room(module):
            rooms.setdefault(room(module), set()).update({room(t) for t in targets} - {room(module), ""})
    cycle = find_cycle(rooms)
    assert cycle is None, "cycle between rooms: " + " -> ".join(cycle or [])


@pytest.mark.quick
def test_importing_uses_no_device():
    """An array made at import starts JAX: too early for a user's flags, and a process that forks then hangs."""
    code = "import flowsolve, jax._src.xla_bridge as bridge, sys; sys.exit(int(bridge.backends_are_initialized()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_forbidden_syntax():
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                if any(alias.name == "annotations" for alias in node.names):
                    wrong.append(
                        f"{where(module, node)}: `from __future__ import annotations` hides "
                        "annotations from the runtime checks; quote the one that needs it."
                    )
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg:
                wrong.append(
                    f"{where(module, node)}: a catch-all **{node.args.kwarg.arg} swallows misspelt "
                    "keywords; name the parameters."
                )
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "print":
                    wrong.append(f"{where(module, node)}: a library does not print; return the value.")
                elif node.func.id == "super":
                    wrong.append(f"{where(module, node)}: no super(): abstract or final; compose.")
    assert not wrong, "\n".join(wrong)


@pytest.mark.quick
def test_init_lists_what_it_reexports():
    tree = TREES["flowsolve"]
    bound = {
        (alias.asname or alias.name).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    listed = set(getattr(load("flowsolve"), "__all__", ()))
    missing = sorted(name for name in bound - listed if not name.startswith("_"))
    assert not missing, f"flowsolve/__init__.py imports {missing} but __all__ does not list them."


# --- the imported package -------------------------------------------------------------------


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def is_public(module: str) -> bool:
    return not any(part.startswith("_") for part in module.split("."))


PUBLIC_MODULES = [name for name in FILES if is_public(name)]


def module_classes() -> list[type]:
    """Every equinox Module class defined at the top of a module of flowsolve."""
    found = []
    for name in FILES:
        for value in vars(load(name)).values():
            if inspect.isclass(value) and issubclass(value, eqx.Module) and value.__module__ == name:
                found.append(value)
    return list(dict.fromkeys(found))


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "flowsolve"


def abstract_members(cls: type) -> set[str]:
    names = ("__abstractmethods__", "__abstractvars__", "__abstractclassvars__")
    return set().union(*(getattr(cls, name, ()) for name in names))


def plain_function(attribute: object) -> object | None:
    """The function behind a method, property, class or static method; None for anything else."""
    if isinstance(attribute, property):
        attribute = attribute.fget
    if isinstance(attribute, classmethod | staticmethod):
        attribute = attribute.__func__
    attribute = getattr(attribute, "method", attribute)  # the wrapper that Equinox puts around a method
    return attribute if inspect.isfunction(inspect.unwrap(attribute)) else None  # pyright: ignore


def own_methods(cls: type) -> dict[str, object]:
    """The methods and properties written in the class itself, without what dataclasses add."""
    return {
        name: function
        for name, attribute in vars(cls).items()
        if (name == "__call__" or not name.startswith("__"))
        and not inspect.isclass(attribute)
        and (function := plain_function(attribute)) is not None
    }


def test_classes_are_abstract_or_final():
    classes = module_classes()
    wrong = []
    for cls in classes:
        name = f"{cls.__module__}.{cls.__qualname__}"
        named_abstract = re.match(r"_?Abstract", cls.__name__) is not None
        missing = abstract_members(cls)
        if named_abstract and not missing:
            wrong.append(f"{name} has nothing abstract: give it an abstract method or an AbstractVar, or rename it.")
        if not named_abstract and missing:
            wrong.append(f"{name} leaves {sorted(missing)} abstract: implement them, or call it Abstract...")
        for base in cls.__bases__:
            if is_ours(base) and not re.match(r"_?Abstract", base.__name__):
                wrong.append(f"{name} subclasses the final class {base.__name__}: wrap it instead.")
    assert not wrong, "\n".join(wrong)


def test_no_concrete_method_is_overridden():
    wrong = []
    for cls in module_classes():
        for name in own_methods(cls):
            for base in cls.__mro__[1:]:
                if not is_ours(base) or name not in vars(base):
                    continue
                if name not in getattr(base, "__abstractmethods__", ()):
                    wrong.append(
                        f"{cls.__module__}.{cls.__qualname__}.{name} overrides the concrete "
                        f"{base.__name__}.{name}: make it abstract there, or vary it by a field."
                    )
    assert not wrong, "\n".join(wrong)


def public_names() -> list[tuple[str, str]]:
    return [(module, name) for module in PUBLIC_MODULES for name in getattr(load(module), "__all__", ())]


@pytest.mark.quick
def test_public_modules_have_all_and_a_docstring():
    wrong = []
    for name in PUBLIC_MODULES:
        module = load(name)
        if not hasattr(module, "__all__"):
            wrong.append(f"{name} has no __all__.")
        elif len(set(module.__all__)) != len(module.__all__):
            wrong.append(f"{name}.__all__ lists a name twice.")
        if len(inspect.cleandoc(module.__doc__ or "")) < 40:
            wrong.append(f"{name} opens without a docstring (notation and equation first).")
    assert not wrong, "\n".join(wrong)


@pytest.mark.quick
def test_public_names_exist_and_have_docstrings():
    wrong = []
    for module, name in public_names():
        if not hasattr(load(module), name):
            wrong.append(f"{module}.__all__ lists {name}, which does not exist.")
            continue
        value = getattr(load(module), name)
        if inspect.isclass(value):
            doc = vars(value).get("__doc__") or ""
            if doc.startswith(f"{value.__name__}("):  # what dataclasses write themselves
                doc = ""
        elif callable(value):
            doc = inspect.getdoc(value) or ""
        else:
            continue  # a module, which has its own test, or a constant, which cannot have one
        if len(inspect.cleandoc(doc)) < 40:
            wrong.append(f"{module}.{name} has no docstring of at least 40 characters.")
    assert not wrong, "\n".join(wrong)


@pytest.mark.quick
def test_public_methods_have_docstrings():
    """On the method itself or, for the implementation of an interface, on the interface."""
    wrong = set()
    for module, name in public_names():
        cls = getattr(load(module), name, None)
        if not inspect.isclass(cls):
            continue
        for base in filter(is_ours, cls.__mro__):
            for method in own_methods(base):
                documented = any(
                    inspect.getdoc(function)
                    for k in cls.__mro__
                    if method in vars(k) and (function := plain_function(vars(k)[method]))
                )
                if not method.startswith("_") and not documented:
                    wrong.add(f"{base.__module__}.{base.__qualname__}.{method} has no docstring.")
    assert not wrong, "\n".join(sorted(wrong))


# --- docs/api -------------------------------------------------------------------------------


def documented_names() -> dict[str, set[str]]:
    """Module -> the names that docs/api/ lists for it, under `::: module` and `members:`."""
    found: dict[str, set[str]] = {}
    for page in sorted(API_PAGES.glob("*.md")):
        current = ""
        for line in page.read_text().splitlines():
            if match := re.match(r"::: (flowsolve[\w.]*)\s*$", line):
                current = match[1]
                found.setdefault(current, set())
            elif current and (match := re.match(r"\s+- (\w+)\s*$", line)):
                found[current].add(match[1])
            elif line and not line[0].isspace():
                current = ""
    return found


@pytest.mark.quick
def test_public_names_have_a_page():
    pages = documented_names()
    anywhere = set().union(*pages.values(), {room(module) for module in pages})
    missing = []
    for module, name in public_names():
        # flowsolve itself re-exports modules and names that the pages of their own modules list.
        # A name of a sub-package's module may stand on the page of the sub-package.
        packages = [m for m in pages if module == m or module.startswith(f"{m}.")]
        listed = anywhere if module == "flowsolve" else set().union(*(pages[m] for m in packages))
        submodule = f"{module}.{name}" in FILES
        if name not in listed and not name.startswith("__") and not submodule:
            missing.append(f"{module}.{name}")
    assert not missing, (
        "not listed in docs/api/ (as `- Name` below `::: module`, `options:`, `members:`): " + ", ".join(missing)
    )


@pytest.mark.quick
def test_pages_list_nothing_that_is_gone():
    stale = []
    for module, names in documented_names().items():
        if module not in FILES:
            stale.append(f"{module} (no such module)")
            continue
        stale += [f"{module}.{name}" for name in sorted(names - set(getattr(load(module), "__all__", ())))]
    assert not stale, "docs/api/ lists what does not exist: " + ", ".join(stale)
