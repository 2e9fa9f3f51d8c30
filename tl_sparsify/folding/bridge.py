"""A folded model as a bridge, and its files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformers import AutoTokenizer

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.directory import directory, settle_directory
from tl_sparsify._internal.files import read_tensors, reading, write_tensors
from tl_sparsify._internal.first_tokens import first_tokens, tokens_of
from tl_sparsify.core.intervene import recorded, streaming
from tl_sparsify.core.memory import device_of
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, residuals
from tl_sparsify.folding.narrow import fuse, kv_index, n_neurons, narrow_mlp, resize_attention
from tl_sparsify.folding.rebuild import assign, build, describe, numbers
from tl_sparsify.folding.stream_writes import describe_points, make_points


class FoldedBridge(TransformerBridge):
    """A bridge whose layers have different numbers of heads and neurons.

    ``cfg.n_heads``, ``cfg.n_key_value_heads`` and ``cfg.d_mlp`` are the largest of all layers; each layer's own
    numbers are those of its weights.

    Attributes:
        first_stream: ``[layers + 1, d_model]``, the residual stream before the first block and after each, at a
            beginning-of-sequence token, where units were folded that are left alone there; else ``None``.
        origin: fingerprint of the model that was folded, where it is known.
        units: original unit name of each head and neuron, by its name here (``{"L1H0": "L1H3", ...}``). Whole layers
            and directions keep their names.
    """

    units: dict[str, str]
    first_stream: Tensor | None = None
    origin: str | None = None

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """As any bridge's; where units are left alone at a beginning-of-sequence token, whose activations depend on
        nothing else, the residual stream there is set to what it was with them."""
        call = None if self.first_stream is None else tokens_of(self, input, kwargs)
        where = None if call is None else first_tokens(self, *call, "bos")
        if where is None or self.first_stream is None:
            return super().forward(input, *args, **kwargs)
        itself: Any = self  # pyright takes a property for a mutable attribute
        with streaming(itself, self.first_stream, where):
            return super().forward(input, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After ``copy.deepcopy``: what still refers to the model that this is a copy of is made anew."""
        super().__setstate__(state)
        _own(self)

    def _stack_block_params(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super()._stack_block_params(*args, **kwargs)
        except RuntimeError as error:
            raise ValueError(
                "the layers of a folded model differ in size, so their weights cannot be stacked: "
                "read model.blocks[layer].attn.W_Q and the like"
            ) from error

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a folded model cannot enter compatibility mode: enable it on the original, then fold")

    process_weights = enable_compatibility_mode  # type: ignore[assignment]


def first_stream(model: Any) -> Float[Tensor, "layers_and_one d_model"]:
    """The residual stream before the first block and after each, of a beginning-of-sequence token alone."""
    before = Site("residual", -1, "blocks.0.hook_resid_pre", 1)
    tokens = torch.tensor([[model.tokenizer.bos_token_id]], device=device_of(model))
    with torch.no_grad(), recorded(model, Units((before,)) + residuals(model)) as recording:
        model(tokens)
    return torch.cat([v[0, 0] for v in recording.read()]).clone()


def finish(folded: FoldedBridge) -> None:
    """What the whole bridge needs after its layers have changed size: the end of folding, and of loading."""
    attentions = [block.attn for block in folded.blocks if "attn" in block._modules]
    for attention in attentions:
        fuse(attention)
    indices = [kv_index(attention) for attention in attentions]
    folded.cfg.n_heads = max((len(index) for index in indices), default=0)
    if getattr(folded.cfg, "n_key_value_heads", None) is not None:
        folded.cfg.n_key_value_heads = max((len(index.unique()) for index in indices), default=0)
    folded.cfg.d_mlp = max((n_neurons(block.mlp) for block in folded.blocks if "mlp" in block._modules), default=0)
    fused = {id(p) for attention in attentions for part in _split(attention) for p in part.parameters()}
    folded._n_params_total = sum(p.numel() for p in folded.parameters() if id(p) not in fused)
    for part in folded.original_model.modules():
        register: Any = getattr(part, "_register_aliases", None)
        if register is not None:
            register()  # b_out, W_E and so on are references to the parameters
    _own(folded)
    folded.eval()


def _own(folded: FoldedBridge) -> None:
    """Cut the ties of a copied bridge to its original."""
    for block in folded.blocks:
        block._teardown_capture_hooks()  # they refer to the original's blocks; made again when the block runs
        if "attn" in block._modules:
            block.attn.config._bind_bridge(folded)
    template: Any = (folded.adapter.component_mapping or {}).get("blocks")  # what the blocks were once copied from
    for part in [template, *folded.blocks]:
        attention: Any = getattr(part, "submodules", {}).get("attn")
        split: Any = getattr(attention, "split_qkv_matrix", None)
        owner = getattr(split, "__self__", None)
        if isinstance(owner, type(folded.adapter)):  # a method of the original's adapter, which holds the original
            attention.split_qkv_matrix = getattr(folded.adapter, split.__func__.__name__)


def _split(attention: Any) -> list[nn.Module]:
    """The q, k and v of an attention that has a fused one as well: the same weights a second time."""
    return [attention.q, attention.k, attention.v] if "qkv" in attention._modules else []


FOLDED = "folded.safetensors"


@checked
def save_folded(model: Any, path: str | Path) -> None:
    """Write a folded model to a directory: one safetensors file, and the tokenizer where there is one. The directory
    is complete, or not there; one that holds an older folded model is replaced.

    Raises:
        ValueError: a model that :func:`fold` did not return, or one in compatibility mode.
        FileExistsError: ``path`` is there and is no folded model.

    Example:
        >>> tls.save_folded(tls.fold(model, reduction), "small")
        >>> tls.load_folded("small").units["L0H1"]
        'L0H2'
    """
    path = Path(path)
    if not isinstance(model, FoldedBridge):
        raise ValueError(f"save_folded saves what fold returns, not a {type(model).__name__}")
    if model.compatibility_mode:
        raise ValueError("a folded model in compatibility mode cannot be saved: fold one without, and save that")
    with directory(path, FOLDED, "folded model") as folder:
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(folder / "tokenizer"))
        write_tensors(folder / FOLDED, "folded model", *_contents(model, folder))


