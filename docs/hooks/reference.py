"""The reference: a page for each folder of the package, with every public name in it.

What is public stands in ``tl_sparsify/__init__.pyi``; it is read, not imported.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "tl_sparsify"
MARKER = "<!-- public names -->"
ABOUT = {
    "core": "What everything else is made of: units, examples, circuits, interventions, measured risk.",
    "gradients": "Backward passes by other rules than the true gradient.",
    "expansion": "How much of a second-order expansion a search believes.",
    "search": "Scores, replacements and searches.",
    "dictionaries": "Features of sparse autoencoders and transcoders as units.",
    "folding": "A circuit as a smaller model.",
    "abstraction": "Causal models, and whether a network implements them.",
    "patching": "What units do through others, and attribution past first order.",
    "tasks": "What is asked of a model, and how to make your own.",
    "comparison": "Evaluation, other methods, and benchmarks.",
    "masking": "Masks trained by gradient descent.",
    "stressing": "Tests of a circuit that it can fail.",
    "discovery": "Behaviours of a model on a text, found without being told.",
    "formats": "Examples and circuits in the files of others.",
    "presentation": "Figures and reports.",
}


def public() -> dict[str, str]:
    """The full path of every public name."""
    stub = ast.parse((ROOT / PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}


def path_of(dotted: str) -> Path:
    """The file that a module is, or would be."""
    path = ROOT / dotted.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def members(module: str) -> dict[str, str]:
    """The full paths of a module's public functions and classes: ``__all__`` where it has one."""
    tree = ast.parse(path_of(module).read_text())
    defined = {
        node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    imported = {
        alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            known = defined | imported  # aliases of types are in neither
            return {name: known[name] for name in ast.literal_eval(node.value) if name in known}
    return {name: path for name, path in defined.items() if not name.startswith("_")}


def on_files(files: Files, config: Any) -> Files:
    names = public()
    at_top = set(names.values())
    seen: set[str] = set()
    pages = {folder: [f"# {folder.capitalize()}", ABOUT[folder]] for folder in ABOUT}
    modules = {name: path for name, path in names.items() if path_of(path).is_file()}
    for name, path in sorted(names.items(), key=lambda item: (item[0] in modules, item[0].lower())):
        page = pages[path.split(".")[1]]
        if name not in modules:
            page.append(entry(f"tls.{name}", path, 2))
            continue
        page.append(entry(f"tls.{name}", path, 2))
        for member, full in members(path).items():
            if full in at_top or full in seen:
                page.append(f"### `tls.{name}.{member}` {{: .doc .doc-heading }}\n\nThe same as [`{member}`][{full}].")
            else:
                page.append(entry(f"tls.{name}.{member}", full, 3))
                seen.add(full)
    for folder, parts in pages.items():
        files.append(File.generated(config, f"reference/{folder}.md", content="\n\n".join(parts) + "\n"))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    return text.replace(MARKER, overview()) if MARKER in text else text


def overview() -> str:
    """A line for each folder, with links to its public names."""
    names = public()
    lines: list[str] = []
    for folder, about in ABOUT.items():
        here = sorted((name for name, path in names.items() if path.split(".")[1] == folder), key=str.lower)
        links = ", ".join(f"[`{name}`][{names[name]}]" for name in here)
        lines.append(f"- [{folder.capitalize()}](reference/{folder}.md): {about} {links}")
    return "\n".join(lines)


def entry(heading: str, path: str, level: int) -> str:
    """What mkdocstrings makes a documented object of; of a class also its public methods."""
    options = [f"heading: {heading}", f"toc_label: {heading}", f"heading_level: {level}"]
    module, _, name = path.rpartition(".")
    for node in ast.parse(path_of(module).read_text()).body if path_of(module).is_file() else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef) and part.name[0] != "_"]
            options.append(f"members: {json.dumps(methods)}")
    return "\n".join([f"::: {path}", "    options:", *(f"        {option}" for option in options)])
