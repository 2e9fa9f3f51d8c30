"""Folding: a reduction becomes a physically smaller TransformerLens model.

Removed heads leave the weights Q, K, V and O, removed neurons leave W_in, W_gate and W_out, and their constants go
into the biases, which are made where the architecture has none:

    b_O += sum_h W_O[h]' c[h]        b_out += sum_n c[n] W_out[n]

Neurons that are made of kept ones (affine replacements) go into the output rows of these. A removed attention or MLP
layer writes its constant. Directions that are removed from every write to the residual stream are projected out of
the embeddings and of all output projections, and their constants added once. What no weight can do stays as one
explicit step ``x + B (c - D' x)`` at its hook point: directions of the stream itself, and of what a norm writes
(Gemma's post-norms).

For every input the folded model computes what the ablated one does, up to the order in which floating-point numbers
are added (in float32 usually below 1e-4 on input tokens; at padding, which nothing reads, it may be more). It is a
bridge with the same hook points, which carry the kept units only, and ``folded.units`` says which original unit each of
its own is. Nothing is masked and no zeroed row stays.

Only constants fold that are the same for every example and position. Layer norms are not folded into weights unless
the model's already were; compatibility mode is enabled before folding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformers.pytorch_utils import Conv1D

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import NeighbourMap
from tl_sparsify.core.forward import check_model
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.folding.bridge import FoldedBridge, finish, first_stream, load_folded, save_folded
from tl_sparsify.folding.export import export_hf
from tl_sparsify.folding.narrow import Shares, kv_index, n_neurons, narrow_attention, narrow_mlp
from tl_sparsify.folding.rebuild import HUGGING_FACE, NATIVE
from tl_sparsify.folding.stream_writes import Step, fix_layer, step_writer, writers

__all__ = ["ARCHITECTURES", "FoldedBridge", "export_hf", "fold", "load_folded", "save_folded"]

ARCHITECTURES = (NATIVE, *HUGGING_FACE)
"""The architectures whose folding is tested (``model.cfg.architecture``)."""

_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_HOOKS = {
    "head": ("attn.hook_z",),
    "neuron": ("mlp.hook_post",),
    "attention": ("hook_attn_out",),
    "mlp": ("hook_mlp_out",),
    "direction": _STREAM,
    "stream": _STREAM,
}
"""Where units of a kind fold."""

_PARTS = {"head": "attn", "neuron": "mlp"}
_WHOLE = {"attention": "head", "mlp": "neuron"}
_MIXING = ("solu", "solu_ln")  # activations of a neuron that depend on the other neurons


def why_not(model: Any, reduction: Reduction) -> str | None:
    """Why :func:`fold` would refuse a reduction of a model, in a sentence; ``None`` where it folds. No model pass."""
    try:
        _foldable(model, reduction)
    except ValueError as error:
        return str(error)
    return None


@checked
def fold(model: Any, reduction: Reduction) -> FoldedBridge:
    """Compile a reduction into a smaller model. No model pass, or one of a single token where units are left alone at a
    beginning-of-sequence token; memory for the smaller model's weights.

    Args:
        model: the ``TransformerBridge`` that the reduction was made for; it is not changed.
        reduction: the circuit, the constants of its removed units, and what these are made of kept neurons.

    Returns:
        A bridge with the kept units only, on the same devices, in the same dtype, in evaluation mode. A folded model
        can be folded again.

    Raises:
        ValueError: an architecture or a feature that does not fold exactly; units that the model lacks, of a kind that
            does not fold, or at named positions; constants that are not finite; a reduction of another model; a model
            in training mode, or with hooks on it.

    Example:
        >>> small = tls.fold(model, reduction)
        >>> small.units["L0H1"]  # the original unit that this one is
        'L0H2'
        >>> with tls.intervened(model, tls.ablate(reduction)):
        ...     torch.allclose(small(test.tokens), model(test.tokens), atol=1e-4)
        True
    """
    with torch.inference_mode(False):  # parameters made under it could never be differentiated
        return _folded(model, reduction)


def _foldable(model: Any, reduction: Reduction) -> tuple[list[_Cut], list[_Change]]:
    """What folding does, where nothing speaks against it."""
    _check_model(model)
    check_fingerprint(model, reduction)
    if reduction.first_token == "any" and not bool(reduction.circuit.mask.all()):
        raise ValueError(
            "first_token is 'any': what removed units write at a first token that varies is no constant, and does not "
            "fold. Make the reduction with first_token='bos' or 'none'"
        )
    if reduction.values.paired:
        raise ValueError(
            "reduction sets removed units to their values on counterfactual inputs, which are no constants, and do not "
            "fold: give it constants, dataclasses.replace(reduction, values=tls.constants.mean(model, train, units))"
        )
    if any(site.kind == "edge" for site in reduction.units.sites):
        raise ValueError(
            "edges do not fold: what one reader gets from a writer and another does not is no property of the weights. "
            "Fold a circuit of heads() and mlps() or neurons()"
        )
    known, whole = getattr(model, "first_stream", None), bool(reduction.circuit.mask.all())
    if known is not None and not whole and reduction.first_token == "none":
        raise ValueError(
            "first_token is 'none', and the model's own folded units were left alone at a beginning-of-sequence token: "
            "make the reduction with first_token='bos'"
        )
    if _leaves_bos(model, reduction) and _looks_ahead(model):
        raise ValueError(
            "first_token is 'bos', and the model attends both ways: what units that are left alone at a "
            "beginning-of-sequence token write there hangs on what comes after it, is no constant, and does not fold. "
            "Make the reduction with first_token='none'"
        )
    cuts, changes = _plan(model, reduction)
    _check_weights(model, cuts, changes)
    return cuts, changes


def _folded(model: Any, reduction: Reduction) -> FoldedBridge:
    cuts, changes = _foldable(model, reduction)
    replaced = {id(p): p for cut in cuts for module in _projections(model, cut).values() for p in module.parameters()}
    folded = copy.deepcopy(model, replaced | _left_behind(model))  # does not copy what is replaced below
    folded.__class__ = FoldedBridge
    for cut in cuts:
        kept = cut.keep.nonzero().flatten()
        block = folded.blocks[cut.layer]
        if cut.kind == "head":
            narrow_attention(block.attn, kept, cut.constants)
        else:
            narrow_mlp(block.mlp, kept, None if cut.constants is None else cut.constants[:, 0], cut.shares)
    for change in changes:
        point = folded.hook_dict[change.hook]
        if isinstance(change.to, Step):
            step_writer(folded, point, change.to)
        else:
            fix_layer(folded, point, change.to)
    folded.units = _composed(model, cuts)
    folded.origin = model.origin if isinstance(model, FoldedBridge) else reduction.fingerprint
    folded.first_stream = _first_stream(model, reduction)
    finish(folded)
    return folded


def _leaves_bos(model: TransformerBridge, reduction: Reduction) -> bool:
    """Whether removed units are left alone at a beginning-of-sequence token."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return bos is not None and reduction.first_token == "bos" and not bool(reduction.circuit.mask.all())


