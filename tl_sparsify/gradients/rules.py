"""Rules: hooks that change what a backward pass does at norms, attention and MLPs, and never a forward pass.

At each place the activation ``y`` stays what it is, and its gradient goes to a *surrogate* instead, a tensor of
the same shape that is made of the same things and whose derivative is the wanted one.

A frozen norm is ``(x - mean) / s`` with ``s`` a constant; the surrogate of a pattern ``p`` at temperature ``T`` is
``T softmax(log p / T)``, which needs no attention scores (softmax knows nothing of a constant that is added to them).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.reading.norms import affine_of

Act = Callable[..., Tensor | None]
Rule = tuple[str, Act]
"""A hook point, and what is done there."""

_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")


class _Through(torch.autograd.Function):
    """The first tensor's values and the second one's gradient, also where its values are not finite."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, surrogate: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].to(ctx.dtype)


def _through(y: Float[Tensor, "*shape"], surrogate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return _Through.apply(y.detach(), surrogate)  # type: ignore[no-any-return]


def _plain(x: Tensor) -> bool:
    """Whether no gradient goes back through it."""
    return not (torch.is_grad_enabled() and x.requires_grad)


def norm_rules(model: Any) -> list[Rule]:
    """Every norm's scale is a constant; what it subtracts and its weights are as they are.

    Raises:
        ValueError: a norm without ``hook_scale`` and ``hook_normalized``, or (when the model runs) one whose output is
            not ``weight * normalized + bias``.
    """
    names = sorted({str(point.name) for name, point in model.hook_dict.items() if name.endswith(".hook_scale")})
    stems = [name.removesuffix(".hook_scale") for name in names]
    last = [("ln_final", getattr(model, "ln_final", None))]
    blocks = [
        (f"blocks.{i}.{name}", getattr(block, name, None)) for i, block in enumerate(model.blocks) for name in _NORMS
    ]
    for stem, norm in blocks + last:
        inner = getattr(norm, "original_component", norm)
        if isinstance(norm, torch.nn.Module) and not isinstance(inner, torch.nn.Identity) and stem not in stems:
            raise ValueError(_missing(f"{stem}.hook_scale", "a norm's scale cannot be frozen"))
    found: list[Rule] = []
    for stem in stems:
        seen: dict[str, Tensor] = {}
        for part in ("scale", "normalized"):
            found.append((f"{stem}.hook_{part}", partial(_note, seen, part)))
        found.append((f"{stem}.hook_out", partial(_frozen_norm, _reached(model, stem), seen)))
    return found


def _note(seen: dict[str, Tensor], name: str, x: Float[Tensor, "..."], hook: Any) -> None:
    if torch.is_grad_enabled():
        seen[name] = x


def _reached(model: Any, dotted: str) -> Any:
    return reduce(lambda at, part: at[int(part)] if part.isdigit() else getattr(at, part), dotted.split("."), model)


def _frozen_norm(norm: Any, seen: dict[str, Tensor], y: Float[Tensor, "..."], hook: Any) -> Float[Tensor, "..."] | None:
    scale, normalized = seen.pop("scale", None), seen.pop("normalized", None)
    if _plain(y):
        return None
    if scale is None or normalized is None:
        raise ValueError(_missing(str(hook.name).replace("hook_out", "hook_scale"), "it did not fire"))
    if not normalized.requires_grad:
        return None  # nothing but the norm's own weights is differentiated
    return _as_made(y, normalized * scale / scale.detach(), norm, str(hook.name))


def frozen_norm(
    norm: Any, x: Float[Tensor, "*shape d_model"], y: Float[Tensor, "*shape d_model"]
) -> Float[Tensor, "*shape d_model"]:
    """A norm's output ``y`` for ``x`` with its scale frozen, where no hook point says what that is: for a reader's copy
    of the stream."""
    if _plain(y) or isinstance(getattr(norm, "original_component", norm), torch.nn.Identity):
        return y
    x = x if x.dtype == torch.float64 else x.float()
    x = x if getattr(norm, "uses_rms_norm", False) else x - x.mean(-1, keepdim=True)
    weight, bias = affine_of(norm, norm)
    seen = (x if weight is None else x * weight).detach()
    flat = (y if bias is None else y - bias).detach()
    size = (seen * seen).sum(-1, keepdim=True)
    # flat is seen over the scale
    return _as_made(y, x * ((flat * seen).sum(-1, keepdim=True) / torch.where(size == 0, 1, size)), norm, "a reader")


def _as_made(
    y: Float[Tensor, "*shape"], normalized: Float[Tensor, "*shape"], norm: Any, where: str
) -> Float[Tensor, "*shape"]:
    weight, bias = affine_of(norm, norm)
    made = normalized if weight is None else normalized * weight
    made = made if bias is None else made + bias
    allowed = 1e-3 if y.dtype in (torch.float32, torch.float64) else 5e-2
    same = ((made - y).abs() <= allowed * (1 + y.abs())) | ~torch.isfinite(y)  # padding that sees nothing
    if not bool(same.all()):
        raise ValueError(
            f"the norm at {where} is not weight * normalized + bias, so that its scale cannot be frozen: "
            "use backward='true'"
        )
    return _through(y, made)


def attention_rules(model: Any, *, temperature: float, frozen: bool, halved: bool) -> list[Rule]:
    """Patterns are differentiated as softmax at a temperature, or are constants; of a product of two factors that both
    get a gradient (pattern and value, query and key) each gets half of it.

    Raises:
        ValueError: attention without ``hook_pattern`` and ``hook_z``, or (when the model runs) one that does not make
            its pattern there, or not by softmax alone.
    """
    found: list[Rule] = []
    for layer, _ in enumerate(model.blocks):
        z, pattern = (f"blocks.{layer}.attn.{name}" for name in ("hook_z", "hook_pattern"))
        if z not in model.hook_dict and f"blocks.{layer}.hook_attn_out" not in model.hook_dict:
            continue
        for name in (z, pattern):
            if name not in model.hook_dict:
                raise ValueError(_missing(name, "attention cannot be differentiated otherwise"))
        fired: dict[str, Tensor] = {}
        found.append((pattern, partial(_pattern, fired, temperature, frozen, halved)))
        found.append((z, partial(_mixed, fired, pattern, halved and not frozen)))
    return found


def _pattern(
    fired: dict[str, Tensor], temperature: float, frozen: bool, halved: bool, p: Float[Tensor, "..."], hook: Any
) -> Float[Tensor, "..."] | None:
    _note(fired, "pattern", p.detach(), hook)
    if _plain(p):
        return None
    if frozen:
        return p.detach()
    made = p
    if temperature != 1:
        total = p.detach().double().sum(-1)
        allowed = 1e-3 if p.dtype in (torch.float32, torch.float64) else 5e-2
        if bool(((total - 1).abs() > allowed).logical_and(total != 0).any()):
            raise ValueError(
                f"attention at {hook.name} does not sum to one (sinks, or no softmax), so that it has no temperature: "
                "use tls.backward.Rules(softmax=1.0, ...)"
            )
        made = _tempered(p if p.dtype == torch.float64 else p.float(), temperature)
    return None if made is p and not halved else _through(p, made / 2 if halved else made)


def _tempered(p: Float[Tensor, "*rows keys"], temperature: float) -> Float[Tensor, "*rows keys"]:
    """``T softmax(s / T)`` of the scores ``s`` that gave ``p = softmax(s)``; what is masked has no gradient."""
    there = p > torch.finfo(p.dtype).tiny
    empty = ~there.any(-1, keepdim=True)
    scores = torch.where(there, p, 1).log() / temperature
    return temperature * scores.masked_fill(~there & ~empty, -torch.inf).softmax(-1)


def _mixed(
    fired: dict[str, Tensor], pattern: str, halved: bool, z: Float[Tensor, "..."], hook: Any
) -> Float[Tensor, "..."] | None:
    there = fired.pop("pattern", None) is not None
    if _plain(z):
        return None
    if not there:
        raise ValueError(_missing(pattern, "it did not fire"))
    return _through(z, z / 2) if halved else None


def mlp_rules(model: Any, *, proportional: bool, halved: bool) -> list[Rule]:
    """An activation function is differentiated as the line through the origin and its value, ``act(x) / x`` (0 where
    ``x`` is); of a gate and what it gates each gets half of the product's gradient.

    Raises:
        ValueError: an MLP without ``hook_post`` and what goes into it, or (when the model runs) one in which these are
            not what they are called.
    """
    found: list[Rule] = []
    for layer, _ in enumerate(model.blocks):
        mlp, points = f"blocks.{layer}.mlp", model.hook_dict
        if f"blocks.{layer}.hook_mlp_out" not in points:
            continue
        gated = f"{mlp}.gate.hook_out" in points or bool(getattr(model.cfg, "gated_mlp", False))
        parts = {"gate": f"{mlp}.gate.hook_out"} if gated else {}
        parts |= {"in": f"{mlp}.in.hook_out", "post": f"{mlp}.hook_post"}
        for name in parts.values():
            if name not in points:
                raise ValueError(_missing(name, "its MLP cannot be differentiated otherwise"))
        if not (proportional or (gated and halved)):
            continue
        seen: dict[str, Tensor] = {}
        if proportional:
            found += [(parts[part], partial(_note, seen, part)) for part in parts if part != "post"]
        found.append((parts["post"], partial(_post, seen, gated, proportional, gated and halved)))
    return found


def _post(
    seen: dict[str, Tensor], gated: bool, proportional: bool, halved: bool, y: Float[Tensor, "..."], hook: Any
) -> Float[Tensor, "..."] | None:
    gate, x = seen.pop("gate", None), seen.pop("in", None)
    if _plain(y):
        return None
    made = y
    if proportional:
        # what multiplies the linear part is act(gate); where there is no gate this asks whether x made y at all
        factor = None
        if x is not None and x.requires_grad:
            (factor,) = torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)
        if x is None or factor is None or (gated and (gate is None or not gate.requires_grad)):
            raise ValueError(
                f"what {hook.name} is made of is not what hook_pre saw: with proportional activations no units can "
                "lie at hook_pre, and the MLP has to be act(x) or act(gate) * x; use backward='true'"
            )
        made = _line(x, y.detach()) if gate is None else _line(gate, factor) * x
    return None if made is y and not halved else _through(y, made / 2 if halved else made)


def _line(x: Float[Tensor, "..."], value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``x * (value / x)`` with the ratio a constant."""
    there = x.detach()
    return x * torch.where(there == 0, 0, value / torch.where(there == 0, 1, there))


def block_rules(model: Any, without: tuple[int, ...]) -> list[Rule]:
    """No gradient goes back through these blocks' attention and MLP, only past them.

    Raises:
        ValueError: a block that the model does not have.
    """
    for layer in without:
        if not 0 <= layer < len(model.blocks):
            raise ValueError(f"without is {without}; the model has blocks 0 to {len(model.blocks) - 1}")
    names = [f"blocks.{layer}.{part}" for layer in without for part in ("attn.hook_z", "hook_attn_out", "hook_mlp_out")]
    return [(name, _detached) for name in names if name in model.hook_dict]


def _detached(x: Float[Tensor, "..."], hook: Any) -> Float[Tensor, "..."] | None:
    return None if _plain(x) else x.detach()


def _missing(name: str, why: str) -> str:
    return f"hook point {name} is missing in this model ({why}): use backward='true', or rules without it"
