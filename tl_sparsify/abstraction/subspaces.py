"""The dormant half of a subspace: is what a patch of directions does done by what the network's readers see?

Of a direction only the part in the row space of the weights that read the activation reaches anything; the rest is
null. A direction whose null part varies with the variable, and whose visible part does not but is read, moves the
network along a pathway that is dormant on real inputs: the patch works, and neither part alone does (Makelov, Lange and
Nanda, *Is This the Subspace You Are Looking For?*, 2023, arXiv 2311.17030).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.certificates import confidence_sequence
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import TestedModel, answers, right_answers
from tl_sparsify.core.basis import directions
from tl_sparsify.core.forward import check_model
from tl_sparsify.core.units import Model, Unit

_NULL = 1e-5  # of the greatest singular value, or of a direction's length: what is smaller is rounding


@dataclass(frozen=True)
class SubspacePart:
    """What patching one part of a variable's directions does.

    Attributes:
        variable: the variable.
        part: ``whole``, ``visible`` (in the readers' row space) or ``null``.
        rank: its directions; 0 where the subspace has no such part, and nothing is patched.
        share: of the subspace's squared length, the fraction that lies in this part.
        accuracy: interchange accuracy over the pairs whose answer should change and that the model answers right.
        lower, upper: a confidence sequence for it.
        pairs: how many these are.

    Example:
        >>> at = tls.directions(model, "blocks.0.mlp.hook_post", torch.eye(256)[:, :2]).at(4)
        >>> split = tls.split_subspace(model, task.causal_model, tls.Alignment({"left": list(at)}), pairs)
        >>> split.part("left", "visible").rank
        2
    """

    variable: str
    part: str
    rank: int
    share: float
    accuracy: float
    lower: float
    upper: float
    pairs: int


@dataclass(frozen=True)
class SubspaceSplit:
    """The patches of each variable's subspace and of its parts.

    Example:
        >>> at = tls.directions(model, "blocks.0.mlp.hook_post", torch.eye(256)[:, :2]).at(4)
        >>> split = tls.split_subspace(model, task.causal_model, tls.Alignment({"left": list(at)}), pairs)
        >>> split.dormant("left")
        False
    """

    parts: tuple[SubspacePart, ...]

    def part(self, variable: str, part: str) -> SubspacePart:
        """One line; a ``KeyError`` names what there is."""
        for row in self.parts:
            if (row.variable, row.part) == (variable, part):
                return row
        raise KeyError(f"no {part!r} part of {variable!r}; there is {[(r.variable, r.part) for r in self.parts]}")

    def dormant(self, variable: str) -> bool:
        """Whether the whole patch certainly does more than its visible part: an effect of a dormant pathway."""
        return self.part(variable, "whole").lower > self.part(variable, "visible").upper

    def to_frame(self) -> pd.DataFrame:
        """One row a variable and part; the columns are :class:`SubspacePart`'s attributes."""
        return pd.DataFrame([asdict(row) for row in self.parts])


@checked
def split_subspace(
    model: Model,
    causal_model: CausalModel,
    alignment: Alignment,
    pairs: Pairs,
    *,
    readers: Mapping[str, Float[Tensor, "width outputs"]] | None = None,
    level: float = 0.05,
    batch_size: int | None = None,
) -> SubspaceSplit:
    """Interchange each variable's subspace whole, its part that the readers' weights see, and its null part.

    Args:
        alignment: directions of one hook point for each variable (:func:`tl_sparsify.directions`).
        readers: for each hook point what is read of it, a column for each output. Where not given: an MLP's output
            weights for its neurons; for the residual stream the weights of all later heads and MLPs and of the
            unembedding, together, without their norms. In most models these see the whole stream, which then has no
            null part; a single reader given here may not.

    Forward passes over the pairs: three, and three for each variable.

    Raises:
        ValueError: a model in training mode, a variable that the causal model lacks or that no direction is aligned
            with, a hook point whose readers are not known.

    Example:
        >>> at = tls.directions(model, "blocks.0.mlp.hook_post", torch.eye(256)[:, :2]).at(4)
        >>> split = tls.split_subspace(model, task.causal_model, tls.Alignment({"left": list(at)}), pairs)
        >>> split.to_frame()["part"].tolist()
        ['whole', 'visible', 'null']
    """
    check_model(model)
    subject = TestedModel("split", model)
    [plain], [source] = (answers(subject, side, batch_size=batch_size) for side in (pairs.base, pairs.source))
    right = (plain == right_answers(pairs.base)) & (source == right_answers(pairs.source))
    found: list[SubspacePart] = []
    for variable, units in alignment.units.items():
        if variable not in causal_model.variables:
            raise ValueError(f"alignment names {variable!r}; the causal model has {', '.join(causal_model.variables)}")
        columns = _columns(variable, units)
        visible, null = _parts(columns, _seen(model, units[0].site.hook, readers or {}))
        some = {"whole": columns, "visible": visible, "null": null}
        patched = {name: _patch(model, units[0], part) for name, part in some.items()}
        swaps = [[(patch, pairs.source)] if patch else [] for patch in patched.values()]
        given = answers(subject, pairs.base, swaps, batch_size=batch_size)
        expected = pairs.expected(causal_model, (variable,))
        counts = right & (expected != right_answers(pairs.base))
        for (name, part), answer in zip(some.items(), given, strict=True):
            hits = (answer == expected)[counts].double()
            lower, upper = confidence_sequence(hits, level=level)
            bounds = (float(lower[-1]), float(upper[-1])) if len(hits) else (0.0, 1.0)
            share = float(part.square().sum() / columns.square().sum())
            rank = len(patched[name])
            found.append(SubspacePart(variable, name, rank, share, float(hits.mean()), *bounds, len(hits)))
    return SubspaceSplit(tuple(found))


def _columns(variable: str, units: Sequence[Unit]) -> Float[Tensor, "width r"]:
    """An orthonormal basis of the aligned directions."""
    sites = {unit.site for unit in units}
    site = next(iter(sites))
    if len(sites) != 1 or site.kind != "direction" or site.basis is None:
        raise ValueError(f"{variable!r} is not aligned with directions of one hook point: tls.directions makes them")
    chosen = site.basis[:, [unit.index for unit in units]].detach().double().cpu()
    return torch.linalg.qr(chosen).Q


def _parts(
    columns: Float[Tensor, "width r"], seen: Float[Tensor, "width outputs"]
) -> tuple[Float[Tensor, "width r"], Float[Tensor, "width r"]]:
    """The directions projected on the span of what is read, and what is left of them."""
    if len(seen) != len(columns):
        raise ValueError(f"readers have {len(seen)} rows, the directions {len(columns)}: [width, outputs]")
    u, size, _ = torch.linalg.svd(seen.detach().double().cpu(), full_matrices=False)
    span = u[:, size > _NULL * size.max()]
    visible = span @ (span.T @ columns)
    return visible, columns - visible


def _patch(model: Any, like: Unit, part: Float[Tensor, "width r"]) -> list[Unit]:
    """Orthonormal directions that span a part, at the same positions; none where it is nothing."""
    u, size, _ = torch.linalg.svd(part, full_matrices=False)
    basis = u[:, size > _NULL]
    if not basis.shape[1]:
        return []
    return [unit.at(like.site.positions) for unit in directions(model, like.site.hook, basis.float())]


def _seen(model: Any, hook: str, readers: Mapping[str, Tensor]) -> Float[Tensor, "width outputs"]:
    """What is read of a hook point, a column for each output."""
    if hook in readers:
        return readers[hook]
    parts = hook.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not hasattr(model, "blocks"):
        raise ValueError(f"what reads {hook} is not known: give readers={{{hook!r}: a matrix [width, outputs]}}")
    layer, block = int(parts[1]), model.blocks[int(parts[1])]
    if hook.endswith("mlp.hook_post"):
        return block.mlp.W_out
    if parts[2] not in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
        raise ValueError(f"what reads {hook} is not known: give readers={{{hook!r}: a matrix [width, outputs]}}")
    read = [model.W_U]
    for number in range(layer, len(model.blocks)):
        here, late = model.blocks[number], number > layer or parts[2] == "hook_resid_pre"
        if late and hasattr(here, "attn"):
            read += [w.movedim(0, 1).flatten(1) for w in (here.attn.W_Q, here.attn.W_K, here.attn.W_V)]
        if (late or parts[2] == "hook_resid_mid") and hasattr(here, "mlp"):
            read += [w for w in (here.mlp.W_in, getattr(here.mlp, "W_gate", None)) if w is not None]
    return torch.cat([w.detach().double().cpu() for w in read], 1)
