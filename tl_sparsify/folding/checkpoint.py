"""Classes of folded models for transformers: an architecture whose layers have sizes of their own.

The configuration has a list ``folded_layers``, with the sizes of every layer, and its ``model_type`` names a class that
is registered here. So ``AutoModelForCausalLM.from_pretrained`` loads what ``export_hf`` wrote, and no remote code is
run. This module needs transformers alone: it is imported as soon as both transformers and tl_sparsify are.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""What a file may name: other names make transformers fetch code, and run it."""


class _Bias(nn.Module):
    """What is left of an output projection without inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))


class NoMLP(nn.Module):
    """An MLP without neurons: its bias."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, _Bias(width))

    @property
    def output_bias(self) -> Float[Tensor, "width"]:
        """What it writes."""
        return self.get_submodule(self.name).bias  # type: ignore[return-value]

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return self.output_bias.expand_as(x)


class _NoAttention(NoMLP):
    """Attention without heads: its bias. It writes one number per position to the key/value cache, from which other
    layers read how long the input is."""

    def __init__(self, name: str, width: int, layer: int) -> None:
        super().__init__(name, width)
        self.layer_idx = layer

    def forward(  # type: ignore[override]
        self, hidden_states: Float[Tensor, "batch pos width"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch pos width"], None]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))  # GPT-NeoX has another name for it
        if cache is not None:
            nothing = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        return self.output_bias.expand_as(hidden_states), None


class Gathered(nn.Linear):
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
        block.mlp = NoMLP("c_proj", width)
    else:
        block.mlp.c_fc, block.mlp.c_proj = Conv1D(neurons, width), Conv1D(width, neurons)


def _resize_neox(block: Any, width: int, layer: int, sizes: dict[str, Any]) -> None:
    heads, neurons = len(sizes["kv_index"]), sizes["neurons"]
    attention, mlp = block.attention, block.mlp
    attention_bias, mlp_bias = sizes["output_biases"]
    if heads == 0:
        block.attention = _NoAttention("dense", width, layer)
    else:
        inner, bias = heads * attention.head_size, attention.query_key_value.bias is not None
        attention.query_key_value = nn.Linear(width, 3 * inner, bias=bias)
        attention.dense = nn.Linear(inner, width, bias=attention_bias)
    if neurons == 0:
        block.mlp = NoMLP("dense_4h_to_h", width)
    else:
        mlp.dense_h_to_4h = nn.Linear(width, neurons, bias=mlp.dense_h_to_4h.bias is not None)
        mlp.dense_4h_to_h = nn.Linear(neurons, width, bias=mlp_bias)


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
            setattr(attention, name, even_map if even else Gathered(width, index, d_head, bias))
        attention.o_proj = nn.Linear(len(index) * d_head, width, bias=attention_bias)
    if neurons == 0:
        block.mlp = NoMLP("down_proj", width)
    else:
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, nn.Linear(width, neurons, bias=getattr(mlp, name).bias is not None))
        mlp.down_proj = nn.Linear(neurons, width, bias=mlp_bias)


_FILES = {GPT2LMHeadModel: ("transformer", "h"), GPTNeoXForCausalLM: ("gpt_neox", "layers")}
_RESIZE = {GPT2LMHeadModel: _resize_gpt2, GPTNeoXForCausalLM: _resize_neox}


def layers_of(model: Any, base: Any) -> list[Any]:
    """The blocks of a model of the class ``base`` of transformers."""
    body, name = _FILES.get(base, ("model", "layers"))
    return list(getattr(getattr(model, body), name))


def check_attention(name: Any) -> None:
    """Refuse the name of an attention implementation that a file gives and that is not on the list.

    Raises:
        ValueError: such a name.
    """
    if name is not None and name not in ATTENTION_IMPLEMENTATIONS:
        names = ", ".join(ATTENTION_IMPLEMENTATIONS)
        raise ValueError(
            f"the file names the attention implementation {name!r}; a file may name {names}. Give another one to "
            "from_pretrained(attn_implementation=...) yourself if you trust it"
        )


def _check_layers(layers: Any, n_layers: int | None) -> None:
    """Refuse sizes that no export has: of another number of layers, or that contradict each other."""
    problem = "is no list of the model's layers" if not isinstance(layers, list) or len(layers) != n_layers else None
    for layer, sizes in enumerate(layers if problem is None else ()):
        index, neurons, units = sizes["kv_index"], sizes["neurons"], sizes["units"]
        if problem is not None:
            break
        if sorted(set(index)) != list(range(len(set(index)))) or neurons < 0:
            problem = f"has impossible sizes in layer {layer}"
        elif [len(units["H"]), len(units["N"])] != [len(index), neurons]:
            problem = f"names too many or too few units in layer {layer}"
    if problem is not None:
        raise ValueError(f"folded_layers of the configuration {problem}: export the model again")


def _folded_class(base: Any) -> Any:
    """A class of configurations and one of models for folded models of an architecture, registered."""
    base_config = base.config_class

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for name in ("attn_implementation", "_attn_implementation"):
            check_attention(config_dict.get(name))
        _check_layers(
            config_dict.get("folded_layers"), config_dict.get("num_hidden_layers", config_dict.get("n_layer"))
        )
        if "transformer_lens" in sys.modules:  # whose loader reads the configuration first, and then needs an adapter
            import_module("tl_sparsify.folding.boot")
        return super(config_class, cls).from_dict(config_dict, **kwargs)

    fields = {"folded_layers": None, "__annotations__": {"folded_layers": list[dict[str, Any]] | None}}
    fields |= {"__module__": __name__, "model_type": f"tl_sparsify_{base_config.model_type}"}
    fields |= {"from_dict": classmethod(from_dict)}
    config_class: Any = type(f"Folded{base_config.__name__}", (base_config,), fields)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        resize = _RESIZE.get(base, _resize_llama)
        for layer, (block, sizes) in enumerate(zip(layers_of(self, base), config.folded_layers, strict=True)):
            resize(block, config.hidden_size, layer, sizes)

    members = {"__init__": build, "config_class": config_class, "__module__": __name__}
    model_class = type(f"Folded{base.__name__}", (base,), members)
    AutoConfig.register(config_class.model_type, config_class)  # type: ignore[attr-defined]
    AutoModelForCausalLM.register(config_class, model_class)
    return model_class


_BASES = (
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
)
CLASSES = {base.__name__: _folded_class(base) for base in _BASES}
"""The class of folded models of each architecture, by the name that ``model.cfg.architecture`` has."""
