"""Verification on networks whose every neuron is known: accuracies are worked out with the causal model alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule, TransformerBridge, TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint

from tl_sparsify import (
    Alignment,
    CausalModel,
    Circuit,
    Evidence,
    Examples,
    Pairs,
    Reduction,
    Site,
    Unit,
    Units,
    Values,
    ablate,
    fingerprint,
    fold,
    heads,
    intervened,
    neurons,
    verify,
)

SYMBOLS = 3
INPUTS = ("a", "b", "c", "d")
EVERY = np.array(list(itertools.product(range(SYMBOLS), repeat=4)))
SAME, DIFFERENT = 0, 1
ANSWERS = {True: SAME, False: DIFFERENT}
EQUALITY = CausalModel(
    INPUTS,
    {"left": lambda a, b: a == b, "right": lambda c, d: c == d, "same": lambda left, right: left == right},
    "same",
)
FIRST = Site("neuron", 0, "hook_first", 2 * SYMBOLS + 2)
SECOND = Site("neuron", 1, "hook_second", 4)
UNITS = Units((FIRST, SECOND))
LEFT = [Unit(FIRST, i) for i in range(SYMBOLS)]  # neuron i: a = b = i
RIGHT = [Unit(FIRST, SYMBOLS + i) for i in range(SYMBOLS)]  # neuron i: c = d = i
BOTH, NEITHER = Unit(SECOND, 0), Unit(SECOND, 1)
UNREAD = [Unit(FIRST, 2 * SYMBOLS), Unit(SECOND, 2)]
TRUE = Alignment({"left": LEFT, "right": RIGHT, "same": [BOTH, NEITHER]})


class Network(HookedRootModule):
    """Hierarchical equality in two layers of ReLU neurons, worked out by hand.

    First layer: ``a = b = s``, ``c = d = s`` for every symbol s, and two neurons that nobody reads (a = 0, d = 0).
    Second: both pairs equal, neither, one that nobody reads, and one that answers "different", whatever the rest, on
    inputs with a = ``blind``.
    """

    def __init__(self, blind: int | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4 * SYMBOLS, FIRST.size), nn.Linear(FIRST.size + SYMBOLS, SECOND.size)
        self.out = nn.Linear(SECOND.size, 2)
        self.hook_first, self.hook_second = HookPoint(), HookPoint()
        self.setup()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for symbol, side in itertools.product(range(SYMBOLS), range(2)):
                neuron, start = side * SYMBOLS + symbol, 2 * side * SYMBOLS + symbol
                self.first.weight[neuron, [start, start + SYMBOLS]] = 1.0
                self.first.bias[neuron] = -1.0
            self.first.weight[2 * SYMBOLS, 0] = self.first.weight[2 * SYMBOLS + 1, 3 * SYMBOLS] = 1.0
            self.second.weight[0, : 2 * SYMBOLS], self.second.bias[0] = 1.0, -1.0
            self.second.weight[1, : 2 * SYMBOLS], self.second.bias[1] = -1.0, 1.0
            self.second.weight[2, 0] = 1.0
            if blind is not None:
                self.second.weight[3, FIRST.size + blind] = 1.0
            self.out.weight[SAME, :2] = 1.0
            self.out.bias[DIFFERENT], self.out.weight[DIFFERENT, 3] = 0.5, 9.0
        self.double().eval()

    def forward(self, tokens: Tensor) -> Tensor:
        seen = nn.functional.one_hot(tokens, SYMBOLS).double().flatten(1)
        first = self.hook_first(self.first(seen).relu())
        return self.out(self.hook_second(self.second(torch.cat([first, seen[:, :SYMBOLS]], 1)).relu()))


def named(rows: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(INPUTS, rows.T, strict=True))


def examples(rows: np.ndarray, **more: Any) -> Examples:
    labels = [[ANSWERS[bool(same)]] for same in EQUALITY.run(named(rows))["same"]]
    return Examples(torch.tensor(rows), torch.tensor(labels), **more)


def drawn(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return EVERY[rng.integers(len(EVERY), size=n)], EVERY[rng.integers(len(EVERY), size=n)]


def pairs_of(base: np.ndarray, source: np.ndarray, answers: Mapping[Any, int] = ANSWERS) -> Pairs:
    return Pairs(named(base), named(source), examples(base), examples(source), answers)


def swapped(base: np.ndarray, source: np.ndarray, *variables: str) -> np.ndarray:
    """What the network answers when it runs ``EQUALITY`` and these variables come from the source."""
    return EQUALITY.interchange(named(base), {name: named(source) for name in variables})["same"]


def rows_of(evidence: Evidence, **wanted: str) -> pd.DataFrame:
    frame = evidence.to_frame()
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame


def row(evidence: Evidence, variable: str, model: str = "original", intervention: str = "aligned units") -> Any:
    found = rows_of(evidence, variable=variable, model=model, intervention=intervention)
    assert len(found) == 1
    return next(found.itertuples())


def removal(model: Any, gone: Sequence[Unit], value: float = 0.0) -> Reduction:
    values = Values(UNITS, tuple(torch.full((site.size, 1), value, dtype=torch.float64) for site in UNITS.sites))
    return Reduction(~Circuit.of(UNITS, gone), values, fingerprint=fingerprint(model))


def answered(model: Any, rows: np.ndarray, reduction: Reduction | None = None) -> np.ndarray:
    with torch.no_grad(), intervened(model, *(() if reduction is None else (ablate(reduction),))):
        return model(torch.tensor(rows)).argmax(1).numpy() == SAME


def test_the_network_is_right_on_every_input():
    assert (answered(Network(), EVERY) == EQUALITY.run(named(EVERY))["same"]).all()


def test_the_true_alignment_has_accuracy_one_for_every_variable():
    base, source = drawn()
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, source))
    for variable in ("left", "right", "same"):
        found = row(evidence, variable)
        assert (found.accuracy, found.stderr, found.accuracy_changed) == (1.0, 0.0, 1.0)
        assert (found.pairs, found.retained, found.removed) == (400, 1.0, 0)
        assert found.units == len(TRUE.units[variable])
        assert evidence.accuracy(variable) == 1.0


def test_doing_nothing_is_right_where_the_variable_does_not_change_the_answer():
    base, source = drawn()
    plain = EQUALITY.run(named(base))["same"]
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, source))
    for variable in ("left", "right", "same"):
        found = row(evidence, variable, intervention="do nothing")
        unchanged = swapped(base, source, variable) == plain
        assert 0 < unchanged.mean() < 1
        assert found.accuracy == unchanged.mean()
        assert found.accuracy_changed == 0 and found.units == 0
        assert found.stderr == pytest.approx(unchanged.std() / np.sqrt(len(unchanged)))


def test_units_that_nobody_reads_do_as_well_as_doing_nothing():
    evidence = verify(Network(), EQUALITY, Alignment({"left": UNREAD, "same": UNREAD}), pairs_of(*drawn()))
    for variable in ("left", "same"):
        aligned, nothing = row(evidence, variable), row(evidence, variable, intervention="do nothing")
        assert (aligned.accuracy, aligned.accuracy_changed) == (nothing.accuracy, 0.0)
        assert (aligned.units, nothing.units) == (2, 0)


@pytest.mark.parametrize(
    ("units", "carried"), [(RIGHT, ("right",)), (LEFT + RIGHT, ("left", "right")), ([BOTH, NEITHER], ("same",))]
)
def test_units_of_another_variable_have_the_accuracy_that_the_causal_model_says(
    units: list[Unit], carried: tuple[str, ...]
):
    base, source = drawn()
    found = row(verify(Network(), EQUALITY, Alignment({"left": units}), pairs_of(base, source)), "left")
    wanted, given = swapped(base, source, "left"), swapped(base, source, *carried)
    changed = wanted != EQUALITY.run(named(base))["same"]
    assert found.accuracy == (wanted == given).mean() < 0.9
    assert found.accuracy_changed == (wanted == given)[changed].mean()


def test_half_of_a_variables_units_are_right_for_the_pairs_that_they_decide():
    base, source = drawn()
    found = row(verify(Network(), EQUALITY, Alignment({"left": LEFT[:1]}), pairs_of(base, source)), "left")
    one = (base[:, :2] == 0).all(1), (source[:, :2] == 0).all(1)
    left = EQUALITY.run(named(base))["left"].astype(int) - one[0] + one[1]  # the sum of the first layer's neurons
    total = left + EQUALITY.run(named(base))["right"]
    answers = np.maximum(total - 1, 0) + np.maximum(1 - total, 0) > 0.5
    assert found.accuracy == (answers == swapped(base, source, "left")).mean() < 1


class Parity(HookedRootModule):
    """The same answers over two symbols from the number of ones: no neurons carry ``left``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.hook_first = HookPoint()
        self.setup()
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.first.bias.copy_(-torch.arange(4.0))
            self.out.weight.zero_()
            self.out.weight[DIFFERENT] = torch.tensor([1.0, -2.0, 2.0, -2.0])
            self.out.bias.copy_(torch.tensor([0.5, 0.0]))
        self.double().eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.hook_first(self.first(tokens.double()).relu()))


