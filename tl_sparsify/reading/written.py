"""What readers are told was written into the stream before them, and each reader's sum of it by its own shares.

Reader ``r`` takes ``sum_u share[r, u] w_u`` over the writers before it, and a later one takes more of the same. Here
nothing is laid side by side for that: the sum is taken part by part (the heads of a layer, an MLP). Nor does each
reader hand a gradient to every writer: it notes the gradient ``g_r`` that it got, and a part's writers, once all that
comes after them has noted its own, take ``sum_r share[r, u] g_r`` in one product. So time grows with readers plus
writers times layers, memory with readers plus writers, and neither with edges times the width.

Tokens keep the order. Each part's is made from the one before, and a reader takes the last before it, so that the
backward pass comes to a part after all who read it. A token's gradient is how many readers have noted something in this
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.reading.heard import Heard

Part = Float[Tensor, "batch pos _ d_model"]


@dataclass(frozen=True)
class _Note:
    """The gradients that some readers got, with their shares, and how many parts they had read; of one
    that came alone also its row among these."""

    parts: int
    slopes: Float[Tensor, "readers batch pos d_model"]
    share: Float[Tensor, "*batch readers writers"]
    row: int | None = None


@dataclass
class _Notes:
    """Of one forward pass how many writers there are up to each part (``starts``), and how many readers come alone
    (``rows``); of a backward pass what all readers have noted, by number: what those noted that come alone lies
    together. No tensor of the forward pass: the graph keeps this, and this must not keep the graph."""

    starts: list[int] = field(default_factory=lambda: [0])
    rows: int = 0
    by_reader: dict[int, _Note] = field(default_factory=dict)
    block: Float[Tensor, "rows batch pos d_model"] | None = None

    def add(self, number: int, row: int, note: _Note) -> None:
        """Keep it, among those of readers that come alone at their row, unless its gradient may be asked for."""
        if len(note.slopes) == 1 and not torch.is_grad_enabled():
            if self.block is None:
                self.block = note.slopes.new_empty(self.rows, *note.slopes.shape[1:])
            note = _Note(note.parts, self.block[row : row + 1].copy_(note.slopes), note.share, row)
        self.by_reader.pop(number, None)  # of an earlier backward pass: the newest come last
        self.by_reader[number] = note

    def after(self, part: int, many: int) -> list[_Note]:
        """What the ``many`` who read this part noted last; those who came alone as one, where their rows follow."""
        found = [note for note in self.by_reader.values() if note.parts > part]
        found = found[len(found) - many :]
        alone = sorted((note for note in found if note.row is not None), key=lambda note: note.row or 0)
        if self.block is None or not alone or torch.is_grad_enabled():
            return found
        rows = [note.row or 0 for note in alone]
        if rows != list(range(rows[0], rows[0] + len(rows))):
            return found
        shares = [note.share.narrow(-1, 0, self.starts[part + 1]).to(self.block) for note in alone]
        if any(share.ndim == 3 for share in shares):
            shares = [share.expand(self.block.shape[1], -1, -1) for share in shares]
        share = torch.cat(shares, -2)
        together = _Note(part + 1, self.block[rows[0] : rows[-1] + 1], share)
        return [together, *(note for note in found if note.row is None)]


@dataclass
class Ledger:
    """Of one forward pass: a token for each part, how many have read, and what they note on the way back."""

    tokens: list[Float[Tensor, ""] | None] = field(default_factory=list)
    readers: int = 0
    notes: _Notes = field(default_factory=_Notes)

    def token(self, parts: tuple[Part, ...]) -> Float[Tensor, ""] | None:
        """That of the last of these parts; ``None`` where none of them has a gradient."""
        for number in range(len(self.tokens), len(parts)):
            part, last = parts[number], self.tokens[-1] if self.tokens else None
            made = last
            if part.requires_grad and torch.is_grad_enabled():
                made = _Write.apply(part, last, self.notes, number)
            self.tokens.append(made)
            self.notes.starts.append(self.notes.starts[-1] + part.shape[2])
        return self.tokens[len(parts) - 1]


@dataclass(frozen=True)
class Written:
    """What a reader's hook is told: its name, and what has been written into the stream before it; ``removed``: by how
    much earlier hooks have changed any share of that; ``heard``: what it may give back instead of copies."""

    name: str
    parts: tuple[Part, ...]
    ledgers: dict[int, Ledger]
    removed: list[Callable[[Tensor], Tensor | None]]
    heard: Heard | None = None

    def sums(
        self, share: Float[Tensor, "*batch readers writers"], like: Float[Tensor, "..."], term: int, numbers: list[int]
    ) -> Float[Tensor, "readers batch pos d_model"]:
        """Each reader's sum of what was written, by its own shares, of the parts of these numbers, which are those of
        one term so far."""
        ledger, parts = self.ledgers.setdefault(term, Ledger()), tuple(self.parts[number] for number in numbers)
        token, place = ledger.token(parts), (ledger.readers, ledger.notes.rows)
        ledger.readers += 1
        ledger.notes.rows += share.shape[-2] == 1
        return _Read.apply(share, token, ledger.notes, place, like.new_empty(0), *parts)


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _by_writer(part: Part, like: Tensor) -> Float[Tensor, "writers batch entries"]:
    """Of no less than single precision: sums are taken one part after the other."""
    return part.to(like.device, _wide(like)).permute(2, 0, 1, 3).flatten(2)


class _Read(torch.autograd.Function):
    """Sums of parts by shares. The parts' gradients are noted, for their writers to take."""

    @staticmethod
    def forward(
        ctx: Any,
        share: Tensor,
        token: Tensor | None,
        notes: _Notes,
        place: tuple[int, int],
        like: Tensor,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(share, *parts)
        ctx.notes, ctx.place = notes, place
        batch, pos, _, width = parts[0].shape
        wide = share.to(_wide(like))
        total = wide.new_zeros(share.shape[-2], batch, pos * width)
        for part, start in zip(parts, notes.starts, strict=False):
            x, some = _by_writer(part, like), wide[..., start : start + part.shape[2]]
            if share.ndim == 2:
                total.flatten(1).addmm_(some, x.flatten(1))
            else:
                total.transpose(0, 1).baddbmm_(some, x.transpose(0, 1))
        return total.to(like.dtype).view(-1, batch, pos, width)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        share, *parts = ctx.saved_tensors
        (slope,) = slopes
        if ctx.needs_input_grad[1]:
            ctx.notes.add(*ctx.place, _Note(len(parts), slope, share))
        found = None
        if ctx.needs_input_grad[0]:
            own = slope.to(_wide(slope)).flatten(2)
            xs = [_by_writer(part, own) for part in parts]
            if share.ndim == 2:
                products = [own.flatten(1) @ x.flatten(1).T for x in xs]
            else:
                products = [torch.bmm(own.transpose(0, 1), x.permute(1, 2, 0)) for x in xs]
            found = torch.cat(products, -1).to(share.dtype)
        one = torch.ones((), device="cpu") if ctx.needs_input_grad[1] else None
        return found, one, None, None, None, *(None for _ in parts)


class _Write(torch.autograd.Function):
    """The token of a part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, last: Tensor | None, notes: _Notes, number: int) -> Tensor:
        ctx.notes, ctx.number, ctx.earliest = notes, number, last is None
        ctx.like, ctx.shape = part.new_empty(0), part.shape
        return torch.ones((), device="cpu")

    @staticmethod
    def backward(ctx: Any, *noted: Any) -> Any:
        notes: _Notes = ctx.notes
        mine = slice(notes.starts[ctx.number], notes.starts[ctx.number + 1])
        made: Any = None
        for note in notes.after(ctx.number, int(noted[0])):
            share, slopes = note.share[..., mine].to(note.slopes), note.slopes.flatten(2)
            if share.ndim == 2:
                part = (share.T @ slopes.flatten(1)).view(-1, *slopes.shape[1:])
            else:  # writers first in memory too, as their values are: or the way back to them makes a copy
                part = slopes.new_empty(share.shape[2], *slopes.shape[1:])
                part.transpose(0, 1).baddbmm_(share.mT, slopes.transpose(0, 1), beta=0)
            part = part.to(ctx.like.device)
            made = part if made is None else made + part
        if ctx.earliest:
            notes.by_reader.clear()
        part = made.unflatten(2, (ctx.shape[1], ctx.shape[3])).permute(1, 2, 0, 3)
        return part.to(ctx.like), None if ctx.earliest else noted[0], None, None
