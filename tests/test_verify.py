"""Verification on networks whose every neuron is known: accuracies are worked out with the causal model alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.architectures import bridge as hugging_face
from helpers.equality import (
    BOTH,
    DIFFERENT,
    EQUALITY,
    EVERY,
    FIRST,
    LEFT,
    NEITHER,
    RIGHT,
    SAME,
    SECOND,
    TRUE,
    UNITS,
    UNREAD,
    Network,
    counted,
    drawn,
    named,
    pairs_of,
    removal,
)
from helpers.models import unchanged
from torch import Tensor, nn
from transformer_lens import HookedRootModule, TransformerBridge, TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.tools.analysis.interchange import (
    NormMatchedPlacebo,
    SubspaceInterchange,
    collect_activations,
    intervened_logits,
    random_basis,
)

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
    directions,
    fingerprint,
    fold,
    heads,
    intervened,
    neurons,
    verify,
)
from tl_sparsify.abstraction.certificates import confidence_sequence


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
    frame = frame[~frame.intervention.isin(["arbitrary labels", "aligned units, a source each"])]  # others' answers
    assert (frame.accuracy == 1).all() and frame.accuracy_changed.isna().all()


def test_random_weights_are_judged_on_all_pairs():
    base, source = drawn()
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, source))
    frame = rows_of(evidence, model="random weights")
    assert set(frame.intervention) == {"aligned units", "aligned units, a source each", "do nothing"}
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


def answered_by(model: Any, pairs: Pairs, reduction: Reduction | None = None) -> Pairs:
    """The same pairs with what the model answers as labels: all are retained."""

    def side(examples: Examples) -> Examples:
        labels = torch.full_like(examples.labels, -100)
        with torch.no_grad(), intervened(model, *(() if reduction is None else (ablate(reduction),))):
            labels[:, 3] = model(examples.tokens)[:, 3, :4].argmax(1)
        return Examples(examples.tokens, labels, choices=examples.choices)

    return Pairs(pairs.base_inputs, pairs.source_inputs, side(pairs.base), side(pairs.source), pairs.answers)


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
    pairs = answered_by(model, native_pairs(), reduction)
    frames = [
        verify(model, PARITY, NATIVE, pairs, reduced=reduced, draws=2, seed=5).to_frame()
        for reduced in (reduction, fold(model, reduction))
    ]
    risks = [frame.pop("risk") for frame in frames]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    pd.testing.assert_series_equal(*risks, rtol=1e-5, atol=1e-6)  # norms are in float32
    original, reduced = (frames[1][frames[1].model == name] for name in ("original", "reduced"))
    removed = {v: sum(unit.at(None).name in gone for unit in NATIVE.units[v]) for v in NATIVE.variables}
    aligned = reduced[(reduced.intervention == "aligned units") & reduced.variable.isin(NATIVE.variables)]
    assert dict(zip(aligned.variable, aligned.removed, strict=True)) == removed
    assert (reduced.retained == 1).all()
    assert not gone or 0 < original.retained.iloc[0] < 1


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


def next_sources(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, -1, axis=0)


def test_variables_are_interchanged_jointly_from_one_source_and_from_a_source_each():
    base, source = drawn()
    crossed = Alignment({"left": RIGHT, "right": LEFT, "same": [BOTH, NEITHER]})
    for alignment, carried in ((TRUE, ("left", "right")), (crossed, ("right", "left"))):
        evidence = verify(Network(), EQUALITY, alignment, pairs_of(base, source), draws=1)
        for name, second in (("aligned units", source), ("aligned units, a source each", next_sources(source))):
            sources = {"left": named(source), "right": named(second)}
            wanted = EQUALITY.interchange(named(base), sources)["same"]
            taken = dict(zip(carried, sources.values(), strict=True))
            given = EQUALITY.interchange(named(base), taken)["same"]
            found = row(evidence, "left & right", intervention=name)
            assert (found.accuracy, found.units, found.removed) == ((given == wanted).mean(), 6, 0)
            changed = wanted != EQUALITY.run(named(base))["same"]
            assert found.accuracy_changed == (given == wanted)[changed].mean()
            assert (found.accuracy == 1) == (alignment is TRUE or name == "aligned units")


def test_pairs_jointly_interchanged_are_right_on_all_their_inputs():
    base, source = drawn()
    evidence = verify(Network(blind=1), EQUALITY, TRUE, pairs_of(base, source), draws=0)

    def right(rows: np.ndarray) -> np.ndarray:
        return ~((rows[:, 0] == 1) & EQUALITY.run(named(rows))["same"])

    one = right(base) & right(source)
    each = one & right(next_sources(source))
    assert row(evidence, "left & right").retained == one.mean()
    found = row(evidence, "left & right", intervention="aligned units, a source each")
    assert (found.retained, found.pairs) == (each.mean(), each.sum()) and found.pairs < one.sum()


def test_only_variables_without_an_aligned_ancestor_go_together():
    for alignment, joint in (
        (Alignment({"left": LEFT, "same": [BOTH]}), set()),
        (Alignment({"same": [BOTH]}), set()),
        (Alignment({"right": RIGHT, "left": LEFT}), {"right & left"}),
    ):
        frame = verify(Network(), EQUALITY, alignment, pairs_of(*drawn(20)), draws=0).to_frame()
        assert {name for name in frame.variable if "&" in name} == joint


def test_a_reduction_without_the_units_of_a_variable_is_counted_jointly():
    model = Network()
    evidence = verify(model, EQUALITY, TRUE, pairs_of(*drawn(40)), reduced=removal(model, LEFT), draws=0)
    found = row(evidence, "left & right", "reduced")
    assert (found.units, found.removed) == (3, 3)


def test_units_that_no_variable_is_aligned_with_change_nothing_where_the_alignment_is_whole():
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn()), draws=4)
    every = row(evidence, "(none)", intervention="all unaligned units")
    some = row(evidence, "(none)", intervention="unaligned units, at random")
    assert (every.accuracy, every.units, every.pairs) == (1, 4, 400)
    assert (some.accuracy, some.units, some.pairs) == (1, 4, 1600)
    assert np.isnan(every.accuracy_changed) and np.isnan(some.accuracy_changed)


def test_unaligned_units_that_matter_change_answers():
    base, source = drawn()
    evidence = verify(Network(), EQUALITY, Alignment({"left": LEFT}), pairs_of(base, source), draws=6)
    plain, given = EQUALITY.run(named(base))["same"], swapped(base, source, "right")
    every = row(evidence, "(none)", intervention="all unaligned units")
    some = row(evidence, "(none)", intervention="unaligned units, at random")
    assert (every.accuracy, every.units) == ((plain == given).mean(), 5)  # of the alignment's own hook point
    assert every.accuracy < some.accuracy < 1 and (some.units, some.pairs) == (3, 2400)


def test_an_alignment_with_everything_leaves_nothing_unaligned():
    every = [Unit(FIRST, i) for i in range(FIRST.size)]
    frame = verify(Network(), EQUALITY, Alignment({"left": every}), pairs_of(*drawn(20))).to_frame()
    assert "(none)" not in set(frame.variable)


AGREEMENT = "random kept units, p = 0.1"


def test_a_reduction_that_keeps_everything_agrees_with_the_original():
    model = Network()
    for reduced in (removal(model, []), removal(model, UNREAD, value=3.0)):
        found = row(verify(model, EQUALITY, TRUE, pairs_of(*drawn()), reduced=reduced), "(none)", "reduced", AGREEMENT)
        assert (found.accuracy, found.risk, found.pairs, found.retained) == (1, 0, 400, 1)
        assert found.units == pytest.approx(0.1 * reduced.circuit.mask.sum())
    both = verify(native(), PARITY, NATIVE, native_pairs(), reduced=fold(native(), reduction_of_native([])))
    found = row(both, "(none)", "reduced", AGREEMENT)
    assert found.accuracy == 1 and found.risk == pytest.approx(0, abs=1e-9) and found.units == pytest.approx(4.8)


def test_agreement_and_risk_are_those_of_random_interchanges_by_hand():
    base, source = drawn(1000, seed=3)
    model = Network()
    second = [Unit(SECOND, i) for i in range(SECOND.size)]
    reduced = removal(model, second)  # answers "different", whatever the input: logits 0 and 0.5
    found = row(verify(model, EQUALITY, TRUE, pairs_of(base, source), reduced=reduced), "(none)", "reduced", AGREEMENT)

    def first(rows: np.ndarray) -> np.ndarray:
        a, b, c, d = rows.T
        return np.stack([a == b] * 3 + [c == d] * 3, 1) & (np.stack([a] * 3 + [c] * 3, 1) == np.tile(range(3), 2))

    rng = np.random.default_rng(0)
    same, risk = [], []
    for _ in range(50):
        mixed = np.where(rng.random((1000, 6)) < 0.1, first(source), first(base)).sum(1)
        logit = np.maximum(mixed - 1, 0) + np.maximum(1 - mixed, 0) - 0.5
        p = 1 / (1 + np.exp(-logit))
        q = 1 / (1 + np.exp(0.5))
        same.append(logit < 0)
        risk.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert found.units == pytest.approx(0.8) and found.pairs == 1000
    assert abs(found.accuracy - np.mean(same)) < 4 * np.std(same) / np.sqrt(1000)
    assert abs(found.risk - np.mean(risk)) < 4 * np.std(risk) / np.sqrt(1000)


def test_a_reduction_that_keeps_nothing_is_compared_without_interchange():
    model = Network()
    every = [Unit(site, i) for site in UNITS.sites for i in range(site.size)]
    base, source = drawn()
    found = row(
        verify(model, EQUALITY, TRUE, pairs_of(base, source), reduced=removal(model, every)),
        *("(none)", "reduced", AGREEMENT),
    )
    assert (found.units, found.accuracy) == (0, (~EQUALITY.run(named(base))["same"]).mean())


def test_bounds_are_a_confidence_sequence_and_contain_the_accuracy():
    base, source = drawn()
    alignment = Alignment({"left": RIGHT, "right": LEFT, "same": [BOTH, NEITHER]})
    for level in (0.05, 0.01):
        evidence = verify(Network(blind=2), EQUALITY, alignment, pairs_of(base, source), draws=3, level=level)
        assert evidence.level == level
        for found in evidence.rows:
            assert 0 <= found.lower <= found.accuracy <= found.upper <= 1
    right = [~((rows[:, 0] == 2) & EQUALITY.run(named(rows))["same"]) for rows in (base, source)]
    hits = (swapped(base, source, "same") & (base[:, 0] != 2)) == swapped(base, source, "same")
    lower, upper = confidence_sequence(torch.tensor(hits[right[0] & right[1]]).double(), level=0.01)
    found = row(evidence, "same")
    assert (found.lower, found.upper) == (float(lower[-1]), float(upper[-1]))


def test_random_controls_are_no_more_certain_than_their_pairs():
    most = Alignment({"left": [Unit(FIRST, i) for i in range(FIRST.size - 1)]})
    few, many = (verify(Network(), EQUALITY, most, pairs_of(*drawn(100)), draws=draws) for draws in (1, 40))
    one, more = (row(evidence, "left", intervention="random units") for evidence in (few, many))
    assert (one.pairs, more.pairs) == (100, 4000)
    # the draws are much alike, and of the same pairs: forty times as many make the bounds hardly narrower
    assert more.stderr > one.stderr / 3
    assert more.upper - more.lower > (one.upper - one.lower) / 3


def test_without_other_units_there_are_no_random_ones():
    every = Alignment({"left": [Unit(FIRST, i) for i in range(FIRST.size)]})
    evidence = verify(Network(), EQUALITY, every, pairs_of(*drawn(40)))
    assert rows_of(evidence, variable="left", intervention="random units").empty


def test_made_up_answers_are_right_by_chance():
    only, arbitrary = Alignment({"left": LEFT}), ("left", "original", "arbitrary labels")
    found = row(verify(Network(), EQUALITY, only, pairs_of(*drawn(1600)), draws=0), *arbitrary)
    assert 0.3 < found.accuracy < 0.7
    again = [
        row(verify(Network(), EQUALITY, only, pairs_of(*drawn(300)), draws=0, seed=seed), *arbitrary)
        for seed in (1, 1, 2)
    ]
    assert again[0].accuracy == again[1].accuracy != again[2].accuracy


@pytest.mark.parametrize("draws", [0, 3])
def test_forward_passes_are_those_that_are_promised(draws: int):
    n, model, variables = 30, Network(), 3
    per_model = 2 + variables * (2 + draws) + (2 + 2) + (2 + draws)
    random = 2 + variables * 2 + (2 + 2)
    _, rows = counted(model, lambda: verify(model, EQUALITY, TRUE, pairs_of(*drawn(n)), draws=draws))
    assert rows == n * (per_model + random)
    reduced = removal(model, LEFT[:1])
    _, rows = counted(model, lambda: verify(model, EQUALITY, TRUE, pairs_of(*drawn(n)), draws=draws, reduced=reduced))
    assert rows == n * (2 * (per_model + 2) + random)
    _, rows = counted(model, lambda: verify(model, EQUALITY, TRUE, pairs_of(*drawn(n)), draws=draws, goal=0.95))
    assert rows == n * (per_model + random + 3 + variables)


def basis_of(rank: int, seed: int, width: int = 16) -> Tensor:
    random = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(random)[0]


def stream_units(rank: int, seed: int, where: Any, hook: str = "blocks.0.hook_resid_post") -> list[Unit]:
    return [unit.at(where) for unit in directions(native(), hook, basis_of(rank, seed))]


def test_forward_passes_of_a_transformer_with_directions():
    n, model, layers, draws = 20, native(), 2, 3
    alignment = Alignment({"odd": stream_units(2, 0, 3), "more": stream_units(2, 1, slice(1, 3))})
    # all directions of each site are aligned, so there are no random ones
    per_model = 2 + 2 * (2 + layers) + (1 + draws) + (2 + 2) + (2 + draws)
    random = 2 + 2 * 2 + (2 + 2)
    _, rows = counted(model, lambda: verify(model, PARITY, alignment, native_pairs(n), draws=draws, batch_size=7))
    assert rows == n * (per_model + random)


@pytest.mark.parametrize("goal", [0.6, 0.95])
def test_with_a_goal_fewer_pairs_lead_to_the_same_decision(goal: float):
    stopped = []
    for units in (LEFT, RIGHT, LEFT[:2]):
        alignment, pairs = Alignment({"left": units, "same": [BOTH, NEITHER]}), pairs_of(*drawn(600, seed=1))
        whole, early = (
            verify(Network(), EQUALITY, alignment, pairs, draws=0, goal=wanted).to_frame() for wanted in (None, goal)
        )
        aligned = [f[(f.model == "original") & (f.intervention == "aligned units")] for f in (whole, early)]
        decisions = [list(zip(f.lower >= goal, f.upper < goal, strict=True)) for f in aligned]
        assert (early.pairs <= 600).all()
        assert decisions[0] == decisions[1]
        assert (early.pairs == 600).all() or all(any(decision) for decision in decisions[1])
        stopped.append(early.pairs.iloc[0])
    assert stopped[0] < 400


def test_with_a_goal_the_first_pairs_are_those_reported():
    base, source = drawn(1000)
    early = verify(Network(), EQUALITY, TRUE, pairs_of(base, source), goal=0.95, seed=2)
    taken = row(early, "left").pairs
    assert taken % 64 == 0 and taken < 300
    same = verify(Network(), EQUALITY, TRUE, pairs_of(base[:taken], source[:taken]), seed=2)
    pd.testing.assert_frame_equal(early.to_frame(), same.to_frame(), check_exact=True)


def test_what_stays_uncertain_takes_all_pairs():
    base, source = drawn(300)
    accuracy = (swapped(base, source, "left") == swapped(base, source, "right")).mean()
    evidence = verify(
        Network(), EQUALITY, Alignment({"left": RIGHT}), pairs_of(base, source), goal=float(accuracy), draws=0
    )
    assert row(evidence, "left").pairs == 300


@pytest.mark.parametrize("goal", [0.0, 1.1, -1.0, float("nan")])
def test_a_goal_that_is_no_accuracy_is_refused(goal: float):
    with pytest.raises(ValueError, match=rf"goal is {goal}; an accuracy lies in \(0, 1\]"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)), goal=goal)


def test_with_a_goal_positions_for_each_pair_stay_with_their_pair():
    pairs = answered_by(native(), native_pairs(320))
    where = torch.arange(320) % 4  # interchanging at 3 alone matters
    stream = Site("residual", 1, "blocks.1.hook_resid_post", 1, where)
    evidence = [
        verify(native(), PARITY, Alignment({"answer": [Unit(stream, 0)]}), pairs, goal=goal, draws=1)
        for goal in (0.6, None)
    ]
    taken = row(evidence[0], "answer").pairs
    assert taken < 320
    first = Site("residual", 1, "blocks.1.hook_resid_post", 1, where[:taken])
    again = verify(native(), PARITY, Alignment({"answer": [Unit(first, 0)]}), pairs[:taken], draws=1)
    pd.testing.assert_frame_equal(evidence[0].to_frame(), again.to_frame(), check_exact=True)
    placebos = [
        verify(native(), PARITY, Alignment({"answer": stream_units(2, 0, where)}), pairs, goal=goal, draws=2)
        for goal in (0.6, None)
    ]
    taken, whole = (row(e, "answer", intervention="norm-matched random subspace").pairs for e in placebos)
    assert taken < whole == 640


def test_positions_for_each_pair_have_one_source_for_all_variables():
    where = torch.full((50,), 3)
    alignment = Alignment({"odd": stream_units(1, 0, where), "more": stream_units(1, 1, where)})
    frame = verify(native(), PARITY, alignment, native_pairs(50), draws=0).to_frame()
    assert "odd & more" in set(frame.variable)
    assert "aligned units, a source each" not in set(frame.intervention)


def test_the_placebo_is_transformer_lens_own():
    pairs, model = answered_by(native(), native_pairs(300)), native()  # more than TransformerLens takes at once
    each = torch.arange(300) % 2 + 2
    for where in (3, each):
        alignment = Alignment({"answer": stream_units(3, 4, where)})
        found = [
            row(
                verify(model, PARITY, alignment, pairs, draws=3, seed=11, batch_size=size),
                *("answer", "original", "norm-matched random subspace"),
            )
            for size in (None, 70)
        ]
        assert str(found[0]) == str(found[1]) and (found[0].pairs, found[0].units) == (900, 3)
        places = each if isinstance(where, Tensor) else torch.full((300,), where)
        hook, hits = "blocks.0.hook_resid_post", []

        def logits(tokens: Tensor) -> Tensor:
            return model(tokens)[:, 3, :4]

        values = collect_activations(model, hook, pairs.source.tokens, logits, positions=places)
        for seed in (11, 12, 13):
            move = NormMatchedPlacebo(SubspaceInterchange(basis_of(3, 4)), random_basis(16, 3, seed))
            given = intervened_logits(model, hook, move, pairs.base.tokens, values, logits, positions=places)
            hits.append(given.argmax(1) == pairs.expected(PARITY, ("answer",)))
        assert found[0].accuracy == pytest.approx(float(torch.stack(hits).double().mean()), abs=1e-12)
        assert found[0].accuracy != row(verify(model, PARITY, alignment, pairs), "answer").accuracy


def test_other_units_have_no_placebo():
    hook = "blocks.0.hook_resid_post"
    for units in (
        stream_units(2, 0, None),
        stream_units(2, 0, (1, 3)),
        stream_units(1, 0, 3) + stream_units(1, 1, 3, "blocks.1.hook_resid_post"),
        [Unit(Site("residual", 0, hook, 1, 3), 0)],
    ):
        frame = verify(native(), PARITY, Alignment({"answer": units}), native_pairs(20), draws=1).to_frame()
        assert "norm-matched random subspace" not in set(frame.intervention)


def test_variables_may_lie_in_two_bases_at_one_hook_point():
    model, pairs = native(), answered_by(native(), native_pairs())
    odd, more = stream_units(3, 0, 3), stream_units(3, 1, 3)
    assert odd[0].name == more[0].name and odd[0] != more[0]
    evidence = verify(model, PARITY, Alignment({"odd": odd, "more": more}), pairs, draws=1)
    for variable, units in (("odd", odd), ("more", more)):
        alone = verify(model, PARITY, Alignment({variable: units}), pairs, draws=1)
        assert evidence.accuracy(variable) == alone.accuracy(variable)
    values: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        values["source"] = activation

    def swap(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        for seed in (0, 1):
            basis = basis_of(3, seed)
            activation[:, 3] += (values["source"][:, 3] - activation[:, 3]) @ basis @ basis.T
        return activation

    with torch.no_grad():
        model.run_with_hooks(pairs.source.tokens, fwd_hooks=[("blocks.0.hook_resid_post", keep)])
        given = model.run_with_hooks(pairs.base.tokens, fwd_hooks=[("blocks.0.hook_resid_post", swap)])
    hits = given[:, 3, :4].argmax(1) == pairs.expected(PARITY, ("odd", "more"))
    assert evidence.accuracy("odd & more") == float(hits.double().mean())
    assert evidence.accuracy("odd & more") != evidence.accuracy("odd")


def test_a_variable_may_lie_in_two_bases_of_a_model_without_blocks():
    model = Network()
    one, two = (directions(model, "hook_first", basis_of(8, seed, FIRST.size)) for seed in (0, 1))
    base, source = drawn()
    both = Alignment({"left": [*one, *two], "right": [*two][:1]})  # each basis is the whole first layer
    evidence = verify(model, EQUALITY, both, pairs_of(base, source), draws=2, reduced=removal(model, []))
    wanted, given = swapped(base, source, "left"), swapped(base, source, "left", "right")
    assert evidence.accuracy("left") == (wanted == given).mean()
    assert row(evidence, "(none)", "reduced", AGREEMENT).accuracy == 1


def test_a_range_of_positions_is_the_positions_in_it():
    pairs = answered_by(native(), native_pairs(60))
    frames = [
        verify(native(), PARITY, Alignment({"answer": stream_units(2, 0, where)}), pairs, draws=1).to_frame()
        for where in (slice(1, 3), (1, 2))
    ]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_a_transformer_without_neurons_is_verified():
    config = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": POSITIONS, "d_vocab": VOCABULARY}
    config |= {"attn_only": True, "normalization_type": None, "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config)).eval()
    alignment = Alignment({"odd": [heads(model)["L0H0"]]})
    evidence = verify(model, PARITY, alignment, answered_by(model, native_pairs(30)))
    assert row(evidence, "(none)", intervention="all unaligned units").units == 1


def test_a_hugging_face_model_is_held_against_random_weights_of_its_architecture():
    model = hugging_face("Llama")
    alignment = Alignment({"odd": [heads(model)["L0H1"].at(1)], "more": [neurons(model)["L1N3"]]})
    pairs = answered_by(model, native_pairs(40))
    with unchanged(model):
        frames = [verify(model, PARITY, alignment, pairs, seed=seed).to_frame() for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    random = [frame[frame.model == "random weights"] for frame in frames]
    assert (random[0].pairs == 40).all() and (random[0].retained < 1).all()
    assert not random[0].accuracy.equals(random[2].accuracy)
    assert (frames[0][frames[0].model == "original"].retained == 1).all()


@pytest.mark.parametrize("reduced", [None, "reduction", "folded"])
def test_a_transformer_is_left_as_it_came_in_whatever_happens(reduced: str | None):
    model = native()
    next(model.parameters()).requires_grad_(False)
    reduction = reduction_of_native(["L0H1", "L1N3"])
    small = fold(model, reduction)
    given = {None: None, "reduction": reduction, "folded": small}[reduced]
    outside = Alignment({"answer": stream_units(2, 0, 9)})  # the input has four positions
    with unchanged(model), unchanged(small):
        verify(model, PARITY, NATIVE, native_pairs(20), reduced=given, draws=1, goal=0.9)
        with pytest.raises(ValueError, match="lie outside an input of length 4"):
            verify(model, PARITY, outside, native_pairs(20), reduced=given, draws=1)
        with pytest.raises(ValueError, match="answers has no token"):
            pairs = native_pairs(20)
            few = Pairs(pairs.base_inputs, pairs.source_inputs, pairs.base, pairs.source, {0: 0})
            verify(model, PARITY, NATIVE, few, reduced=given, draws=1)
    state = torch.get_rng_state()
    verify(model, PARITY, NATIVE, native_pairs(20), reduced=given, draws=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_margin_bound_is_that_of_the_two_models_logits():
    pairs = pairs_of(*drawn(300))
    model = Network()
    reduction = Reduction(
        Circuit(UNITS, torch.ones(len(UNITS), dtype=torch.bool)),
        Values(UNITS, (torch.zeros(FIRST.size, 1), torch.zeros(SECOND.size, 1))),
        fingerprint=fingerprint(model),
    )
    [row] = [r for r in verify(model, EQUALITY, TRUE, pairs, reduced=reduction).rows if "kept units" in r.intervention]
    assert row.margin_bound == 0 and row.accuracy == 1  # nothing removed: no logit moves
    mask = torch.ones(len(UNITS), dtype=torch.bool)
    mask[0] = False
    smaller = Reduction(Circuit(UNITS, mask), reduction.values, fingerprint=fingerprint(model))
    [row] = [r for r in verify(model, EQUALITY, TRUE, pairs, reduced=smaller).rows if "kept units" in r.intervention]
    assert 1 - row.accuracy <= row.margin_bound <= 1