def test_a_model_without_the_variable_has_no_units_that_carry_it():
    two = np.array(list(itertools.product(range(2), repeat=4)))
    base, source = np.repeat(two, 16, 0), np.tile(two, (16, 1))
    site = Site("neuron", 0, "hook_first", 4)
    best: dict[str, float] = {"left": 0.0, "right": 0.0, "same": 0.0}
    for size in range(1, 5):
        for chosen in itertools.combinations(range(4), size):
            alignment = Alignment({name: [Unit(site, i) for i in chosen] for name in best})
            evidence = verify(Parity(), EQUALITY, alignment, pairs_of(base, source), draws=0)
            assert row(evidence, "left").retained == 1
            best = {name: max(best[name], evidence.accuracy(name)) for name in best}
    assert best["same"] == 1
    assert best["left"] == best["right"] < 0.7


def test_only_pairs_that_the_model_answers_right_on_both_inputs_count():
    base, source = drawn()
    evidence = verify(Network(blind=1), EQUALITY, TRUE, pairs_of(base, source))
    same = EQUALITY.run(named(base))["same"], EQUALITY.run(named(source))["same"]
    wrong = (base[:, 0] == 1) & same[0], (source[:, 0] == 1) & same[1]
    retained = ~(wrong[0] | wrong[1])
    assert 0.5 < retained.mean() < 1
    for variable in ("left", "right", "same"):
        wanted = swapped(base, source, variable)
        nothing = row(evidence, variable, intervention="do nothing")
        assert nothing.retained == retained.mean() and nothing.pairs == retained.sum()
        assert nothing.accuracy == (wanted == same[0])[retained].mean()
        aligned = row(evidence, variable)
        given = wanted & (base[:, 0] != 1)  # the blind neuron is not interchanged
        assert aligned.accuracy == (given == wanted)[retained].mean()
        changed = retained & (wanted != same[0])
        assert aligned.accuracy_changed == (given == wanted)[changed].mean()
        assert row(evidence, variable, intervention="random units").pairs == 5 * retained.sum()


