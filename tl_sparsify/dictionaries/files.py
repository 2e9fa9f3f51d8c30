"""Dictionaries in files: SAELens's layout, tensors in safetensors with a json beside them. Nothing pickled is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.files import write_bytes, write_text
from tl_sparsify.dictionaries.dictionary import Dictionary

_TENSORS, _CONFIG = ("sae_weights.safetensors", "sae.safetensors"), ("cfg.json", "config.json")
_NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec")
_KNOWN = {
    "standard": "relu",
    "relu": "relu",
    "transcoder": "relu",
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
    "topk": "topk",
}
_NORMALIZED = (None, "none", "expected_average_only_in")  # the last is put into the weights when they are saved


@checked
def load(folder: str | Path, *, hook: str | None = None, source: str | None = None) -> Dictionary:
    """Read a dictionary in SAELens's layout: ``sae_weights.safetensors`` (``W_enc [d_in, features]``, ``W_dec``,
    ``b_enc``, ``b_dec`` and, of JumpReLU, ``threshold``) and ``cfg.json`` in one folder. ``sae_lens`` is not needed.

    Architectures ``standard``, ``jumprelu``, ``topk`` and ``transcoder`` (with or without JumpReLU). Tensors come in
    float32 at least; a top-k dictionary that ranks features by what they write is given decoder rows of length 1.

    Args:
        hook, source: the hook points that are decoded and encoded, where other than the file says.

    Raises:
        FileNotFoundError: no such folder, or no such files in it.
        ValueError: a damaged file, one whose tensors do not fit one another or are not finite, another architecture
            (gated, skip connections), or activations that are normalised in a way that the file does not hold.

    Example:
        >>> axes, zeros = torch.eye(64), torch.zeros(64)
        >>> tls.dictionaries.save(tls.Dictionary(axes, axes, zeros, zeros, hook="blocks.1.hook_resid_post"), "mine")
        >>> tls.dictionaries.load("mine")
        Dictionary(64 relu features of width 64 at blocks.1.hook_resid_post)
    """
    folder = Path(folder)
    weights, config = _one_of(folder, _TENSORS), _one_of(folder, _CONFIG)
    try:
        tensors, said = load_tensors(weights.read_bytes()), json.loads(config.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{config} holds no object with the settings of a dictionary")
    return _dictionary(folder, tensors, said, hook, source)


def _one_of(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {names[0]}: give the folder of a dictionary in SAELens's layout")


def _dictionary(
    folder: Path, tensors: dict[str, Tensor], said: dict[str, Any], hook: str | None, source: str | None
) -> Dictionary:
    lacking = [name for name in _NEEDED if name not in tensors]
    other = sorted(tensors.keys() - {*_NEEDED, "threshold"})
    if lacking or other:
        what = f"no {lacking[0]}" if lacking else f"a tensor {other[0]}, which is of an architecture that is not read"
        raise ValueError(f"{folder} has {what}; W_enc, W_dec, b_enc, b_dec and threshold are")
    architecture = said.get("architecture", "standard")
    activation = _KNOWN.get(str(architecture))
    if activation is None:
        raise ValueError(f"{folder} has architecture {architecture!r}; those that are read are {', '.join(_KNOWN)}")
    named = said.get("activation_fn") or said.get("activation_fn_str") or "relu"
    if activation == "relu" and named == "topk":
        activation = "topk"
    elif activation == "relu" and named != "relu":
        raise ValueError(f"{folder} has activation {named!r}; relu, topk and jumprelu are read")
    if said.get("normalize_activations") not in _NORMALIZED:
        raise ValueError(f"{folder} normalises activations by {said['normalize_activations']!r}, which is not read")
    if said.get("reshape_activations", "none") != "none":
        raise ValueError(f"{folder} reshapes activations ({said['reshape_activations']!r}), which is not read")
    if said.get("hook_head_index") is not None:
        raise ValueError(f"{folder} is of one head (hook_head_index); dictionaries of whole activations are read")
    tensors = {name: tensor if tensor.dtype == torch.float64 else tensor.float() for name, tensor in tensors.items()}
    if said.get("rescale_acts_by_decoder_norm") and tensors["W_dec"].ndim == 2:
        length = tensors["W_dec"].norm(dim=1)
        tensors |= {"W_enc": tensors["W_enc"] * length, "b_enc": tensors["b_enc"] * length}
        tensors["W_dec"] = tensors["W_dec"] / length.clamp_min(1e-12)[:, None]
    more = said.get("metadata") if isinstance(said.get("metadata"), dict) else {}
    read, out = ({**said, **more}.get(name) for name in ("hook_name", "hook_name_out"))  # type: ignore[dict-item]
    k = {**(said.get("activation_fn_kwargs") or {}), **said}.get("k")
    try:
        return Dictionary(
            **{name: tensors[name] for name in _NEEDED},
            activation=activation,  # type: ignore[arg-type]
            threshold=tensors.get("threshold") if activation == "jumprelu" else None,
            k=int(k) if activation == "topk" and k is not None else None,
            centred=bool(said.get("apply_b_dec_to_input", "transcoder" not in str(architecture))),
            hook=hook or out or read,
            source=source or (read if out else None),
        )
    except ValueError as error:
        raise ValueError(f"{folder} holds no dictionary: {error}") from error


@checked
def save(dictionary: Dictionary, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a dictionary in the layout that :func:`load` and SAELens read; ``dtype`` is that of the tensors.

    Example:
        >>> axes, zeros = torch.eye(64), torch.zeros(64)
        >>> tls.dictionaries.save(tls.Dictionary(axes, axes, zeros, zeros), "half", dtype=torch.float16)
        >>> len(tls.dictionaries.load("half"))
        64
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: getattr(dictionary, name) for name in (*_NEEDED, "threshold")}
    tensors = {
        name: part.detach().to("cpu", dtype, copy=True).contiguous() for name, part in parts.items() if part is not None
    }
    transcoder = dictionary.source is not None
    architecture = "standard" if dictionary.activation == "relu" else dictionary.activation
    if transcoder and dictionary.activation != "topk":
        architecture = "transcoder" if dictionary.activation == "relu" else "jumprelu_transcoder"
    d_in, n = dictionary.W_enc.shape
    said: dict[str, Any] = {"architecture": architecture, "d_in": d_in, "d_sae": n, "d_out": dictionary.W_dec.shape[1]}
    said |= {"dtype": str(dtype).removeprefix("torch."), "apply_b_dec_to_input": dictionary.centred}
    said |= {"normalize_activations": "none"} | ({} if dictionary.k is None else {"k": dictionary.k})
    names = {
        "hook_name": dictionary.source or dictionary.hook,
        "hook_name_out": dictionary.hook if transcoder else None,
    }
    said["metadata"] = {name: value for name, value in names.items() if value is not None}
    write_bytes(folder / _TENSORS[0], save_tensors(tensors))
    write_text(folder / _CONFIG[0], json.dumps(said, indent=1) + "\n")
