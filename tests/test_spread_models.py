"""Models whose weights are elsewhere (offloaded) or packed (quantised): scores and searches are those of the plain
model, and folding refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers.architectures import CONFIGS, batch
from helpers.models import unchecked
from helpers.native import randomised
from torch import Tensor, nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import tl_sparsify as tls
from tl_sparsify.core.memory import device_of, dtype_of, example_bytes

CPU = torch.device("cpu")
Change = Callable[[Any, Path], Any]


class Int8(nn.Linear):
    """A linear map as a quantiser leaves it: one packed column of int8, a scale for each output."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8).reshape(-1, 1)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias
        self.register_buffer("scale", scale)

    @property
    def unpacked(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.unpacked.to(input), self.bias)


def linears(model: Any) -> dict[str, Int8]:
    named = {name: module for name, module in model.named_modules() if name.startswith("model.layers")}
    return {name: Int8(module) for name, module in named.items() if isinstance(module, nn.Linear)}


def quantised(model: Any, _: Path) -> None:
    for name, packed in linears(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)


def rounded(model: Any, _: Path) -> None:
    """The plain model of the same numbers."""
    for name, packed in linears(model).items():
        model.get_submodule(name).weight.data = packed.unpacked


def mapped(model: Any, folder: Path) -> None:
    """As ``device_map`` puts it where there is room for some layers only: one on the CPU's disk, the others here."""
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    dispatch_model(model, layers | rest, main_device="cpu", offload_dir=str(folder), force_hooks=True)


SPREAD: dict[str, Change] = {
    "on the CPU": lambda model, _: cpu_offload(model, execution_device=CPU),
    "on disk": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "some on disk": mapped,
    "int8": quantised,
}


def bridge(name: str, change: Change, folder: Path) -> Any:
    architecture, settings = CONFIGS[name]
    kind = getattr(transformers, architecture)
    config = kind.config_class(**settings)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        model = randomised(kind(config).double(), scale=0.4).eval()
    change(model, folder)
    return build_bridge_from_module(model, architecture, hf_config=config).eval()


def plain(name: str, how: str, folder: Path) -> Any:
    return bridge(name, rounded if how == "int8" else lambda *_: None, folder)


CASES = [(name, how) for name in ("Llama", "GPT-2") for how in SPREAD if name == "Llama" or how.startswith("on")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_scores_and_searches_are_those_of_the_plain_model(name: str, how: str, tmp_path: Path):
    whole, model, data = plain(name, how, tmp_path), bridge(name, SPREAD[how], tmp_path), batch(7)
    units = tls.heads(whole) + tls.neurons(whole)
    with unchecked():
        assert tls.heads(model) + tls.neurons(model) == units
        for score in (tls.score.risk, tls.score.scaled_variance, tls.score.gradient):
            mine, other = (score(one, data, units).scores for one in (model, whole))
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
        exact = [tls.score.exact(one, data, units, progress=False).scores for one in (model, whole)]
        torch.testing.assert_close(*exact, rtol=1e-9, atol=1e-12)
        paths = [tls.sparsify(one, data, units, rounds=2, smallest=0.3, progress=False) for one in (model, whole)]
        assert torch.equal(paths[0].order, paths[1].order)
        fits = [
            tls.constants.refit(one, path.at(0.5), data, data, steps=3, progress=False)
            for one, path in zip((model, whole), paths, strict=True)
        ]
        risks = [tls.risk(one, fit, data).mean for one, fit in zip((model, whole), fits, strict=True)]
        assert risks[0] == pytest.approx(risks[1], rel=1e-9)


@pytest.mark.parametrize("how", SPREAD)
def test_folding_refuses_by_name(how: str, tmp_path: Path):
    model, data = bridge("Llama", SPREAD[how], tmp_path), batch(7)
    with unchecked():
        units = tls.heads(model) + tls.neurons(model)
        values = tls.constants.mean(model, data, units)
        half = tls.constants.reduced(model, tls.score.variance(model, data, units).top(0.5), values)
        said = "q_proj is a Int8, which does not fold" if how == "int8" else "_proj is offloaded and has no weights"
        with pytest.raises(ValueError, match=said):
            tls.fold(model, half)


@pytest.mark.parametrize("how", ["on the CPU", "on disk", "some on disk"])
def test_an_offloaded_model_is_the_same_model(how: str, tmp_path: Path):
    whole, model = plain("Llama", how, tmp_path), bridge("Llama", SPREAD[how], tmp_path)
    assert tls.fingerprint(model) == tls.fingerprint(whole)
    other = plain("Llama", how, tmp_path)
    with torch.no_grad():
        other.original_model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    assert tls.fingerprint(other) != tls.fingerprint(model)


def test_what_packed_weights_take_is_what_plain_ones_take(tmp_path: Path):
    whole, model = (bridge("Llama", change, tmp_path) for change in (rounded, quantised))
    assert example_bytes(model, batch(7), narrow=True) == example_bytes(whole, batch(7), narrow=True)


def test_inputs_go_where_an_offloaded_model_runs(tmp_path: Path):
    model = bridge("Llama", SPREAD["on disk"], tmp_path)
    assert next(iter(model.parameters())).is_meta
    assert device_of(model) == CPU and dtype_of(model) == torch.float64
    assert device_of(bridge("Llama", quantised, tmp_path)) == CPU


def test_a_model_without_weights_anywhere_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="meta device, without its weights: load it onto cpu or cuda"):
        device_of(model)