def test_no_pair_retained_gives_no_number():
    different = EVERY[~EQUALITY.run(named(EVERY))["same"]][:20]
    model = Network()
    with torch.no_grad():
        model.out.bias[SAME] = 100.0
    evidence = verify(model, EQUALITY, TRUE, pairs_of(different, different))
    frame = rows_of(evidence, model="original")
    assert (frame.retained == 0).all() and (frame.pairs == 0).all()
    assert frame.accuracy.isna().all() and frame.accuracy_changed.isna().all() and frame.stderr.isna().all()


def test_pairs_in_which_no_answer_changes_have_no_accuracy_changed():
    base, _ = drawn(30)
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, base))
    frame = rows_of(evidence, model="original")
    assert (frame.accuracy == 1).all() and frame.accuracy_changed.isna().all()


def test_random_weights_are_judged_on_all_pairs():
    base, source = drawn()
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, source))
    frame = rows_of(evidence, model="random weights")
    assert set(frame.intervention) == {"aligned units", "do nothing"}
    assert (frame.pairs == 400).all() and (frame.retained < 1).all()
    assert (rows_of(evidence, model="random weights", intervention="aligned units").accuracy < 0.9).all()


def test_removed_aligned_units_are_not_interchanged_and_are_counted():
    base, source = drawn()
    model = Network()
    reduction = removal(model, [LEFT[0], RIGHT[1], RIGHT[2]])
    evidence = verify(model, EQUALITY, TRUE, pairs_of(base, source), reduced=reduction)
    assert [row(evidence, v, "reduced").removed for v in ("left", "right", "same")] == [1, 2, 0]
    assert [row(evidence, v, "reduced").units for v in ("left", "right", "same")] == [2, 1, 2]
    assert [row(evidence, v).removed for v in ("left", "right", "same")] == [0, 0, 0]
    assert evidence.accuracy("left") == 1

    def seen(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b, c, d = rows.T
        return (a == b) & (a != 0), (c == d) & (c == 0)

    (left, right), (other, _) = seen(base), seen(source)
    right_on_both = ((left == right) == EQUALITY.run(named(base))["same"]) & (
        (seen(source)[0] == seen(source)[1]) == EQUALITY.run(named(source))["same"]
    )
    found = row(evidence, "left", "reduced")
    assert found.retained == right_on_both.mean() < 1
    assert found.accuracy == ((other == right) == swapped(base, source, "left"))[right_on_both].mean()


def test_all_aligned_units_removed_is_doing_nothing():
    model = Network()
    evidence = verify(model, EQUALITY, TRUE, pairs_of(*drawn()), reduced=removal(model, LEFT))
    aligned, nothing = row(evidence, "left", "reduced"), row(evidence, "left", "reduced", "do nothing")
    assert (aligned.units, aligned.removed) == (0, 3)
    assert aligned.accuracy == nothing.accuracy


def test_the_interchange_of_a_reduction_takes_values_of_the_reduced_models_own_run():
    base, source = drawn()
    model = Network()
    reduction = removal(model, LEFT, value=1.0)  # a = b three times over: BOTH is then positive, whatever the input
    evidence = verify(model, EQUALITY, Alignment({"same": [BOTH, NEITHER]}), pairs_of(base, source), reduced=reduction)
    assert (answered(model, base, reduction)).all()
    retained = EQUALITY.run(named(base))["same"] & EQUALITY.run(named(source))["same"]
    found = row(evidence, "same", "reduced")
    assert found.pairs == retained.sum() and found.accuracy == 1


def test_units_of_which_the_reduction_knows_nothing_are_still_there():
    model = Network()
    first = Units((FIRST,))
    values = Values(first, (torch.zeros(FIRST.size, 1, dtype=torch.float64),))
    reduction = Reduction(~Circuit.of(first, UNREAD[:1]), values)
    evidence = verify(model, EQUALITY, TRUE, pairs_of(*drawn()), reduced=reduction)
    found = row(evidence, "same", "reduced")
    assert (found.accuracy, found.units, found.removed) == (1.0, 2, 0)


def test_batches_do_not_matter():
    frames = [
        verify(Network(blind=2), EQUALITY, TRUE, pairs_of(*drawn(13)), batch_size=size).to_frame()
        for size in (1, 5, None)
    ]
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    pd.testing.assert_frame_equal(frames[0], frames[2], check_exact=True)


def test_the_same_seed_gives_the_same_evidence_and_another_one_other_controls():
    alignment = Alignment({"left": LEFT[:2]})
    same = [verify(Network(), EQUALITY, alignment, pairs_of(*drawn()), seed=3).to_frame() for _ in range(2)]
    pd.testing.assert_frame_equal(*same, check_exact=True)
    evidence = [verify(Network(), EQUALITY, alignment, pairs_of(*drawn()), seed=seed) for seed in range(5)]
    assert len({row(e, "left", intervention="random units").accuracy for e in evidence}) > 1
    assert len({row(e, "left").accuracy for e in evidence}) == 1


def test_random_units_are_as_many_of_the_same_site_outside_the_alignment():
    alignment = Alignment({"same": [BOTH, NEITHER]})  # outside are the one that nobody reads and the blind one, silent
    evidence = verify(Network(), EQUALITY, alignment, pairs_of(*drawn()), draws=3)
    random, nothing = (row(evidence, "same", intervention=name) for name in ("random units", "do nothing"))
    assert (random.units, random.pairs, random.accuracy) == (2, 3 * 400, nothing.accuracy)


def test_random_units_are_aligned_ones_where_there_are_no_others():
    alignment = Alignment({"left": LEFT + RIGHT})
    evidence = verify(Network(), EQUALITY, alignment, pairs_of(*drawn()), draws=4)
    found = row(evidence, "left", intervention="random units")
    assert (found.units, found.pairs) == (6, 4 * 400)
    assert found.accuracy != row(evidence, "left", intervention="do nothing").accuracy


def test_no_draws_no_random_control():
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(20)), draws=0)
    assert "random units" not in set(evidence.to_frame().intervention)


