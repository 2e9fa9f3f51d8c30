"""Damage to files, drawn with a seed: cut anywhere, bits flipped, emptied, noise, headers that promise too much."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tl_sparsify._internal.files import read_tensors, write_tensors


def cuts(whole: bytes, number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """The file cut at drawn places, and at none of its last bytes alone."""
    draw = random.Random(seed)
    for place in sorted({0, 1, 7, 8, 9, len(whole) // 2, *(draw.randrange(len(whole) - 2) for _ in range(number))}):
        if place < len(whole) - 2:
            yield f"cut at {place}", whole[:place]


def flips(whole: bytes, number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(seed)
    for _ in range(number):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(broken)


def noise(seed: int) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(seed)
    for size in (1, 8, 100, 5000):
        yield f"{size} bytes of noise", draw.randbytes(size)
    yield "zeros", bytes(64)
    for size in (2**63 - 1, 2**63, 2**64 - 1, 10**15, 99_999_999):  # of a safetensors header
        yield f"a header of {size} bytes", size.to_bytes(8, "little") + b'{"x":{}}'
    promised = b'{"x":{"dtype":"F32","shape":[1000000000000000],"data_offsets":[0,4000000000000000]}}'
    yield "a tensor of 10**15 numbers", len(promised).to_bytes(8, "little") + promised


def damaged(whole: bytes, number: int, seed: int, *, flipped: bool = True) -> Iterator[tuple[str, bytes]]:
    """All of these: about ``number`` cuts, as many flipped bits (where a checksum sees them), noise."""
    yield from cuts(whole, number, seed)
    if flipped:
        yield from flips(whole, number, seed)
    yield from noise(seed)


@contextmanager
def rewritten(
    path: Path, kind: str, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
) -> Iterator[None]:
    """A file of this package with another header or other tensors and a checksum that fits: as an enemy makes it."""
    whole = path.read_bytes()
    header, tensors = read_tensors(path, kind)
    change(header, tensors)
    write_tensors(path, kind, header, tensors)
    try:
        yield
    finally:
        path.write_bytes(whole)


def accepted(read: Callable[[], Any], *names: str) -> str | None:
    """``None`` where a file is refused by one of its names; else what came of reading it."""
    try:
        found = read()
    except (ValueError, FileNotFoundError) as error:
        if type(error) in (ValueError, FileNotFoundError) and any(name in str(error) for name in names):
            return None
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return f"accepted: {found!r:.80}"
