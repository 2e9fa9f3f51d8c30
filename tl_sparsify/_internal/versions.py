"""Versions: what results were made with, for the files that say so."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("tl-sparsify", "transformer-lens", "torch", "numpy", "pandas", "matplotlib")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on, and the kind of machine."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a folder that is not installed
            found[name] = "not installed"
    return found
