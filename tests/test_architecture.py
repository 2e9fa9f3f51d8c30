"""The architecture, read from the source: a folder for each thing that a researcher does, imports in one direction,
hooks in one file, small modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tl_sparsify"

# A folder imports only from folders of earlier lines, and a module only from modules before it in its own.
ORDER = {
    "reading": "norms heard written",
    "_internal": "after_import experts checks random arguments ranks files progress encoders directory storage "
    "processes first_tokens recomputation layouts readers",
    "core": "site units prompts examples circuit edges reduction intervene memory forward moments metrics "
    "distributions measure probes basis",
    "gradients": "rules backward",
    "patching": "atp_star second_order connections",
    "expansion": "linearisation selection shrinkage",
    "search": "settings affine refitting constants alone scores attribution score curvature path checkpoint rounds "
    "joint compensating exchanges",
    "dictionaries": "dictionary activity units files removal",
    "folding": "checkpoint narrow stream_writes rebuild bridge export boot fold sizes",
    "abstraction": "causal_model verdicts evidence between interchange controls certificates verify das candidates "
    "boundless align scrubbing rivals subspaces",
    "formats": "rows answers columns spans checks assembly records mib_names mib_files "
    "mib_edges mib_graph mib_scores mib_tasks mib importers share",
    "tasks": "native real_models places task tokenizers language_models pairing input_space text "
    "published causalgym ravel compiled accuracy beginning overview",
    "masking": "gates training hard_concrete top_k_gate information_bottleneck weaving sharpening",
    "comparison": "cost resampling curves evaluate edge_readers edge_attribution path_patching rounds "
    "edge_scores baselines convergence methods tables cells benchmark",
    "stressing": "table measuring worst_case minimality alternatives specificity hypotheses profiles mechanisms "
    "templates battery",
    "discovery": "contexts naming found risks behaviours",
    "presentation": "sealed results sentences edge_map edge_graph diagrams curves plot printed report "
    "circuit_data neuronpedia page",
    "": "__init__ plan run cli __main__",
}
LEVEL = {"reading": -1, "_internal": 0, "core": 1, "gradients": 2, "expansion": 2,
         "search": 3, "dictionaries": 3, "folding": 3, "abstraction": 3,
         "formats": 4, "patching": 4, "masking": 4, "tasks": 5, "comparison": 6, "stressing": 7, "discovery": 8,
         "presentation": 9, "": 10}  # fmt: skip
HOOKS = ("core.intervene", "_internal.experts")
HOOKING = {"hooks", "run_with_hooks", "run_with_cache", "add_hook", "add_perma_hook", "register_forward_hook"}
PLOTTING = {
    "presentation.edge_graph",
    "presentation.edge_map",
    "presentation.diagrams",
    "presentation.curves",
    "presentation.plot",
    "presentation.report",
    "cli",
}
INTERNALS = {
    *(f"folding.{name}" for name in ORDER["folding"].split()),
    "tasks.native", "presentation.circuit_data", "abstraction.controls", "abstraction.boundless", "abstraction.das",
    "comparison.baselines",
}  # fmt: skip
LONGEST, MOST, PRIVATE_IN_DIR = 400, 16, 12


def module_of(path: Path) -> str:
    """``core.units``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


TREES = {
    module_of(path): ast.parse(path.read_text(), str(path))
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_tasks" not in path.parts and (path.name != "__init__.py" or path.parent == PACKAGE)
}
PATHS = {module: PACKAGE / f"{module.replace('.', '/')}.py" for module in TREES}


