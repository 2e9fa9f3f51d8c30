"""Which features of a dictionary fire on some examples: the others are no units there, and need no memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify._internal.ranks import summed
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call, output, shared_batches, valid_positions
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units


def place_of(dictionary: Any, hook: str | None, source: str | None) -> tuple[str, str | None]:
    """The hook point where features are written, and the one that is encoded where it is another.

    Raises:
        ValueError: a dictionary that says no hook point, and none given; what does not encode and decode.
    """
    if not callable(getattr(dictionary, "encode", None)) or not callable(getattr(dictionary, "decode", None)):
        raise ValueError(
            f"dictionary is a {type(dictionary).__name__}; give a tls.Dictionary, tls.dictionaries.load(folder), or "
            "what has encode(x) and decode(features)"
        )
    written = hook or getattr(dictionary, "hook", None)
    if not isinstance(written, str):
        raise ValueError('hook is not given, and the dictionary names none: give hook="blocks.1.hook_resid_post", say')
    encoded = source or getattr(dictionary, "source", None)
    return written, None if encoded == written else encoded


@checked
def firing(
    model: Model,
    dictionary: Any,
    examples: Examples,
    *,
    hook: str | None = None,
    source: str | None = None,
    least: int = 1,
    batch_size: int | None = None,
) -> Bool[Tensor, "features"]:
    """Which features of a dictionary are active at ``least`` positions of the examples or more; padding and the
    beginning-of-sequence token do not count.

    Args:
        dictionary: a :class:`Dictionary`, or what has ``encode(x)`` and ``decode(features)``.
        hook, source: the hook points that are decoded and encoded, where the dictionary does not say it.

    One forward pass; memory is a number for each feature.

    Raises:
        ValueError: a model in training mode, a hook point that it lacks, activations of another width than the
            dictionary's.

    Example:
        >>> axes, zeros = torch.eye(64), torch.zeros(64)
        >>> dictionary = tls.Dictionary(axes, axes, zeros, zeros, hook="blocks.1.hook_resid_post")
        >>> tls.dictionaries.firing(model, dictionary, train).sum()
        tensor(64)
    """
    check_call(model, examples, batch_size=batch_size)
    check_count("least", least)
    written, encoded = place_of(dictionary, hook, source)
    whole = Units((Site(kind="residual", layer=0, hook=encoded or written, size=1),))

    def parts() -> Iterator[tuple[Tensor]]:
        for _, batch in shared_batches(model, examples, batch_size):
            with recorded(model, whole) as recording:
                output(model, batch)
            found = recording.activations[encoded or written]
            found = found if found.ndim == 3 else found[:, None]
            valid = valid_positions(model, batch)
            valid = valid if valid.shape == found.shape[:2] else torch.ones(found.shape[:2], dtype=torch.bool)
            active = encoded_by(dictionary, found[valid.to(found.device)], encoded or written) > 0
            yield (active.sum(0).double().cpu(),)

    with torch.no_grad():
        (counts,) = summed(parts(), len(examples))
    return counts >= least


def encoded_by(dictionary: Any, x: Float[Tensor, "rows width"], hook: str) -> Float[Tensor, "rows features"]:
    """What a dictionary makes of activations.

    Raises:
        ValueError: activations of another width.
    """
    weight = getattr(dictionary, "W_enc", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"the dictionary encodes activations of width {len(weight)}, those of {hook} have {x.shape[-1]}"
        )
    return dictionary.encode(x)


def chosen(which: Bool[Tensor, "features"] | None, features: int) -> Int[Tensor, "held"]:
    """The numbers of the features that are held.

    Raises:
        ValueError: a mask of another length, or of none.
    """
    if which is None:
        return torch.arange(features)
    if which.dtype != torch.bool or which.shape != (features,):
        raise ValueError(
            f"which has shape {tuple(which.shape)}; the dictionary has {features} features: give a mask of them"
        )
    if not bool(which.any()):
        raise ValueError("no feature of the dictionary fires on the examples: is it one of this model and hook point?")
    return which.nonzero().flatten().cpu()
