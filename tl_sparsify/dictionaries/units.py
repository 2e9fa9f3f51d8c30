"""Features of a dictionary as units.

With ``a = encode(x)`` and the error ``e = x - decode(a)``, the hook point holds ``decode(a) + e``. Removing features
sets their activations to constants ``c`` and leaves the error what it was:

    x + sum_f (1 - keep_f) (c_f - a_f) W_dec[f]

Keeping every feature is the model itself, bit for bit. The risk of a circuit of features therefore says what *they*
carry; what the dictionary does not reconstruct goes on as before, unless its error is made a unit too, and removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.memory import device_of, dtype_of
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units
from tl_sparsify.dictionaries.activity import chosen, firing, place_of
from tl_sparsify.dictionaries.dictionary import Dictionary

_TOGETHER = 1024  # features decoded at a time


@dataclass(frozen=True, eq=False)
class OwnEncoder:
    """The encoder of an object of the user's own, read at ``index``."""

    dictionary: Any
    offset: Float[Tensor, "out"]
    index: Int[Tensor, "units"]

    def encode(self, x: Float[Tensor, "*place width"]) -> Float[Tensor, "*place units"]:
        """The units' activations, in the precision of ``x``."""
        return self.dictionary.encode(x)[..., self.index.to(x.device)].to(x)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, OwnEncoder)
            and self.dictionary is other.dictionary
            and torch.equal(self.index, other.index)
        )

    def __hash__(self) -> int:
        return hash((id(self.dictionary), len(self.index)))


@checked
def features(
    model: Any,
    dictionary: Any,
    hook: str | None = None,
    *,
    examples: Examples | None = None,
    which: Bool[Tensor, "features"] | None = None,
    error: bool = False,
    source: str | None = None,
    layer: int | None = None,
    batch_size: int | None = None,
) -> Units:
    """Features of a sparse autoencoder or transcoder as units (kind ``feature``, ``L1F1234``): the value is the
    feature's activation at a position, and a change of it is written along the feature's decoder row. What the
    dictionary leaves over stays what it was, so that keeping every feature changes nothing.

    Args:
        dictionary: a :class:`Dictionary` (:func:`dictionaries.load`), or any object with ``encode(x) -> features`` and
            ``decode(features) -> x``, the second affine.
        hook: the hook point that is decoded, activations ``[batch, pos, width]``; the dictionary's where not given.
        examples: hold only the features that fire on these (:func:`dictionaries.firing`); one forward pass.
        which: hold only these instead; every feature where neither is given.
        error: make what the held features leave over one unit more (kind ``error``, ``L1ERR``, a vector ``width``),
            which can then be removed too; otherwise it is always kept.
        source: the hook point that is encoded, where it is another; the dictionary's where not given.
        layer: for names; the hook point's where not given.

    Under every intervention features are encoded in the activation as it arrives, before any of them is changed. They
    are no part of the weights and do not fold.

    Raises:
        ValueError: a hook point that the model lacks, a dictionary of another width, one whose ``decode`` is not
            affine, no feature that fires.

    Example:
        >>> axes, zeros = torch.eye(64), torch.zeros(64)
        >>> dictionary = tls.Dictionary(axes, axes, zeros, zeros, hook="blocks.1.hook_resid_post")
        >>> tls.features(model, dictionary, examples=train, error=True)
        Units(65: 64 features, 1 error)
    """
    written, encoded = place_of(dictionary, hook, source)
    for name in filter(None, (written, encoded)):
        if name not in model.hook_dict:
            raise ValueError(f"the model has no hook point {name!r}: this architecture does not compute it")
    if which is not None and examples is not None:
        raise ValueError("which and examples are both given: give one of them")
    if examples is not None:
        which = firing(model, dictionary, examples, hook=written, source=encoded, batch_size=batch_size)
    match = re.search(r"blocks\.(\d+)\.", written)
    number = layer if layer is not None else int(match[1]) if match else 0
    if isinstance(dictionary, Dictionary):
        index = chosen(which, len(dictionary))
        encoder, columns = dictionary.encoder(index), dictionary.W_dec[index].T.contiguous()
    else:
        encoder, columns = _own(model, dictionary, which)
        index = encoder.index
    _check_width(model, written, columns)
    place: dict[str, Any] = {"layer": number, "hook": written, "basis": columns, "encoder": encoder, "source": encoded}
    sites = [Site(kind="feature", size=len(index), numbers=tuple(index.tolist()), **place)]
    if error:
        sites.append(Site(kind="error", size=1, **place))
    return Units(tuple(sites))


def _check_width(model: Any, hook: str, columns: Float[Tensor, "width held"]) -> None:
    width = getattr(getattr(model, "cfg", None), "d_model", None)
    stream = hook.rsplit(".", 1)[-1] in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out")
    if stream and width is not None and len(columns) != width:
        raise ValueError(
            f"the dictionary decodes to width {len(columns)}, and {hook} has {width}: is it of this model?"
        )


def _own(
    model: Any, dictionary: Any, which: Bool[Tensor, "features"] | None
) -> tuple[OwnEncoder, Float[Tensor, "width held"]]:
    """Encoder, and what each held feature writes, of an object of the user's own.

    Raises:
        ValueError: no way to know how many features it has, or a ``decode`` that is not affine.
    """
    weight = getattr(dictionary, "W_dec", None)
    own = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else dtype_of(model)
    like = {"device": device_of(model), "dtype": own}
    with torch.no_grad():
        if which is None:
            if not isinstance(weight, Tensor):
                raise ValueError(
                    "examples are not given, and how many features the dictionary has is not known: give them"
                )
            which = torch.ones(len(weight), dtype=torch.bool)
        index = chosen(which, len(which))
        zeros = torch.zeros(1, len(which), **like)
        offset = dictionary.decode(zeros)[0]
        rows: list[Tensor] = []
        for part in index.split(_TOGETHER):
            one = zeros.repeat(len(part), 1)
            one[torch.arange(len(part)), part] = 1
            rows.append(dictionary.decode(one) - offset)
        decoder = torch.cat(rows)
        twice = zeros.index_fill(1, index.to(zeros.device), 2.0)
        expected = offset + 2 * decoder.sum(0)
        if not torch.allclose(
            dictionary.decode(twice)[0], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        ):
            raise ValueError("the dictionary's decode is not affine in the features: a feature has no one direction")
    offset, decoder = (part.detach().to(dtype_of(model)) for part in (offset, decoder))
    return OwnEncoder(dictionary, offset, index), decoder.T.contiguous()