def place_of(module: str) -> tuple[str, int]:
    """Folder, and number within it."""
    folder, _, name = module.rpartition(".")
    return folder, ORDER[folder].split().index(name)


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, anywhere in it: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(["tl_sparsify"] * (node.level > 0) + [node.module or ""]).strip(".")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def own_imports(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of all that a file imports from the package: of what is no module, ``__init__``."""
    for line, dotted in imports(tree):
        package, _, rest = dotted.partition(".")
        if package != "tl_sparsify":
            continue
        parts = rest.split(".")
        found = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in TREES), "__init__")
        yield line, found, ".".join(parts[len(found.split(".")) :])


def place(module: str, line: int) -> str:
    return f"{PATHS[module].relative_to(PACKAGE.parent)}:{line}"


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    yield from (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def defined(tree: ast.Module) -> set[str]:
    """The names that a module defines itself."""
    found = {node.name for node in definitions(tree)}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def public() -> dict[str, set[str]]:
    """The public names of each module, from the table in ``__init__.py``."""
    for node in TREES["__init__"].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC":
            table = ast.literal_eval(node.value)
            return {module.removeprefix("tl_sparsify."): set(names) for module, names in table.items()}
    return {}


def test_every_module_has_a_place_in_the_order():
    lost = [place(m, 1) for m in TREES if m.rpartition(".")[2] not in ORDER.get(m.rpartition(".")[0], "").split()]
    assert not lost, f"modules without a place in ORDER: {lost}"


def test_no_folder_is_too_full():
    full = {folder: names for folder, names in ORDER.items() if len(names.split()) > MOST}
    assert not full, f"folders with more than {MOST} modules: {full}"


def test_modules_import_only_from_those_before_them():
    wrong = []
    for module, tree in TREES.items():
        folder, number = place_of(module)
        for line, other, _ in own_imports(tree):
            there, at = place_of(other)
            fine = at < number if there == folder else LEVEL[there] < LEVEL[folder]
            if not fine:
                wrong.append(f"{place(module, line)} imports {other}")
    assert not wrong, f"imports against the order: {wrong}"


def test_names_are_imported_from_where_they_are_defined_and_private_ones_never():
    wrong = []
    for module, tree in TREES.items():
        for line, other, name in own_imports(tree):
            if name and other != "__init__" and name not in defined(TREES[other]):
                wrong.append(f"{place(module, line)} imports {name} from {other}, which does not define it")
            if name.startswith("_") and not name.startswith("__"):
                wrong.append(f"{place(module, line)} imports the private {name} of {other}")
    assert not wrong, f"{wrong}"


def test_the_stub_says_what_the_package_offers():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    found: dict[str, set[str]] = {}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            found.setdefault((node.module or "").removeprefix("tl_sparsify."), set()).update(a.name for a in node.names)
    assert found == public()


def test_little_but_public_names_is_seen_in_the_package():
    import tl_sparsify as tls

    assert set(tls.__all__) <= set(dir(tls))
    assert len(set(dir(tls)) - set(tls.__all__)) <= PRIVATE_IN_DIR
    assert all(getattr(tls, name) is not None for name in tls.__all__)


def test_hooks_are_only_in_intervene():
    wrong = [
        f"{place(path, node.lineno)} .{node.attr}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in HOOKING and path not in HOOKS
    ]
    assert not wrong, f"hooks outside intervene.py: {wrong}"


def test_plotting_is_imported_by_nothing_that_computes():
    wrong = [
        f"{place(path, line)} imports {name}"
        for path, tree in TREES.items()
        for line, name in imports(tree)
        if (name.split(".")[0] == "matplotlib" and path not in PLOTTING)
        or (
            name.startswith("tl_sparsify.presentation.")
            and not path.startswith("presentation.")
            and path not in ("run", "cli")
        )
    ]
    assert not wrong, f"plotting outside plot, report and cli: {wrong}"


def test_transformer_lens_internals_are_in_folding_verification_and_baselines():
    files = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            below = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            below += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith("transformer_lens.") for name in below):
                files[path] = place(path, node.lineno)
    wrong = [where for module, where in files.items() if module not in INTERNALS]
    assert not wrong, f"TransformerLens internals outside {sorted(INTERNALS)}: {wrong}"


def test_no_file_is_too_long():
    lines = {path: len(PATHS[path].read_text().splitlines()) for path in TREES}
    wrong = [place(path, n) for path, n in lines.items() if n > LONGEST]
    assert not wrong, f"longer than {LONGEST} lines, so two ideas: {wrong}"


def test_modules_have_docstrings():
    wrong = [place(path, 1) for path, tree in TREES.items() if ast.get_docstring(tree) is None]
    assert not wrong, f"modules without a docstring: {wrong}"


def test_what_is_exported_has_a_docstring():
    names = {name for some in public().values() for name in some}
    assert names, "__init__.py has no literal table _PUBLIC"
    wrong = [
        f"{place(path, node.lineno)} {node.name}"
        for path, tree in TREES.items()
        for node in definitions(tree)
        if not node.name.startswith("_")
        and (node.name in names or path.rpartition(".")[2] in names)  # a module is exported with all its public names
        and ast.get_docstring(node) is None
    ]
    assert not wrong, f"exported without a docstring: {wrong}"