def state_of(model: Any) -> tuple[Any, ...]:
    modules = [module.training for module in model.modules()]
    hooks = [name for name, hook in model.hook_dict.items() if hook.has_hooks()]
    gradients = [(p.requires_grad, p.grad) for p in model.parameters()]
    return fingerprint(model), modules, hooks, gradients, torch.get_rng_state().tolist()


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = Network()
    model.first.bias.requires_grad_(False)
    before = state_of(model)
    verify(model, EQUALITY, TRUE, pairs_of(*drawn(20)), reduced=removal(model, LEFT))
    assert state_of(model) == before and before[2] == []


def test_the_model_is_left_as_it_was_after_an_exception():
    model = Network()
    before = state_of(model)
    nowhere = Alignment({"left": [unit.at(1) for unit in LEFT]})  # the network has one position
    with pytest.raises(ValueError, match="positions 1 of hook_first lie outside an input of length 1"):
        verify(model, EQUALITY, nowhere, pairs_of(*drawn(20)), reduced=removal(model, RIGHT))
    assert state_of(model) == before and before[2] == []


def test_an_unknown_variable_is_refused_by_name():
    with pytest.raises(ValueError, match="alignment names 'middle'; the causal model has left, right, same"):
        verify(Network(), EQUALITY, Alignment({"left": LEFT, "middle": LEFT}), pairs_of(*drawn(8)))