def _looks_ahead(model: TransformerBridge) -> bool:
    """Whether a position sees those after it."""
    config: Any = getattr(model.original_model, "config", None)
    return model.cfg.attention_dir != "causal" or bool(getattr(config, "use_bidirectional_attention", False))


def _first_stream(model: TransformerBridge, reduction: Reduction) -> Float[Tensor, "layers_and_one d_model"] | None:
    """The residual stream before the first block and after each, at a beginning-of-sequence token. There removed units
    are left alone, and in a causal model nothing else is seen: so it is a constant, whatever comes after."""
    known: Float[Tensor, "layers_and_one d_model"] | None = getattr(model, "first_stream", None)
    return first_stream(model) if known is None and _leaves_bos(model, reduction) else known


@dataclass(frozen=True)
class _Cut:
    """What leaves the heads or neurons of one layer: the kept units, everybody's constants, and what the others are
    made of kept ones."""

    kind: str
    layer: int
    keep: Bool[Tensor, "units"]
    constants: Float[Tensor, "units width"] | None
    shares: Shares | None = None


@dataclass(frozen=True)
class _Change:
    """What becomes of the activation at a hook point in the residual stream: a constant, or itself after a step."""

    hook: str
    to: Step | Float[Tensor, "width"]


def _plan(model: TransformerBridge, reduction: Reduction) -> tuple[list[_Cut], list[_Change]]:
    """What folding does, checked against the model: first the cuts, in any order, then the changes, in theirs."""
    cuts: dict[tuple[str, int], _Cut] = {}
    changes: list[_Change] = []
    hooks = model.hook_dict
    masks = reduction.units.split(reduction.circuit.mask)
    mixings = reduction.mixing or (None,) * len(masks)
    whole: list[_Cut] = []
    parts = zip(reduction.units.sites, masks, reduction.values.tensors, mixings, strict=True)
    for site, keep, constants, mixing in parts:
        _check_site(model, hooks, site, constants)
        keep = keep.cpu()
        if bool(keep.all()):
            continue
        if not bool(torch.isfinite(constants[~keep.to(constants.device)]).all()):
            raise ValueError(f"values of removed units at {site.hook} are NaN or infinite")
        if site.kind in _PARTS:
            shares = None if mixing is None else (mixing.rows, mixing.columns, mixing.weights)
            cuts[site.kind, site.layer] = _Cut(site.kind, site.layer, keep, constants, shares)
        elif site.kind in _WHOLE:
            kind = _WHOLE[site.kind]
            size = _size(model.blocks[site.layer], kind)
            whole.append(_Cut(kind, site.layer, torch.zeros(size, dtype=torch.bool), None))
            changes.append(_Change(site.hook, constants[0]))
        else:
            entries = zip(site.hook_names, site.entries(constants), strict=True)
            changes += [_Change(hook, _step(site, keep, entry, mixing)) for hook, entry in entries]
    cuts |= {(cut.kind, cut.layer): cut for cut in whole}
    return list(cuts.values()), changes


