"""Pages that are written elsewhere: README, CONTRIBUTING, CHANGELOG, and the notebooks as they are stored (not run)."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
ELSEWHERE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINKS = (
    (re.compile(r"\]\(docs/([\w./-]+)\)"), r"](\1)"),
    (re.compile(r"\]\(notebooks/(\w+)\.ipynb\)"), r"](tutorial/\1.md)"),
    *((re.compile(rf"\]\({re.escape(file)}\)"), f"]({page})") for page, file in ELSEWHERE.items()),
)

IN_NOTEBOOKS = (
    (re.compile(r"\]\(\.\./docs/([\w./-]+)\)"), r"](../\1)"),
    (re.compile(r"\]\((\w+)\.ipynb\)"), r"](\1.md)"),
)


def on_files(files: Files, config: Any) -> Files:
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text()
        for pattern, new in LINKS:
            text = pattern.sub(new, text)
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, content in notebook(path).items():
            files.append(File.generated(config, f"tutorial/{name}", content=content))
    return files


def notebook(path: Path) -> dict[str, str | bytes]:
    """A page in Markdown under the notebook's name, and its images."""
    made: dict[str, str | bytes] = {}
    parts: list[str] = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for pattern, new in IN_NOTEBOOKS:
                source = pattern.sub(new, source)
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(_output(output, path.stem, made))
    parts.insert(1, f"*This page is `notebooks/{path.name}`, with its stored outputs.*")
    made[f"{path.stem}.md"] = "\n\n".join(parts) + "\n"
    return made


def _output(output: dict[str, Any], stem: str, made: dict[str, str | bytes]) -> str:
    """What a cell printed or gave; an image is put into ``made``."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}_{len(made)}.png"
        made[name] = base64.b64decode("".join(data["image/png"]))
        return f"![]({name})"
    if "text/html" in data:
        table = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
        table = re.sub(r"\n\s*\n", "\n", table)  # an empty line would end the block of HTML
        return f'<div class="output">\n{table}\n</div>'
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip("\n")
    return f"```text\n{text}\n```" if text else ""
