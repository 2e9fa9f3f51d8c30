"""One kind of file for everything: a safetensors file whose header carries a json description and a checksum.

Files are written next to their target and renamed, so an interruption never leaves half a file. The name that they are
written under says which process writes, on which machine: what belongs to none that is alive is of nobody any more.
Nothing pickled is read or written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tl_sparsify._internal.ranks import has_own_files, on_main

_PACKAGES = ("tl-sparsify", "transformer-lens", "torch", "numpy", "pandas", "matplotlib")
_KEY = "tl_sparsify"  # one metadata key only: the order of several is not deterministic in safetensors
_NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})\.(?P<kind>part|old)")
_MINE: set[str] = set()
"""Of the names with this process's number those that it gave: an earlier process may have had its number."""


def digest(kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over kind and header, and names, dtypes, shapes and bytes of ``tensors``, in order of name."""
    total = hashlib.sha256(json.dumps([kind, header], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` next to ``path`` and rename it: complete, or not at all. What a process that was killed left of
    an earlier attempt goes. Of several processes the first one writes, and the others wait until the file is there."""
    if has_own_files():
        return _write(path, content)
    on_main(lambda: _write(path, content), f"writing {path.name}")


def check_folder(path: Path) -> None:
    """Refuse a file in a folder that is not there.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}: make it first")


def _write(path: Path, content: bytes) -> None:
    check_folder(path)
    part = beside(path)
    sweep(path.parent, path.name)
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """:func:`write_bytes` for text (UTF-8)."""
    write_bytes(path, content.encode())


def write_tensors(path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a ``kind`` of object: its json ``header`` and its ``tensors``, with version and checksum."""
    # clones, because one tensor may stand under two names, which the format does not hold
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = json.loads(json.dumps(dict(header)))  # as it will be read: keys are strings, tuples lists
    description = {"kind": kind, "version": 1, "sha256": digest(kind, header, tensors), "header": header}
    write_bytes(path, save(tensors, metadata={_KEY: json.dumps(description, sort_keys=True)}))


@contextmanager
def reading(path: Path, what: str, mend: str = "Save it again.") -> Iterator[None]:
    """What goes wrong while the content of a file is taken in: a refusal that names the file.

    Raises:
        ValueError: any exception in the block but one that already names the file, and what is no fault of a file's.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and type(error) is ValueError and str(path) in str(error):
            raise
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path} is damaged, or is no {what} ({said}). {mend}") from error


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_tensors` wrote. What it is gets asked before memory is taken for its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated, another kind of file, or a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:  # it holds all sizes against the file's own
            header, checksum = _described(path, kind, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, UnicodeDecodeError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}. Save it again.") from error
    if digest(kind, header, tensors) != checksum:
        raise ValueError(f"{path} is damaged: its checksum does not match its content. Save it again.")
    return header, tensors


def _described(path: Path, kind: str, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Header and checksum of a file of a ``kind``."""
    if _KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but was not written by tl_sparsify")
    try:
        description = json.loads(metadata[_KEY])
        found, version, checksum = description["kind"], description["version"], description["sha256"]
        header = dict(description["header"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header: {error!r}. Save it again.") from error
    if found != kind:
        raise ValueError(f"{path} holds a {found}, not a {kind}")
    if version != 1:
        raise ValueError(f"{path} has format version {version}; this tl_sparsify reads version 1: update it")
    return header, checksum


def versions() -> dict[str, str]:
    """What results were made with, for the files that say so: the versions of Python and of the packages that results
    depend on, and the kind of machine."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
            found[name] = "not installed"
    return found


def beside(path: Path, kind: str = "part") -> Path:
    """A new hidden name in the folder of ``path``, of this process alone."""
    token = secrets.token_hex(4)
    _MINE.add(token)
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{token}.{kind}")


def left_over(folder: Path, kind: str = "part", name: str | None = None) -> list[Path]:
    """What processes that are gone left in a folder of the names that :func:`beside` gives (for ``name`` alone, where
    it is given)."""
    found: list[Path] = []
    for path in folder.glob(f".*.{kind}"):
        match = _NAME.fullmatch(path.name)
        if match is not None and (name is None or match["name"] == name) and _gone(match):
            found.append(path)
    return sorted(found)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what :func:`left_over` finds of things that were never complete."""
    for path in left_over(folder, "part", name):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())


def _gone(match: re.Match[str]) -> bool:
    if match["host"] != _host():
        return False  # nothing is known of another machine's processes
    pid = int(match["pid"])
    if pid == os.getpid():
        return match["token"] not in _MINE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