def _step(
    site: Site, keep: Bool[Tensor, "units"], values: Float[Tensor, "units one"], mixing: NeighbourMap | None
) -> Step:
    """The step that sets the removed directions of a site to their values, at one of its hook points."""
    if site.basis is None:
        raise ValueError(f"{site.kind} units of {site.hook} have no basis")
    basis = site.basis.detach().to("cpu", torch.float64)
    dual = site.read(torch.eye(len(basis), dtype=torch.float64))[:, 0, :, 0]  # the coordinates of every axis
    reader = dual[:, ~keep]
    if mixing is not None:
        reader = reader - dual @ mixing.matrix(dual).to_dense()[~keep].T
    return Step(basis[:, ~keep], reader, values.detach().to("cpu", torch.float64)[~keep, 0])


def _check_site(
    model: TransformerBridge, hooks: Mapping[str, Any], site: Site, constants: Float[Tensor, "units width"]
) -> None:
    for hook in site.hook_names:
        if hook not in hooks:
            raise ValueError(f"the model has no hook point {hook!r}: are the units those of this model?")
    if site.kind not in _HOOKS:
        raise ValueError(f"units of kind {site.kind!r} do not fold; those of kind {', '.join(_HOOKS)} do")
    if site.positions is not None:
        raise ValueError(f"units at positions {site.suffix[1:]} of {site.hook} do not fold: weights act everywhere")
    based = site.basis is not None
    for hook in site.hook_names:
        layers = range(len(model.blocks)) if based else [site.layer]
        names = [f"blocks.{layer}.{place}" for layer in layers for place in _HOOKS[site.kind]]
        if not any(hooks.get(name) is hooks[hook] for name in names):
            places = ", ".join(_HOOKS[site.kind]) if based else names[0]
            raise ValueError(f"{site.kind} units of {hook} do not fold; those of {places} do")
    if based:
        size, width = site.size, len(site.hook_names)
        if len(site.basis) != model.cfg.d_model:  # type: ignore[arg-type]
            raise ValueError(f"basis of {site.hook} has {len(site.basis)} rows, the model's stream {model.cfg.d_model}")  # type: ignore[arg-type]
    elif site.kind in _PARTS:
        block = model.blocks[site.layer]
        size, width = _size(block, site.kind), block.attn.config.d_head if site.kind == "head" else 1
    else:
        size, width = 1, model.cfg.d_model
    if site.size != size or constants.shape[-1] != width:
        raise ValueError(
            f"{site.hook} has {size} {site.kind} units of width {width}, the reduction's {site.size} of width "
            f"{constants.shape[-1]}: is it a reduction of this model?"
        )