@checked
def load_folded(path: str | Path) -> FoldedBridge:
    """Read what :func:`save_folded` wrote, on the CPU, in evaluation mode; the original model is not needed.

    Raises:
        FileNotFoundError: no folded model at ``path``.
        ValueError: the files are damaged, or were written by a newer version.

    Example:
        >>> tls.save_folded(tls.fold(model, reduction), "small")
        >>> tls.heads(tls.load_folded("small"))
        Units(6: 6 heads)
    """
    path = Path(path)
    if not path.exists():
        settle_directory(path)
    header, tensors = read_tensors(path / FOLDED, "folded model")
    with reading(path / FOLDED, "folded model"):
        return _loaded(path, header, tensors)


def _loaded(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> FoldedBridge:
    tokenizer = _tokenizer(path, header["tokenizer"])
    parameters = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    there = sum(map(Tensor.numel, parameters.values()))
    folded = build(header["model"], tokenizer, layers=len(header["layers"]), numbers=there)
    folded.__class__ = FoldedBridge
    for block, layer in zip(folded.blocks, header["layers"], strict=True):
        _resize(block, layer)
    make_points(folded, header["points"])
    assign(folded, parameters, set(header["frozen"]))
    folded.units = {
        f"{part.removeprefix('units.')}{new}": f"{part.removeprefix('units.')}{old}"
        for part, tensor in tensors.items()
        if part.startswith("units.")
        for new, old in enumerate(tensor.tolist())
    }
    _check_units(folded, tensors)
    folded.origin = header.get("origin")
    finish(folded)
    folded.first_stream = _known_stream(folded, tensors.get("first_stream"))
    return folded


def _known_stream(folded: FoldedBridge, stream: Tensor | None) -> Tensor | None:
    if stream is None:
        return None
    shape, wanted = tuple(stream.shape), (len(folded.blocks) + 1, folded.cfg.d_model)
    older = (len(folded.blocks), folded.cfg.d_model)  # without the stream before the first block
    if shape not in (wanted, older) or not bool(stream.isfinite().all()):
        raise ValueError(f"first_stream is of shape {shape}; it is finite numbers of shape {wanted}")
    return stream if shape == wanted else torch.cat([first_stream(folded)[:1].to(stream), stream])


def _tokenizer(path: Path, files: dict[str, str]) -> Any:
    """The tokenizer of exactly these files, by name and checksum."""
    folder = path / "tokenizer"
    there = {file.relative_to(path).as_posix() for file in folder.glob("**/*") if file.is_file()}
    outside = [
        name for name in files if name not in there and not (path / name).resolve().is_relative_to(path.resolve())
    ]
    if outside:
        raise ValueError(f"{path / FOLDED} names {outside[0]!r}, which is outside of {path}: it is not read")
    for name, checksum in files.items():
        if name not in there or _sha256(path / name) != checksum:
            raise ValueError(f"{path / name} is damaged or missing. Save the model again.")
    if there - set(files):
        raise ValueError(f"{path / min(there - set(files))} is not of the model that was saved: remove it")
    linked = [name for name in files if not (path / name).resolve().is_relative_to(path.resolve())]
    if linked:
        raise ValueError(f"{path / linked[0]} is a link to another folder: it is not read")
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False) if files else None


