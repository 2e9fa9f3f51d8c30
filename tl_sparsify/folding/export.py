"""A folded model as a Hugging Face checkpoint, and the classes that load it.

The checkpoint is what transformers writes for the architecture, with two differences: the configuration has a list
``folded_layers``, with the sizes of every layer, and its ``model_type`` names a class that is registered here. So
``AutoModelForCausalLM.from_pretrained`` loads it wherever tl_sparsify is imported, and no remote code is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.directory import directory
from tl_sparsify._internal.files import write_text
from tl_sparsify.folding.bridge import FoldedBridge
from tl_sparsify.folding.narrow import kv_index, n_neurons
from tl_sparsify.folding.stream_writes import describe_points

_UNITS = "folded_units.json"


@checked
def export_hf(model: Any, path: str | Path) -> None:
    """Write a folded model as a Hugging Face checkpoint: configuration, safetensors, the tokenizer where there is one,
    and ``folded_units.json``, which says which original unit each of its own is.

    ``AutoModelForCausalLM.from_pretrained(path)`` loads it wherever ``tl_sparsify`` is imported. Where query heads
    share key/value heads unevenly the cache of the loaded model holds keys and values for each query head. The
    directory is complete, or not there; one that holds an older export is replaced. No model pass.

    Args:
        model: what :func:`fold` returned, of the architectures GPT-2, Llama, Mistral, Qwen2 or Qwen3.
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
        raise ValueError(f"export_hf exports what fold returns, not a {type(model).__name__}")
    architecture = model.cfg.architecture
    if architecture not in _CLASSES:
        names = ", ".join(_CLASSES)
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
    exported = _exported(model, _CLASSES[architecture])
    with directory(Path(path), _UNITS, "exported model") as folder:
        exported.save_pretrained(str(folder))
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(folder))
        write_text(folder / _UNITS, json.dumps(model.units, indent=1))


def _exported(model: FoldedBridge, model_class: Any) -> Any:
    """The folded model as one of the classes below, its parameters those of ``model``."""
    original: Any = model.original_model
    layers = [_sizes(block) for block in model.blocks]
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


def _sizes(block: Any) -> dict[str, Any]:
    biases = (part.original_component.bias is not None for part in (block.attn.o, block.mlp.out))
    return {
        "kv_index": kv_index(block.attn).tolist(),
        "neurons": n_neurons(block.mlp),
        "output_biases": list(biases),
    }


class _Bias(nn.Module):
    """What is left of an output projection without inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))


class _NoMLP(nn.Module):
    """An MLP without neurons: its bias."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, _Bias(width))

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return self._modules[self.name].bias.expand_as(x)  # type: ignore[union-attr]


class _NoAttention(_NoMLP):
    """Attention without heads: its bias. It writes one number per position to the key/value cache, from which other
    layers read how long the input is."""

    def __init__(self, name: str, width: int, layer: int) -> None:
        super().__init__(name, width)
        self.layer_idx = layer

    def forward(  # type: ignore[override]
        self, hidden_states: Float[Tensor, "batch pos width"], past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch pos width"], None]:
        if past_key_values is not None:
            nothing = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            past_key_values.update(nothing, nothing, self.layer_idx)
        return super().forward(hidden_states), None


class _Gathered(nn.Linear):
    """The key or value projection for query heads that share unevenly: one output per query head."""

    def __init__(self, inputs: int, index: list[int], d_head: int, bias: bool) -> None:
        super().__init__(inputs, (max(index) + 1) * d_head, bias=bias)
        self.index, self.d_head = index, d_head

    def forward(self, input: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos columns"]:
        heads = super().forward(input).unflatten(-1, (-1, self.d_head))
        return heads[..., self.index, :].flatten(-2)


def _resize_gpt2(block: Any, width: int, layer: int, sizes: dict[str, Any]) -> None:
    heads, neurons = len(sizes["kv_index"]), sizes["neurons"]
    attention = block.attn
    if heads == 0:
        block.attn = _NoAttention("c_proj", width, layer)
    else:
        attention.num_heads, attention.split_size = heads, heads * attention.head_dim
        attention.c_attn = Conv1D(3 * attention.split_size, width)
        attention.c_proj = Conv1D(width, attention.split_size)
    if neurons == 0:
        block.mlp = _NoMLP("c_proj", width)
    else:
        block.mlp.c_fc, block.mlp.c_proj = Conv1D(neurons, width), Conv1D(width, neurons)


def _resize_llama(block: Any, width: int, layer: int, sizes: dict[str, Any]) -> None:
    index, neurons = sizes["kv_index"], sizes["neurons"]
    attention, mlp = block.self_attn, block.mlp
    attention_bias, mlp_bias = sizes["output_biases"]
    if not index:
        block.self_attn = _NoAttention("o_proj", width, layer)
    else:
        d_head, kv_heads = attention.head_dim, max(index) + 1
        group = len(index) // kv_heads
        even = index == [head // group for head in range(len(index))]
        attention.num_key_value_groups = group if even else 1
        biases = [getattr(attention, name).bias is not None for name in ("q_proj", "k_proj", "v_proj")]
        attention.q_proj = nn.Linear(width, len(index) * d_head, bias=biases[0])
        for name, bias in (("k_proj", biases[1]), ("v_proj", biases[2])):
            even_map = nn.Linear(width, kv_heads * d_head, bias=bias)
            setattr(attention, name, even_map if even else _Gathered(width, index, d_head, bias))
        attention.o_proj = nn.Linear(len(index) * d_head, width, bias=attention_bias)
    if neurons == 0:
        block.mlp = _NoMLP("down_proj", width)
    else:
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, nn.Linear(width, neurons, bias=getattr(mlp, name).bias is not None))
        mlp.down_proj = nn.Linear(neurons, width, bias=mlp_bias)


def _folded_class(base: Any) -> Any:
    """A class of configurations and one of models for folded models of an architecture, registered."""
    base_config = base.config_class
    fields = {"folded_layers": None, "__annotations__": {"folded_layers": list[dict[str, Any]] | None}}
    fields |= {"__module__": __name__, "model_type": f"tl_sparsify_{base_config.model_type}"}
    config_class = type(f"Folded{base_config.__name__}", (base_config,), fields)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        blocks, resize = (
            (self.transformer.h, _resize_gpt2) if base is GPT2LMHeadModel else (self.model.layers, _resize_llama)
        )
        for layer, (block, sizes) in enumerate(zip(blocks, config.folded_layers, strict=True)):
            resize(block, config.hidden_size, layer, sizes)

    members = {"__init__": build, "config_class": config_class, "__module__": __name__}
    model_class = type(f"Folded{base.__name__}", (base,), members)
    AutoConfig.register(config_class.model_type, config_class)  # type: ignore[attr-defined]
    AutoModelForCausalLM.register(config_class, model_class)
    return model_class


_CLASSES = {
    base.__name__: _folded_class(base)
    for base in (GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}