def _size(block: Any, kind: str) -> int:
    """How many heads or neurons a block has."""
    return len(kv_index(block.attn)) if kind == "head" else n_neurons(block.mlp)


def _check_model(model: Any) -> None:
    if not isinstance(model, TransformerBridge):
        raise ValueError(f"fold needs a TransformerBridge, not a {type(model).__name__}")
    architecture = getattr(model.cfg, "architecture", None)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"models of architecture {architecture} do not fold; these do: {', '.join(ARCHITECTURES)}")
    check_model(model)
    hooked = [name for name, hook in model.hook_dict.items() if hook.has_hooks()]
    if hooked:
        raise ValueError(f"model has hooks, first at {hooked[0]}, which would not fold: call model.reset_hooks()")


def _check_weights(model: TransformerBridge, cuts: list[_Cut], changes: list[_Change]) -> None:
    """Refuse what would not fold exactly in the layers that lose units, or whose writes change."""
    for cut in cuts:
        activation = (getattr(model.cfg, "act_fn", None) or "").lower()
        if cut.kind == "neuron" and cut.constants is not None and activation in _MIXING:
            raise ValueError(
                f"neurons of blocks.{cut.layer}.mlp do not fold: the activation {activation} mixes neurons"
            )
    projections = [part for cut in cuts for part in _projections(model, cut).values()]
    for part in projections + [part for change in changes for part in writers(model, model.hook_dict[change.hook])]:
        module = part.original_component
        if not isinstance(module, nn.Embedding) and type(module) not in (nn.Linear, Conv1D):
            raise ValueError(f"{part.name} is a {type(module).__name__}, which does not fold (quantised?)")
        if not module.weight.is_floating_point():
            raise ValueError(f"{part.name} has weights of {module.weight.dtype}, which do not fold (quantised?)")
        if module.weight.is_meta:
            raise ValueError(f"{part.name} is offloaded and has no weights here: load the model without")


def _projections(model: TransformerBridge, cut: _Cut) -> dict[str, Any]:
    """The bridges of the linear maps that change size with a cut."""
    block = model.blocks[cut.layer]
    part, names = (block.attn, "q k v o qkv") if cut.kind == "head" else (block.mlp, "in gate out")
    return {name: part._modules[name] for name in names.split() if name in part._modules}


def _left_behind(model: TransformerBridge) -> dict[int, None]:
    """Activations that the last forward pass left on the model, which may be part of a graph: not to be copied."""
    names = ("_captured_pre_ln_residual", "_pattern", "_attn_scores")
    attentions = [block.attn for block in model.blocks if "attn" in block._modules]
    return {id(getattr(attention, name, None)): None for attention in attentions for name in names}


def _composed(model: TransformerBridge, cuts: list[_Cut]) -> dict[str, str]:
    """The original name of every unit that is left, by its new name."""
    before = getattr(model, "units", None) if isinstance(model, FoldedBridge) else None
    keeps = {(cut.kind, cut.layer): cut.keep.nonzero().flatten().tolist() for cut in cuts}
    names: dict[str, str] = {}
    for layer, block in enumerate(model.blocks):
        for (kind, part), letter in zip(_PARTS.items(), "HN", strict=True):
            if part not in block._modules:
                continue
            for new, old in enumerate(keeps.get((kind, layer), range(_size(block, kind)))):
                name = f"L{layer}{letter}{old}"
                names[f"L{layer}{letter}{new}"] = name if before is None else before[name]
    return names
