"""Importing a module as soon as another package is there, without importing that package."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def import_after(awaited: str, module: str) -> None:
    """Import ``module`` right after ``awaited`` has been imported: now, or whenever somebody does."""
    if awaited in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Waiting(awaited, module))


class _Waiting(MetaPathFinder):
    """Finds nothing itself, but lets the others find the awaited module, and follows its loading."""

    def __init__(self, awaited: str, module: str) -> None:
        self.awaited, self.module, self.asking = awaited, module, False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.awaited or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self)
        return spec


class _Followed(Loader):
    """A loader after which a module is imported. Who only asks whether a package is there never gets to load it."""

    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.waiting in sys.meta_path:
            sys.meta_path.remove(self.waiting)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        import_module(self.waiting.module)