def test_an_empty_alignment_is_refused():
    with pytest.raises(ValueError, match="alignment of 'right' is empty"):
        Alignment({"left": LEFT, "right": []})


def test_answers_without_a_token_are_refused():
    with pytest.raises(ValueError, match=r"answers has no token for the causal model's output \['False'\]"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(), answers={True: SAME}))


@pytest.mark.parametrize("which", ["model", "reduced"])
def test_a_model_in_training_mode_is_refused(which: str):
    model, small = native(), fold(native(), reduction_of_native([]))
    (model if which == "model" else small).train()
    with pytest.raises(ValueError, match=r"model is in training mode.*call model\.eval\(\)"):
        verify(model, PARITY, NATIVE, native_pairs(), reduced=small)


def test_units_of_another_model_are_refused():
    elsewhere = Alignment({"left": [Unit(Site("neuron", 0, "hook_third", 3), 0)]})
    with pytest.raises(ValueError, match="no hook point 'hook_third'"):
        verify(Network(), EQUALITY, elsewhere, pairs_of(*drawn(8)))
    larger = Alignment({"left": [Unit(Site("neuron", 0, "hook_first", 99), 50)]})
    with pytest.raises(ValueError, match=r"hook_first yields \(8, 8\); a site of 99 neuron units"):
        verify(Network(), EQUALITY, larger, pairs_of(*drawn(8)))


