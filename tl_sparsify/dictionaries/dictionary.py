"""A dictionary: what encodes an activation into sparse features, and decodes them (a sparse autoencoder or, with
another hook point to encode, a transcoder)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked_fields
from tl_sparsify._internal.encoders import Encoder

Activation = Literal["relu", "jumprelu", "topk"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "jumprelu", "topk")


@checked_fields
@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder or transcoder: ``encode(x) = act((x - b_dec) W_enc + b_enc)`` (``b_dec`` with ``centred``
    only), ``decode(a) = a W_dec + b_dec``. Names and shapes are SAELens's.

    Attributes:
        W_enc: ``[d_in, features]``.
        W_dec: ``[features, d_out]``; its rows are what features write.
        b_enc: ``[features]``.
        b_dec: ``[d_out]``.
        activation: ``relu``; ``jumprelu``: 0 up to ``threshold``; ``topk``: the ``k`` largest at each position.
        threshold: ``[features]``, of ``jumprelu``.
        k: of ``topk``.
        centred: whether ``b_dec`` is taken off before encoding.
        hook: the hook point that is decoded: where features are units.
        source: the hook point that is encoded, where it is another (a transcoder's).

    Raises:
        ValueError: shapes that do not fit, numbers that are NaN or infinite, a threshold or ``k`` that the activation
            does not have or lacks.

    Example:
        >>> axes, zeros = torch.eye(64), torch.zeros(64)
        >>> dictionary = tls.Dictionary(axes, axes, zeros, zeros, activation="topk", k=8)
        >>> dictionary, int((dictionary.encode(torch.ones(2, 64)) > 0).sum())
        (Dictionary(64 topk features of width 64), 16)
    """

    W_enc: Float[Tensor, "d_in features"]
    W_dec: Float[Tensor, "features d_out"]
    b_enc: Float[Tensor, "features"]
    b_dec: Float[Tensor, "d_out"]
    activation: Activation = "relu"
    threshold: Float[Tensor, "features"] | None = None
    k: int | None = None
    centred: bool = False
    hook: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            raise ValueError("W_enc and W_dec are matrices: [d_in, features] and [features, d_out]")
        (d_in, n), d_out = self.W_enc.shape, self.W_dec.shape[1]
        wanted = {"W_dec": (n, d_out), "b_enc": (n,), "b_dec": (d_out,), "threshold": (n,)}
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; W_enc has {n} features, so it must be {shape}"
                )
        for name in ("W_enc", *wanted):
            tensor = getattr(self, name)
            if tensor is not None and not (tensor.is_floating_point() and bool(torch.isfinite(tensor).all())):
                raise ValueError(f"{name} holds NaN, infinite or whole numbers: a dictionary is made of finite reals")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; it is one of {', '.join(ACTIVATIONS)}")
        if (self.threshold is not None) != (self.activation == "jumprelu"):
            raise ValueError(f"threshold is for jumprelu, which needs it; activation is {self.activation!r}")
        if (self.k is not None) != (self.activation == "topk") or (self.k is not None and not 1 <= self.k <= n):
            raise ValueError(f"k is {self.k}; topk needs one from 1 to {n}, and {self.activation!r} is the activation")
        if self.centred and d_in != d_out:
            raise ValueError(f"centred takes b_dec off the input, which has width {d_in}, and b_dec {d_out}")
        if self.source is None and d_in != d_out:
            raise ValueError(f"source is not given, and what is encoded has width {d_in}, what is decoded {d_out}")

    def encode(self, x: Float[Tensor, "*place d_in"]) -> Float[Tensor, "*place features"]:
        """The features' activations, each 0 or positive."""
        return self.encoder().encode(x)

    def decode(self, features: Float[Tensor, "*place features"]) -> Float[Tensor, "*place d_out"]:
        """What features write together."""
        return features @ self.W_dec.to(features) + self.b_dec.to(features)

    def encoder(self, index: Int[Tensor, "some"] | None = None) -> Encoder:
        """What reads all features or, given ``index``, some: the others are not held, but for those of ``topk``, which
        take one another's place."""
        center = self.b_dec if self.centred else None
        if index is None or self.k is not None:
            return Encoder(self.W_enc, self.b_enc, self.b_dec, center, self.threshold, self.k, index)
        threshold = None if self.threshold is None else self.threshold[index]
        return Encoder(self.W_enc[:, index], self.b_enc[index], self.b_dec, center, threshold)

    def __len__(self) -> int:
        return self.W_enc.shape[1]

    def __repr__(self) -> str:
        (d_in, n), d_out = self.W_enc.shape, self.W_dec.shape[1]
        width = f"width {d_in}" if self.source is None else f"width {d_in} to {d_out}"
        at = f" at {self.hook}" if self.hook else ""
        return f"Dictionary({n:,} {self.activation} features of {width}{at})"
