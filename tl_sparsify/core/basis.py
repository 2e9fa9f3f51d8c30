"""Bases of directions from activations. TransformerLens has class means, probes and DAS (``tools.analysis``); all of
them go into :func:`tl_sparsify.directions`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import batches_of, check_model, output, valid_positions
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units


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
    count, total, square, dtype = 0, torch.zeros(()), torch.zeros(()), torch.float32
    with torch.no_grad():
        for _, batch in batches_of(model, examples, batch_size):
            with recorded(model, whole) as recording:
                output(model, batch)
            found = recording.activations[hook]
            found = found if found.ndim == 3 else found[:, None]
            valid = valid_positions(model, batch)
            valid = valid if valid.shape == found.shape[:2] else torch.ones(found.shape[:2], dtype=torch.bool)
            rows = found[valid.to(found.device)].double()
            total, square = rows.sum(0) + total.to(rows), rows.T @ rows + square.to(rows)
            count, dtype = count + len(rows), found.dtype
    if not 0 < rank <= len(total):
        raise ValueError(f"rank is {rank}; {hook} has {len(total)} directions")
    mean = total / count
    vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean)).eigenvectors.flip(1)[:, :rank]
    # An eigenvector's sign is arbitrary, and differs between machines.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(torch.float64 if dtype == torch.float64 else torch.float32)
