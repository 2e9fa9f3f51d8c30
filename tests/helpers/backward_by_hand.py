"""A transformer's backward pass by hand, from the activations of a forward pass: no autograd but for the activation
functions, loops over heads and queries. What the rules change stands in one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tl_sparsify as tls

Function = Callable[[Tensor], Tensor]


def gradients(
    model: Any, tokens: Tensor, wanted: Tensor, rules: tls.backward.Rules, act: Function
) -> dict[str, Tensor]:
    """The gradients of ``(logits * wanted).sum()`` with respect to heads, neurons and the stream before each block."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    found: dict[str, Tensor] = {}
    g = _norm(model.ln_final, cache, "ln_final", wanted @ model.W_U.detach().T, rules)
    for layer in reversed(range(len(model.blocks))):
        block = model.blocks[layer]
        inside = layer not in rules.without
        if inside:
            back = _mlp(block.mlp, cache, f"blocks.{layer}.mlp", g, rules, act, found)
            g = g + _norm(block.ln2, cache, f"blocks.{layer}.ln2", back, rules)
            back = _attention(block.attn, cache, f"blocks.{layer}.attn", g, rules, found)
            g = g + _norm(block.ln1, cache, f"blocks.{layer}.ln1", back, rules)
        found[f"blocks.{layer}.hook_resid_pre"] = g
    return found


def _norm(norm: Any, cache: Any, name: str, g: Tensor, rules: tls.backward.Rules) -> Tensor:
    scale, n = cache[f"{name}.hook_scale"], cache[f"{name}.hook_normalized"]
    g = g * norm.weight.detach()
    if rules.norms == "true":  # the scale grows with the input, too
        g = g - n * (g * n).mean(-1, keepdim=True)
    if not norm.uses_rms_norm:
        g = g - g.mean(-1, keepdim=True)
    return g / scale


def _mlp(
    mlp: Any, cache: Any, name: str, g: Tensor, rules: tls.backward.Rules, act: Function, found: dict[str, Tensor]
) -> Tensor:
    g = g @ mlp.W_out.detach().T
    found[f"{name}.hook_post"] = g
    gate = cache[f"{name}.hook_pre"]
    x = gate.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(act(x).sum(), x)
    if rules.activations == "proportional":
        slope = act(gate) / gate
    if getattr(mlp, "gate", None) is None:
        return (g * slope) @ mlp.W_in.detach().T
    share = 0.5 if rules.products == "halved" else 1.0
    linear = cache[f"{name}.in.hook_out"]
    to_gate = (share * g * linear * slope) @ mlp.W_gate.detach().T
    return to_gate + (share * g * act(gate)) @ mlp.W_in.detach().T


def _attention(
    attn: Any, cache: Any, name: str, g: Tensor, rules: tls.backward.Rules, found: dict[str, Tensor]
) -> Tensor:
    p, v = cache[f"{name}.hook_pattern"], cache[f"{name}.hook_v"]
    heads, groups = p.shape[1], v.shape[2]
    q, k = (cache[f"{name}.{part}"] for part in _turned(cache, name))
    z = torch.stack([g @ attn.W_O[h].detach().T for h in range(heads)], 2)
    found[f"{name}.hook_z"] = z
    frozen = rules.patterns == "frozen"
    share = 0.5 if rules.products == "halved" else 1.0
    to_q, to_k, to_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b in range(len(p)):
        for h in range(heads):
            group = h // (heads // groups)
            for t in range(p.shape[2]):
                to_v[b, :, group] += (1.0 if frozen else share) * p[b, h, t, :, None] * z[b, t, h]
                if frozen:
                    continue
                to_p = share * v[b, :, group] @ z[b, t, h]
                seen = p[b, h, t] > 0
                soft = torch.zeros_like(p[b, h, t])
                soft[seen] = p[b, h, t][seen].pow(1 / rules.softmax)  # softmax(scores / T) in proportion
                soft = soft / soft.sum()
                to_scores = share * soft * (to_p - soft @ to_p) / q.shape[-1] ** 0.5
                to_q[b, t, h] += to_scores @ k[b, :, group]
                to_k[b, :, group] += to_scores[:, None] * q[b, t, h]
    if "rot" in _turned(cache, name)[0]:
        to_q, to_k = (_unturned(x, cache[f"{name}.hook_cos"], cache[f"{name}.hook_sin"]) for x in (to_q, to_k))
    back = torch.zeros_like(g)
    for grad, weight in ((to_q, attn.W_Q), (to_k, attn.W_K), (to_v, attn.W_V)):
        for h in range(grad.shape[2]):
            back += grad[:, :, h] @ weight[h].detach().T
    return back


def _turned(cache: Any, name: str) -> tuple[str, str]:
    return ("hook_rot_q", "hook_rot_k") if f"{name}.hook_rot_q" in cache else ("hook_q", "hook_k")


def _unturned(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Back through Llama's rotation, ``x cos + turn(x) sin`` with ``turn(a, b) = (-b, a)``."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = (g * sin).chunk(2, -1)
    return g * cos + torch.cat([second, -first], -1)
