"""Directions as units, and bases of them from activations. TransformerLens has class means, probes and DAS
(``tools.analysis``); all of them go into :func:`tl_sparsify.directions`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.ranks import summed
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_model, output, shared_batches, valid_positions
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units, blocks_of

_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@checked
def pca(
    model: Model, examples: Examples, hook: str, rank: int, *, batch_size: int | None = None
) -> Float[Tensor, "width rank"]:
    """The orthonormal directions of largest variance of an activation, over examples and positions that are neither
    padding nor the beginning-of-sequence token; the largest first.

    One forward pass; memory is one ``[width, width]`` matrix in float64. Signs are such that each direction's largest
    entry is positive.

    Raises:
        ValueError: a model in training mode, a hook point that it lacks, or a rank that the width does not hold.

    Example:
        >>> basis = tls.basis.pca(model, train, "blocks.0.hook_resid_post", rank=3)
        >>> torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
        True
    """
    check_model(model)
    whole = Units((Site(kind="residual", layer=0, hook=hook, size=1),))
    dtype = torch.float32

    def parts() -> Iterator[tuple[Tensor, ...]]:
        nonlocal dtype
        for _, batch in shared_batches(model, examples, batch_size):
            with recorded(model, whole) as recording:
                output(model, batch)
            found = recording.activations[hook]
            found = found if found.ndim == 3 else found[:, None]
            valid = valid_positions(model, batch)
            valid = valid if valid.shape == found.shape[:2] else torch.ones(found.shape[:2], dtype=torch.bool)
            rows = found[valid.to(found.device)].double()
            dtype = found.dtype
            yield torch.tensor(len(rows)), rows.sum(0), rows.T @ rows

    with torch.no_grad():
        count, total, square = summed(parts(), len(examples))
    if not 0 < rank <= len(total):
        raise ValueError(f"rank is {rank}; {hook} has {len(total)} directions")
    mean = total / count
    vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean)).eigenvectors.flip(1)[:, :rank]
    # An eigenvector's sign is arbitrary, and differs between machines.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(torch.float64 if dtype == torch.float64 else torch.float32)


def directions(model: Any, hook: str, basis: Any) -> Units:
    """Directions of an activation as units: value a coordinate per position, removed by a constant coordinate.

    Args:
        hook: a hook point with activations ``[batch, pos, width]``, such as ``blocks.3.hook_resid_post``.
        basis: ``[width, r]``, a direction in each column: a matrix of the user's own, :func:`basis.pca`, what
            TransformerLens's ``mean_difference_basis``, ``probe_basis`` or ``fit_das`` return, or (transposed) the
            decoder of a sparse autoencoder. Columns may overlap.

    Raises:
        ValueError: a hook point that the model lacks, a basis that is not a matrix of finite numbers, or of another
            width than the residual stream has, for a hook point there.

    Example:
        >>> basis = tls.basis.pca(model, train, "blocks.0.hook_resid_post", rank=3)
        >>> tls.directions(model, "blocks.0.hook_resid_post", basis).names
        ('L0POST0', 'L0POST1', 'L0POST2')
    """
    if hook not in model.hook_dict:
        raise ValueError(f"the model has no hook point {hook!r}: this architecture does not compute it")
    match = re.search(r"blocks\.(\d+)\.", hook)
    columns = _matrix(basis)
    if hook.rsplit(".", 1)[-1] in _STREAM:
        _check_width(model, columns)
    layer = int(match[1]) if match else 0
    return Units((Site(kind="direction", layer=layer, hook=hook, size=columns.shape[1], basis=columns),))


def stream_directions(model: Any, basis: Any) -> Units:
    """Directions in *every* write to the residual stream (the embedding's, each attention's, each MLP's): value one
    coordinate for each write; removed by constant coordinates, which weight orthogonalisation does in the weights.

    Raises:
        ValueError: a model without residual stream, a basis that is not a matrix of finite numbers or of another width.

    Example:
        >>> tls.stream_directions(model, torch.eye(64)[:, :2]).names
        ('S0', 'S1')
    """
    columns = _matrix(basis)
    _check_width(model, columns)
    writes = [name for name in ("blocks.0.hook_resid_pre",) if name in model.hook_dict]
    for layer, _ in blocks_of(model):
        names = (f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out")
        writes += [name for name in names if name in model.hook_dict]
    if not writes or writes[0] != "blocks.0.hook_resid_pre":
        raise ValueError(f"{type(model).__name__} has no hook point blocks.0.hook_resid_pre: no stream to write to")
    site = Site(kind="stream", layer=0, hook=writes[0], size=columns.shape[1], basis=columns, also=tuple(writes[1:]))
    return Units((site,))


def _check_width(model: Any, basis: Float[Tensor, "width r"]) -> None:
    width = getattr(getattr(model, "cfg", None), "d_model", None)  # a hooked module of the user's own need not say
    if width is not None and len(basis) != width:
        raise ValueError(f"basis has {len(basis)} rows, and the model's residual stream {width}: [width, directions]")


def _matrix(basis: Any) -> Float[Tensor, "width r"]:
    """The columns of a matrix, of a learnt subspace or of the result that holds one."""
    found = getattr(basis, "subspace", basis)
    found = getattr(found, "basis", found)
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        raise ValueError(f"basis is {type(basis).__name__}; it must be a floating-point matrix [width, directions]")
    if not bool(torch.isfinite(found).all()):
        raise ValueError("basis holds NaN or infinite entries")
    return found.detach().clone()
