"""A folded model as a Hugging Face checkpoint: what transformers writes for the architecture, with the sizes of every
layer in its configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.directory import directory
from tl_sparsify._internal.files import write_text
from tl_sparsify.core.prompts import adds_beginning
from tl_sparsify.folding.bridge import FoldedBridge
from tl_sparsify.folding.checkpoint import CLASSES
from tl_sparsify.folding.narrow import kv_index, n_neurons
from tl_sparsify.folding.stream_writes import describe_points

_UNITS = "folded_units.json"


@checked
def export_hf(model: Any, path: str | Path) -> None:
    """Write a folded model as a Hugging Face checkpoint: configuration, safetensors, the tokenizer where there is one,
    and ``folded_units.json``, which says which original unit each of its own is.

    ``AutoModelForCausalLM.from_pretrained(path)`` loads it wherever ``tl_sparsify`` is imported, and so does
    ``TransformerBridge.boot_transformers(path)``, which gives a folded bridge. Where query heads share key/value heads
    unevenly the cache of the loaded transformers model holds keys and values for each query head. The tokenizer puts a
    beginning token first where the original's own does, whatever TransformerLens made of it, if the original's is still
    where it was loaded from. The directory is complete, or not there; one that holds an older export is replaced. No
    model pass.

    Args:
        model: what :func:`fold` returned, of the architectures GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma 2
            or Gemma 3.
        path: the directory to write.

    Raises:
        ValueError: a model that :func:`fold` did not return, of another architecture, in compatibility mode, or with
            something that the architecture's checkpoints have no place for.
        FileExistsError: ``path`` is there and is no export.

    Example:
        >>> language = tls.text.load_language_model(tls.task.own_language_model())
        >>> values = tls.constants.mean(language, tls.load_task("ioi").examples(0)[0][:32], tls.heads(language))
        >>> without = tls.Reduction(~tls.Circuit.of(values.units, ["L0H1"]), values, first_token="none")
        >>> tls.export_hf(tls.fold(language, without), "checkpoint")
    """
    if not isinstance(model, FoldedBridge):
        raise ValueError(f"model is no folded one: export_hf exports what fold returns, not a {type(model).__name__}")
    architecture = model.cfg.architecture
    if architecture not in CLASSES:
        names = ", ".join(CLASSES)
        raise ValueError(
            f"models of architecture {architecture} cannot be exported; these can: {names}. Use save_folded"
        )
    if model.first_stream is not None:
        raise ValueError(
            "model leaves units alone at a beginning-of-sequence token, which a plain checkpoint cannot: fold a "
            "reduction with first_token='none', and export that"
        )
    if model.compatibility_mode:
        raise ValueError("a folded model in compatibility mode cannot be exported: fold one without, and export that")
    steps = describe_points(model)
    if steps:
        raise ValueError(
            f"the folded model has an explicit step at {min(steps)} (a residual direction), which no checkpoint of "
            f"{architecture} has a place for: use save_folded, or leave these units out"
        )
    exported = _exported(model, CLASSES[architecture])
    with directory(Path(path), _UNITS, "exported model") as folder:
        exported.save_pretrained(str(folder))
        if model.tokenizer is not None:
            _own_tokenizer(model.tokenizer).save_pretrained(str(folder))
        write_text(folder / _UNITS, json.dumps(model.units, indent=1))


def _exported(model: FoldedBridge, model_class: Any) -> Any:
    """The folded model as one of the classes below, its parameters those of ``model``."""
    original: Any = model.original_model
    originals = _originals(model.units, len(model.blocks))
    layers = [_sizes(block, units) for block, units in zip(model.blocks, originals, strict=True)]
    settings = original.config.to_dict() | {"folded_layers": layers}
    # TransformerLens switches output_attentions on to run; a checkpoint that asks for it needs eager attention.
    for name in ("model_type", "architectures", "transformers_version", "output_attentions"):
        settings.pop(name, None)
    with torch.device("meta"):
        exported = model_class(model_class.config_class.from_dict(settings))
    found = {name.replace("_original_component.", ""): tensor for name, tensor in original.state_dict().items()}
    bias = found.get("lm_head.bias")
    if bias is not None and bool(bias.any()):
        raise ValueError("the unembedding has a bias (processed weights?), which checkpoints have no place for")
    exported.load_state_dict({name: found[name] for name in exported.state_dict()}, assign=True)
    if original.config.tie_word_embeddings:
        exported.tie_weights()
    return exported.eval()


def _sizes(block: Any, units: dict[str, list[int]]) -> dict[str, Any]:
    biases = (part.original_component.bias is not None for part in (block.attn.o, block.mlp.out))
    return {
        "kv_index": kv_index(block.attn).tolist(),
        "neurons": n_neurons(block.mlp),
        "output_biases": list(biases),
        "units": units,
    }


def _originals(units: dict[str, str], layers: int) -> list[dict[str, list[int]]]:
    """The original numbers of each layer's heads (H) and neurons (N), in their order here."""
    numbers: list[dict[str, list[int]]] = [{"H": [], "N": []} for _ in range(layers)]
    for name in units.values():
        layer, letter, number = re.fullmatch(r"L(\d+)([HN])(\d+)", name).groups()  # type: ignore[union-attr]
        numbers[int(layer)][letter].append(int(number))
    return numbers


def _own_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer as it was before TransformerLens loaded it anew with a beginning token put first."""
    try:
        own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return tokenizer  # it has no file of its own any more
    if adds_beginning(own) == adds_beginning(tokenizer) or own.get_vocab() != tokenizer.get_vocab():
        return tokenizer
    own.padding_side, own.chat_template = tokenizer.padding_side, tokenizer.chat_template
    if own.pad_token is None and tokenizer.pad_token is not None:
        own.pad_token = tokenizer.pad_token
    return own
