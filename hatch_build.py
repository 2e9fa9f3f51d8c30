"""What of ``tasks`` goes into the wheel: all that loading a task needs. The scripts that trained its model or searched
its units work in the repository only (``python -m tasks.NAME.train``) and stay there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Tasks(BuildHookInterface):
    """Puts the tasks into the package, as ``tl_sparsify/_tasks``; an editable install reads them where they are."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        folder = Path(self.root) / "tasks"
        for path in sorted(folder.rglob("*")):
            cached = "__pycache__" in path.parts
            if path.is_file() and not cached and (path.suffix != ".py" or path.name == "task.py"):
                build_data["force_include"][str(path)] = f"tl_sparsify/_tasks/{path.relative_to(folder).as_posix()}"
