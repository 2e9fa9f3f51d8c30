"""The architecture, read from the source: imports in one direction, hooks in one file, small modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tl_sparsify"
TREES = {path: ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.glob("*.py"))}

# A module imports only from those before it. Private helpers (_files, ...) stand before all of these and
# import nothing of the package but each other. cli uses the package as anyone does: after __init__.
ORDER = """
    units causal examples moments circuit intervene basis measure probes affine constants scores attribution score
    curvature path search compensating polish folding export certificates subjects evidence controls verification
    learnt alignment resampling curves evaluation pairing space text task overview compiled readers edges masks
    baselines methods tables benchmark diagrams plot findings report __init__ cli __main__
""".split()
HOOKING = {"hooks", "run_with_hooks", "run_with_cache", "add_hook", "add_perma_hook", "register_forward_hook"}
PLOTTING = {"diagrams", "plot", "report", "cli"}
DRAWING = ("tl_sparsify.diagrams", "tl_sparsify.plot", "tl_sparsify.report")
FOLDING = {"folding", "_export", "_folded", "_narrow", "_skeleton", "_writes"}  # one idea in several private files
INTERNALS = FOLDING | {"_native", "controls", "learnt", "baselines"}
LONGEST = 400


def private(module: str) -> bool:
    return module.startswith("_") and not module.startswith("__")


def rank(module: str) -> int:
    return -1 if private(module) else ORDER.index(module)


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, anywhere in it: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(["tl_sparsify"] * (node.level > 0) + [node.module or ""]).strip(".")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def own_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and module of all that a file imports from the package: of what is no module, ``__init__``."""
    modules = {path.stem for path in TREES}
    for line, name in imports(tree):
        package, _, rest = name.partition(".")
        module = rest.partition(".")[0]
        if package == "tl_sparsify":
            yield line, module if module in modules else "__init__"


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    yield from (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def exported() -> set[str]:
    """The strings of ``__all__`` in ``__init__.py``."""
    for node in TREES[PACKAGE / "__init__.py"].body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(node).split("=")[0]:
            return set(ast.literal_eval(node.value)) if node.value else set()
    return set()


def test_every_module_has_a_place_in_the_order():
    lost = [place(path, 1) for path in TREES if path.stem not in ORDER and not private(path.stem)]
    assert not lost, f"modules without a place in ORDER: {lost}"
    nested = [place(path, 1) for path in PACKAGE.glob("*/**/*.py") if "_tasks" not in path.parts]
    assert not nested, f"the package is flat; these lie deeper: {nested}"


def test_modules_import_only_from_those_before_them():
    wrong = []
    for path, tree in TREES.items():
        for line, module in own_imports(tree):
            both_private = private(path.stem) and private(module)
            if path.stem != "__init__" and not both_private and rank(module) >= rank(path.stem):
                wrong.append(f"{place(path, line)} imports {module}")
    assert not wrong, f"imports against the order: {wrong}"


def test_hooks_are_only_in_intervene():
    wrong = [
        f"{place(path, node.lineno)} .{node.attr}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in HOOKING and path.stem != "intervene"
    ]
    assert not wrong, f"hooks outside intervene.py: {wrong}"


def test_plotting_is_imported_by_nothing_that_computes():
    wrong = [
        f"{place(path, line)} imports {name}"
        for path, tree in TREES.items()
        for line, name in imports(tree)
        if (name.split(".")[0] == "matplotlib" and path.stem not in PLOTTING)
        or (name.startswith(DRAWING) and path.stem not in {*PLOTTING, "__init__"})
    ]
    assert not wrong, f"plotting outside plot, report and cli: {wrong}"


def test_transformer_lens_internals_are_in_folding_verification_and_baselines():
    files = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            below = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            below += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith("transformer_lens.") for name in below):
                files[path.stem] = place(path, node.lineno)
    wrong = [where for module, where in files.items() if module not in INTERNALS]
    assert not wrong, f"TransformerLens internals outside {sorted(INTERNALS)}: {wrong}"


def test_no_file_is_too_long():
    lines = {path: len(path.read_text().splitlines()) for path in TREES}
    wrong = [place(path, n) for path, n in lines.items() if n > LONGEST]
    assert not wrong, f"longer than {LONGEST} lines, so two ideas: {wrong}"


def test_modules_have_docstrings():
    wrong = [place(path, 1) for path, tree in TREES.items() if ast.get_docstring(tree) is None]
    assert not wrong, f"modules without a docstring: {wrong}"


def test_what_is_exported_has_a_docstring():
    names = exported()
    assert names, f"{place(PACKAGE / '__init__.py', 1)} has no literal __all__"
    wrong = [
        f"{place(path, node.lineno)} {node.name}"
        for path, tree in TREES.items()
        for node in definitions(tree)
        if not node.name.startswith("_")
        and (node.name in names or path.stem in names)  # a module is exported with all its public names
        and ast.get_docstring(node) is None
    ]
    assert not wrong, f"exported without a docstring: {wrong}"