def test_a_reduction_of_another_model_is_refused():
    with pytest.raises(ValueError, match="reduction was made for the model"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)), reduced=removal(Network(blind=0), LEFT))


def test_a_model_that_was_not_folded_is_refused_as_reduced():
    with pytest.raises(ValueError, match="give a model made by fold"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)), reduced=Network())


def test_what_is_no_evidence_is_named():
    evidence = verify(Network(), EQUALITY, Alignment({"left": LEFT}), pairs_of(*drawn(8)))
    with pytest.raises(KeyError, match=r"no evidence for .*'right'.*there is.*'left'"):
        evidence.accuracy("right")


def test_reprs_are_one_line():
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)))
    assert "left 1.000 (original)" in repr(evidence) and "\n" not in repr(evidence)
    assert repr(TRUE) == "Alignment(left: 3 units, right: 3 units, same: 2 units)"
    assert TRUE.variables == ("left", "right", "same")


def changed_pairs(**changes: Callable[[Pairs], Any]) -> Pairs:
    whole = pairs_of(*drawn(8))
    parts = {name: getattr(whole, name) for name in ("base_inputs", "source_inputs", "base", "source", "answers")}
    return Pairs(**parts | {name: change(whole) for name, change in changes.items()})


def test_pairs_that_do_not_belong_together_are_refused():
    assert len(changed_pairs()) == 8
    with pytest.raises(ValueError, match="source has 5 examples, base 8: pairs need equal numbers"):
        changed_pairs(source=lambda pairs: pairs.source[:5])
    with pytest.raises(ValueError, match=r"source_inputs\['b'\] has 3 values for 8 pairs"):
        changed_pairs(source_inputs=lambda pairs: pairs.source_inputs | {"b": np.zeros(3)})
    several = torch.zeros(8, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="base has examples with several labels"):
        changed_pairs(base=lambda pairs: Examples(pairs.base.tokens, several))
    with pytest.raises(ValueError, match="source has examples with several labels"):
        changed_pairs(source=lambda pairs: Examples(pairs.source.tokens, several))


VOCABULARY, POSITIONS = 6, 4
PARITY = CausalModel(
    ("x", "y"),
    {"odd": lambda x: x % 2, "more": lambda y: y > 2, "answer": lambda odd, more: odd + 2 * more},
    "answer",
)


