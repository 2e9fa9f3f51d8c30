"""Memory: how many examples at a time, where the user does not say.

An estimate from the sizes of the model's modules, without a pass. It is a function of model, examples and device alone,
so that the same call runs the same batches every time; what is free at the moment is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import psutil
import torch

from tl_sparsify._internal.readers import term_count
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.core.units import Units

ON_CPU = 5 * 2**28
"""Bytes that a batch may take on the CPU: 1.25 GiB."""

SHARE = 1 / 4
"""Of what the model leaves of a GPU's memory."""

SHARE_OF_A_MACHINE = 0.8
"""Of a machine's memory: what needs more is refused."""

SHARE_OF_ONE = 1 / 2
"""Of a machine's memory, or of what the model leaves of a GPU's: an example that takes more is too long."""

TOKENS = 16_384
"""At most so many tokens at a time: more are no faster."""

_KEPT = (
    2.5  # numbers that a token leaves in the graph for each input and output of a weight matrix: 1.9 to 2.1 measured
)
_PATTERNS = 4  # numbers for each entry of an attention pattern
_READ = 4  # of the stream, for each reader of edges: itself, behind the norm, and their gradients
_FEATURES = 8  # for each feature of a dictionary: itself, before its activation function, probes and their gradients
_COPIES = 8  # of an answer's logits: themselves, probabilities, probes and their gradients


def device_of(model: Any) -> torch.device:
    """Where inputs go: the device of the model's first parameter (or buffer, where it has none; the CPU, where it has
    neither); of one that is offloaded, that it is brought to."""
    found = _runs_on(model)
    if found.type == "meta":
        raise ValueError("model is on the meta device, without its weights: load it onto cpu or cuda")
    return found


def _runs_on(model: Any) -> torch.device:
    buffers = model.buffers() if isinstance(model, torch.nn.Module) else ()
    tensor = next(chain(model.parameters(), buffers), None)
    first = torch.device("cpu") if tensor is None else tensor.device
    if first.type != "meta":
        return first
    hooks = (getattr(module, "_hf_hook", None) for module in _modules(model))
    for hook in (part for whole in hooks for part in getattr(whole, "hooks", (whole,))):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return first


def _modules(model: Any) -> Iterable[Any]:
    return model.modules() if isinstance(model, torch.nn.Module) else ()


def dtype_of(model: Any) -> torch.dtype:
    """The precision that the model computes in: of its first parameter of floating point (not the whole numbers of
    quantised weights); float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def keep_dtype_of(model: Any) -> torch.dtype:
    """The precision of a ``keep`` that is differentiated: the model's own where that is float64, else float32."""
    return torch.float64 if dtype_of(model) == torch.float64 else torch.float32


def physical() -> int:
    """Bytes of memory that this machine has."""
    return psutil.virtual_memory().total


def budget(model: Any) -> int:
    """Bytes that a batch may take on the model's device: 1.25 GiB on the CPU, on a GPU a quarter of what the model
    leaves of its whole memory; of several GPUs of the one with the least."""
    left = _left(model)
    return ON_CPU if left is None else max(int(SHARE * left), ON_CPU // 4)


def _left(model: Any) -> int | None:
    """What the model leaves of its GPU's memory, of several of the one with the least; ``None`` on the CPU."""
    first = _runs_on(model)
    if first.type != "cuda":
        return None
    storages = {p.untyped_storage().data_ptr(): p for p in model.parameters() if p.is_cuda}
    own = {first: 0}
    for p in storages.values():
        own[p.device] = own.get(p.device, 0) + p.untyped_storage().nbytes()
    return min(torch.cuda.get_device_properties(device).total_memory - taken for device, taken in own.items())


def too_long(model: Any, examples: Examples, *, narrow: bool) -> bool:
    """Whether the graph of one example alone is more than may be hoped to fit (:data:`SHARE_OF_ONE`): its blocks are
    run again in backward passes (:mod:`tl_sparsify._internal.recomputation`)."""
    left = _left(model)
    return example_bytes(model, examples, narrow=narrow) > SHARE_OF_ONE * (physical() if left is None else left)


def example_bytes(model: Any, examples: Examples, *, narrow: bool) -> int:
    """About how many bytes one example takes in a forward pass whose graph is kept and a backward pass, the longest as
    long as all; ``narrow`` says that logits are made at labelled positions only. No model pass."""
    pos = examples.labels.shape[1]
    shapes = [shape for shape in _shapes(model) if len(shape) > 1]
    size = max((p.element_size() for p in model.parameters()), default=4)
    vocabulary = int(getattr(getattr(model, "cfg", None), "d_vocab", 0) or 0)
    # a matrix of experts has a dimension more, of which a token takes few
    widths = sum(sum(shape[-2:]) for shape in shapes if vocabulary not in shape)
    rows = int((examples.labels != NO_LABEL).sum(1).max()) if narrow else pos
    numbers = _KEPT * pos * widths + _COPIES * rows * max(vocabulary, 1) + _PATTERNS * pos * pos * _patterns(model)
    return int(numbers * max(size, 3))  # half precision has its norms and softmax in float32


def _shapes(model: Any) -> list[tuple[int, ...]]:
    """Of all parameters; of a packed weight (quantised) what its layer says."""
    found = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
    for module in _modules(model):
        if {"q", "k", "v", "qkv"} <= module._modules.keys():  # the whole is there beside its parts, which run
            for parameter in module._modules["qkv"].parameters():
                found.pop(id(parameter), None)
        said, weight = (
            (vars(module).get("out_features"), vars(module).get("in_features")),
            module._parameters.get("weight"),
        )
        if weight is not None and None not in said and set(weight.shape) != set(said):
            found[id(weight)] = said
    return list(found.values())


def _patterns(model: Any) -> int:
    """Attention patterns of an example: the heads of all layers."""
    blocks, config = getattr(model, "blocks", None), getattr(model, "cfg", None)
    return 0 if blocks is None else len(blocks) * int(getattr(config, "n_heads", 0) or 0)


def edge_bytes(model: Any, examples: Examples, units: Units) -> int:
    """About how many bytes more one example takes where edges are among the units: for each reader copies of the
    stream, and what every writer writes. No model pass."""
    edges = [site for site in units.sites if site.kind == "edge"]
    copies = _READ * sum(len(site.readers) * term_count(model, site.writers) for site in edges) + max(
        (site.rows for site in edges), default=0
    )
    width = int(getattr(getattr(model, "cfg", None), "d_model", 0) or 0)
    size = max((p.element_size() for p in model.parameters()), default=4)
    return copies * examples.labels.shape[1] * width * size


def feature_bytes(model: Any, examples: Examples, units: Units) -> int:
    """About how many bytes more one example takes where features of a dictionary are among the units, for all that are
    encoded at every position. No model pass."""
    encoded = [getattr(site.encoder, "weight", site.basis) for site in units.sites if site.encoder is not None]
    rivals = sum(weight.shape[1] for weight in encoded if weight is not None)
    size = max((p.element_size() for p in model.parameters()), default=4)
    return _FEATURES * rivals * examples.labels.shape[1] * max(size, 4)


def rows_for(model: Any, examples: Examples, *, narrow: bool, units: Units | None = None) -> int:
    """How many examples at a time: as many as :func:`budget` holds, at least one and at most :data:`TOKENS` tokens."""
    one = example_bytes(model, examples, narrow=narrow)
    one += 0 if units is None else edge_bytes(model, examples, units) + feature_bytes(model, examples, units)
    fits = budget(model) // max(1, one)
    return max(1, min(TOKENS // examples.labels.shape[1], fits))
