"""Memory: how many examples at a time, where the user does not say.

An estimate from the sizes of the model's modules, without a pass. It is a function of model, examples and device alone,
so that the same call runs the same batches every time; what is free at the moment is not asked.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.core.units import Units

ON_CPU = 2**30
"""Bytes that a batch may take on the CPU."""

SHARE = 1 / 4
"""Of what the model leaves of a GPU's memory."""

SHARE_OF_A_MACHINE = 0.8
"""Of a machine's memory: what needs more is refused."""

TOKENS = 16_384
"""At most so many tokens at a time: more are no faster."""

_KEPT = (
    2.5  # numbers that a token leaves in the graph for each input and output of a weight matrix: 1.9 to 2.1 measured
)
_PATTERNS = 4  # numbers for each entry of an attention pattern
_READ = 4  # of the stream, for each reader of edges: itself, behind the norm, and their gradients
_COPIES = 8  # of an answer's logits: themselves, probabilities, probes and their gradients


def physical() -> int:
    """Bytes of memory that this machine has."""
    return psutil.virtual_memory().total


def budget(model: Any) -> int:
    """Bytes that a batch may take on the model's device: 1 GiB on the CPU, on a GPU a quarter of what the model leaves
    of its whole memory."""
    first = next(iter(model.parameters()))
    if first.device.type != "cuda":
        return ON_CPU
    own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if p.is_cuda}
    whole = torch.cuda.get_device_properties(first.device).total_memory
    return max(int(SHARE * (whole - sum(own.values()))), ON_CPU // 4)


def example_bytes(model: Any, examples: Examples, *, narrow: bool) -> int:
    """About how many bytes one example takes in a forward pass whose graph is kept and a backward pass, the longest as
    long as all; ``narrow`` says that logits are made at labelled positions only. No model pass."""
    pos = examples.labels.shape[1]
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    size = max((p.element_size() for p in model.parameters()), default=4)
    vocabulary = int(getattr(getattr(model, "cfg", None), "d_vocab", 0) or 0)
    # a matrix of experts has a dimension more, of which a token takes few
    widths = sum(sum(shape[-2:]) for shape in shapes if vocabulary not in shape)
    rows = int((examples.labels != NO_LABEL).sum(1).max()) if narrow else pos
    numbers = _KEPT * pos * widths + _COPIES * rows * max(vocabulary, 1) + _PATTERNS * pos * pos * _patterns(model)
    return int(numbers * max(size, 3))  # half precision has its norms and softmax in float32


def _patterns(model: Any) -> int:
    """Attention patterns of an example: the heads of all layers."""
    blocks, config = getattr(model, "blocks", None), getattr(model, "cfg", None)
    return 0 if blocks is None else len(blocks) * int(getattr(config, "n_heads", 0) or 0)


def edge_bytes(model: Any, examples: Examples, units: Units) -> int:
    """About how many bytes more one example takes where edges are among the units: for each reader copies of the
    stream, and what every writer writes. No model pass."""
    edges = [site for site in units.sites if site.kind == "edge"]
    copies = _READ * sum(len(site.readers) for site in edges) + max((site.rows for site in edges), default=0)
    width = int(getattr(getattr(model, "cfg", None), "d_model", 0) or 0)
    size = max((p.element_size() for p in model.parameters()), default=4)
    return copies * examples.labels.shape[1] * width * size


def rows_for(model: Any, examples: Examples, *, narrow: bool, units: Units | None = None) -> int:
    """How many examples at a time: as many as :func:`budget` holds, at least one and at most :data:`TOKENS` tokens."""
    one = example_bytes(model, examples, narrow=narrow)
    one += 0 if units is None else edge_bytes(model, examples, units)
    fits = budget(model) // max(1, one)
    return max(1, min(TOKENS // examples.labels.shape[1], fits))