@cache
def shared_native() -> Any:
    config = {"d_model": 16, "d_head": 4, "n_heads": 4, "n_layers": 2, "n_ctx": POSITIONS, "d_vocab": VOCABULARY}
    config |= {"d_mlp": 20, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return model.eval()


def native() -> Any:
    """A small transformer with random weights: right by luck."""
    return copy.deepcopy(shared_native())


NATIVE = Alignment(
    {
        "odd": [Unit(Site("head", 0, "blocks.0.attn.hook_z", 4, at), i) for at, i in ((1, 0), (None, 2))],
        "more": [Unit(Site("neuron", 1, "blocks.1.mlp.hook_post", 20, (2, 3)), i) for i in range(0, 20, 2)],
        "answer": [Unit(Site("neuron", layer, f"blocks.{layer}.mlp.hook_post", 20), 3) for layer in (0, 1)],
    }
)


def native_pairs(n: int = 100, seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)

    def side() -> tuple[dict[str, np.ndarray], Examples]:
        tokens = rng.integers(VOCABULARY, size=(n, POSITIONS))
        inputs = {"x": tokens[:, 1], "y": tokens[:, 2]}
        labels = np.full_like(tokens, -100)
        labels[:, 3] = PARITY.run(inputs)["answer"]
        return inputs, Examples(torch.tensor(tokens), torch.tensor(labels), choices=torch.arange(4))

    (base_inputs, base), (source_inputs, source) = side(), side()
    return Pairs(base_inputs, source_inputs, base, source, {i: i for i in range(4)})


def reduction_of_native(gone: Sequence[str], seed: int = 0) -> Reduction:
    model = shared_native()
    units = heads(model) + neurons(model)
    generator = torch.Generator().manual_seed(seed)
    widths = {"head": 4, "neuron": 1}
    values = Values(units, tuple(torch.randn(s.size, widths[s.kind], generator=generator) for s in units.sites))
    return Reduction(~Circuit.of(units, gone), values, fingerprint=fingerprint(model))


@pytest.mark.parametrize(
    "gone",
    [
        [],
        ["L0H1", "L0H2", *(f"L1N{i}" for i in range(10)), "L0N3"],
        ["L0H0", "L0H2", *(f"L1N{i}" for i in range(20)), "L0N0", "L0N1"],
    ],
)
def test_a_reduction_and_its_folded_model_give_the_same_evidence(gone: list[str]):
    model, reduction = native(), reduction_of_native(gone)
    frames = [
        verify(model, PARITY, NATIVE, native_pairs(), reduced=reduced, draws=2, seed=5).to_frame()
        for reduced in (reduction, fold(model, reduction))
    ]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    [reduced] = [frame[frame.model == "reduced"] for frame in frames[1:]]
    removed = {v: sum(unit.at(None).name in gone for unit in NATIVE.units[v]) for v in NATIVE.variables}
    aligned = reduced[reduced.intervention == "aligned units"]
    assert dict(zip(aligned.variable, aligned.removed, strict=True)) == removed
    assert 0 < reduced.retained.iloc[0] < 1


def test_the_ceiling_is_the_best_layer_at_the_alignments_positions():
    evidence = verify(native(), PARITY, NATIVE, native_pairs())
    odd = row(evidence, "odd", intervention="whole residual stream")
    assert odd.units == 1 and odd.pairs == row(evidence, "odd").pairs
    ceiling = Alignment({"answer": [Unit(Site("residual", 1, "blocks.1.hook_resid_post", 1), 0)]})
    assert verify(native(), PARITY, ceiling, native_pairs()).accuracy("answer") == 1
    assert row(evidence, "answer", intervention="whole residual stream").accuracy == 1


def test_positions_for_each_pair_are_the_same_as_one_position_for_all():
    where = torch.full((50,), 3)
    frames = []
    for positions, size in ((3, None), (where, None), (where, 20)):
        stream = Site("residual", 0, "blocks.0.hook_resid_post", 1, positions)
        alignment = Alignment({"answer": [Unit(stream, 0)]})
        frames.append(verify(native(), PARITY, alignment, native_pairs(50), draws=1, batch_size=size).to_frame())
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    pd.testing.assert_frame_equal(frames[0], frames[2], check_exact=True)


def test_the_residual_stream_of_a_folded_model_is_still_there():
    stream = Alignment({"answer": [Unit(Site("residual", 1, "blocks.1.hook_resid_post", 1, 3), 0)]})
    reduction = reduction_of_native(["L0H0", "L1N3", "L1N4"])
    for reduced in (reduction, fold(native(), reduction)):
        found = row(verify(native(), PARITY, stream, native_pairs(), reduced=reduced), "answer", "reduced")
        assert (found.accuracy, found.units, found.removed) == (1.0, 1, 0)