def _check_units(folded: Any, tensors: dict[str, Tensor]) -> None:
    """The original units are as many as the layers have, each once."""
    for part, tensor in tensors.items():
        if not part.startswith("units."):
            continue
        match = re.fullmatch(r"units\.L(\d+)([HN])", part)
        if match is None:
            continue
        layer, found = int(match[1]), tensor.tolist()
        if layer >= len(folded.blocks):
            raise ValueError(f"it has units of layer {layer}, and {len(folded.blocks)} layers")
        sizes = _sizes(folded.blocks[layer])
        wanted = len(sizes["kv_index"] or ()) if match[2] == "H" else sizes["neurons"] or 0
        if len(found) != wanted or len(set(found)) != wanted or min(found, default=0) < 0:
            raise ValueError(f"{part} names {len(set(found))} units, and the layer has {wanted}")


def _contents(model: FoldedBridge, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of the file: ``model.*`` parameters and buffers, ``units.*`` original indices by part."""
    parameters = numbers(model)
    units: dict[str, list[int]] = {}
    for name, original in model.units.items():
        part = name.rstrip("0123456789")
        units.setdefault(part, []).append(int(original.removeprefix(part)))
    tokenizer = sorted(file for file in folder.glob("tokenizer/**/*") if file.is_file())
    header = {
        "model": describe(model),
        "layers": [_sizes(block) for block in model.blocks],
        "origin": model.origin,
        "points": describe_points(model),
        "frozen": [name for name, p in parameters.items() if isinstance(p, nn.Parameter) and not p.requires_grad],
        "tokenizer": {file.relative_to(folder).as_posix(): _sha256(file) for file in tokenizer},
    }
    tensors = {f"model.{name}": parameter for name, parameter in parameters.items()}
    if model.first_stream is not None:
        tensors["first_stream"] = model.first_stream
    return header, tensors | {f"units.{part}": torch.tensor(old, dtype=torch.int32) for part, old in units.items()}


def _sizes(block: Any) -> dict[str, Any]:
    index = kv_index(block.attn).tolist() if "attn" in block._modules else None
    return {"kv_index": index, "neurons": n_neurons(block.mlp) if "mlp" in block._modules else None}


def _resize(block: Any, sizes: dict[str, Any]) -> None:
    for name, part, full in (
        ("kv_index", "attn", lambda: len(kv_index(block.attn))),
        ("neurons", "mlp", lambda: n_neurons(block.mlp)),
    ):
        given = sizes[name]
        if (given is None) != (part not in block._modules):
            raise ValueError(f"{name} of a layer is {given!r}, and the layer has {'no' if given else 'an'} {part}")
        if given is not None and not 0 <= (given if name == "neurons" else len(given)) <= full():
            raise ValueError(f"{name} of a layer is {str(given)[:40]}; the unfolded layer has {full()}")
    if sizes["kv_index"] is not None and sizes["kv_index"] != kv_index(block.attn).tolist():
        index = torch.tensor(sizes["kv_index"], dtype=torch.long)
        kv_heads = torch.arange(len(index.unique()))
        resize_attention(block.attn, torch.arange(len(index)), kv_heads, index)
    if sizes["neurons"] is not None and sizes["neurons"] != n_neurons(block.mlp):
        narrow_mlp(block.mlp, torch.arange(sizes["neurons"]))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
