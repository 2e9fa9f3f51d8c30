"""Several right and wrong answers, answers of several tokens, pairs of other length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import bridge, examples
from helpers.tokenized import WORDS, byte_pairs, word_level
from helpers.tokenized import bridge as spoken

import tl_sparsify as tls
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.units import heads
from tl_sparsify.tasks.accuracy import accuracy

THE, CAT, DOG, SAT, RAN, HOME, AND, THEN = (WORDS.index(w) for w in "the cat dog sat ran home and then".split())
YEARS = [
    {"prompt": "the cat", "answers": [" sat", " ran", " home"], "wrong_answers": [" dog", " cat"]},
    {"prompt": "then the dog", "answers": [" ran"], "wrong_answers": [" sat"]},
]


def load(source: Any, **settings: Any) -> tls.LoadedExamples:
    given: dict[str, Any] = {"padding_side": "left"} | settings
    return tls.load_examples(word_level(), source, **given)


def test_all_right_and_wrong_answers_are_kept():
    found = load(YEARS)
    assert found.examples.labels[:, -1].tolist() == [SAT, RAN]
    right, wrong = found.examples.right_answers, found.examples.wrong_answers
    assert right is not None and right.tolist() == [[SAT, RAN, HOME], [RAN, -100, -100]]
    assert wrong is not None and wrong.tolist() == [[DOG, CAT], [SAT, -100]]
    assert found.notes == ("1 rows have several right answers: the first is the label",)
    second = found.examples[torch.tensor([1])].right_answers
    assert second is not None and second.tolist() == [[RAN, -100, -100]]


def test_pairs_of_right_and_wrong_are_sets_too():
    found = load([("the cat", [(" sat", " dog"), (" ran", " cat")])]).examples
    assert found.right_answers is not None and found.right_answers.tolist() == [[SAT, RAN]]
    assert found.wrong_answers is not None and found.wrong_answers.tolist() == [[DOG, CAT]]


def test_one_answer_each_needs_no_set():
    found = load([{"prompt": "the cat", "answers": [" sat"], "wrong_answers": [" ran"]}]).examples
    assert found.right_answers is None and found.wrong_answers is None


def test_every_answer_of_a_row_must_be_usable():
    rows = [*YEARS, YEARS[0] | {"answers": [" sat", " ran home"]}, YEARS[0] | {"wrong_answers": [" dog", " ran"]}]
    found = load(rows, unusable="drop")
    assert found.rows == (0, 1)
    assert found.dropped["reason"].tolist() == ["answer of several tokens", "wrong answer is the right one"]


def logits_of(rows: list[dict[int, float]], size: int = len(WORDS)) -> torch.Tensor:
    found = torch.zeros(len(rows), size)
    for i, row in enumerate(rows):
        for token, logit in row.items():
            found[i, token] = logit
    return found


def test_metrics_take_sums_and_means_over_the_sets():
    data = load(YEARS).examples
    logits = logits_of([{SAT: 3.0, RAN: 6.0, HOME: 0.0, DOG: 1.0, CAT: 2.0}, {RAN: 1.0, SAT: 4.0}])
    assert tls.metrics.mean_difference(logits, data).tolist() == [3.0 - 1.5, -3.0]
    p = logits.softmax(1)
    first = p[0, [SAT, RAN, HOME]].sum() - p[0, [DOG, CAT]].sum()
    expected = torch.stack([first, p[1, RAN] - p[1, SAT]])
    assert torch.allclose(tls.metrics.probability_difference(logits, data), expected)
    assert tls.metrics.correct(logits, data).tolist() == [1.0, 0.0]  # another right answer than the label
    assert tls.metrics.correct(logits, replace(data, right_answers=None)).tolist() == [0.0, 0.0]


def test_sets_among_choices():
    words = [" sat", " ran", " home", " dog", " cat"]
    data = load(YEARS, choices=words).examples
    assert data.choices is not None
    logits = logits_of([{SAT: 3.0, RAN: 6.0, DOG: 1.0, CAT: 2.0}, {RAN: 1.0, SAT: 4.0}])
    few = logits[:, data.choices]
    assert tls.metrics.mean_difference(few, data).tolist() == [3.0 - 1.5, -3.0]
    assert tls.metrics.correct(few, data).tolist() == [1.0, 0.0]


def test_without_sets_the_difference_is_that_of_the_labels():
    data = examples(4)
    assert data.counterfactual_labels is not None
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    right, wrong = data.labels[:, -1:], data.counterfactual_labels[:, -1:]
    expected = (logits.gather(1, right) - logits.gather(1, wrong))[:, 0]
    assert torch.allclose(tls.metrics.mean_difference(logits, data), expected)
    with pytest.raises(ValueError, match="neither wrong_answers nor counterfactual_labels"):
        tls.metrics.mean_difference(logits, replace(data, counterfactual_labels=None))


def test_the_divergence_stays_what_it_is():
    model, data = bridge(), replace(examples(6), counterfactual_labels=None)
    sets = replace(data, right_answers=torch.stack([data.labels[:, -1], (data.labels[:, -1] + 1) % 11], 1))
    units = heads(model)
    values = tls.constants.mean(model, data, units)
    reduction = tls.constants.reduced(model, Circuit.of(units, ["L0H1"]), values)
    assert tls.risk(model, reduction, sets) == tls.risk(model, reduction, data)


def test_sets_that_do_not_belong_to_the_labels_are_refused():
    one = Examples(torch.tensor([[0, 1]]), torch.tensor([[-100, 2]]))
    with pytest.raises(ValueError, match=r"lack the label \(first: 0\)"):
        replace(one, right_answers=torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="each example needs at least one"):
        replace(one, wrong_answers=torch.tensor([[-100]]))
    with pytest.raises(ValueError, match="one labelled position"):
        replace(one, labels=torch.tensor([[1, 2]]), right_answers=torch.tensor([[2]]))
    with pytest.raises(ValueError, match="right_answers holds 5, no choice"):
        replace(one, choices=torch.tensor([2, 3]), right_answers=torch.tensor([[2, 5]]))


LONG = [
    {"prompt": "the cat", "answer": " sat home", "wrong_answer": " ran home", "corrupt": "the dog"},
    {"prompt": "then the dog", "answer": " ran", "wrong_answer": " sat", "corrupt": "then the cat"},
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_of_several_tokens_is_forced(side: str):
    found = load(LONG, answer_tokens="several", padding_side=side).examples
    assert found.attention_mask is None and found.whole and found.right_answers is None
    assert found.tokens.tolist() == [[THE, CAT, SAT], [THEN, THE, DOG]]
    assert found.labels.tolist() == [[-100, SAT, HOME], [-100, -100, RAN]]
    assert found.counterfactual_tokens is not None and found.counterfactual_labels is not None
    assert found.counterfactual_tokens.tolist() == [[THE, DOG, SAT], [THEN, THE, CAT]]
    assert found.counterfactual_labels.tolist() == [[-100, RAN, HOME], [-100, -100, SAT]]


def test_such_an_answer_is_right_only_if_all_of_it_is():
    data = load(LONG, answer_tokens="several").examples
    right = logits_of([{SAT: 9.0}, {HOME: 9.0}, {RAN: 9.0}])
    assert tls.metrics.correct(right, data).tolist() == [1.0, 1.0, 1.0]
    half = logits_of([{SAT: 9.0}, {CAT: 9.0}, {RAN: 9.0}])
    assert tls.metrics.correct(half, data).tolist() == [0.0, 0.0, 1.0]
    assert tls.metrics.correct(half, replace(data, whole=False)).tolist() == [1.0, 0.0, 1.0]


def test_accuracy_counts_examples():
    """By hand: as often as the model's best token is the label at every position of the example."""
    model = spoken("GPT-2")
    rows = [("the capital of France is", " Paris Paris"), ("the river of", " Rome")] * 3
    data = tls.load_examples(model, rows, answer_tokens="several").examples
    with torch.no_grad():
        best = model(data.tokens, attention_mask=None if data.attention_mask is None else data.attention_mask.long())
    data = replace(data, labels=torch.where(data.labels == -100, -100, best.argmax(-1)))
    assert accuracy(model, data).choices == 1.0
    spoilt = data.labels.clone()
    spoilt[0, (spoilt[0] != -100).nonzero()[0]] += 1
    assert accuracy(model, replace(data, labels=spoilt)).choices == pytest.approx(5 / 6)


def test_a_wrong_answer_of_another_number_of_tokens():
    rows = [*LONG, LONG[0] | {"wrong_answer": " ran"}]
    found = load(rows, answer_tokens="several", unusable="drop")
    assert found.rows == (0, 1) and found.dropped["reason"].tolist() == ["wrong answer of another number of tokens"]
    with pytest.raises(ValueError, match="choices are of one token"):
        load(LONG, answer_tokens="several", choices=[" sat"])


@pytest.mark.parametrize("other", ["the dog", None])
def test_an_answer_that_does_not_fit_into_the_context(other: str | None):
    """All tokens of the answer but the last are input too, behind the prompt and behind the counterfactual one."""
    fits = {"prompt": "the cat", "answer": " sat home and", "corrupt": other}
    rows = [fits, fits | {"answer": " sat home and then"}]
    named = {} if other else {"counterfactual_prompt": None}
    found = load(rows, answer_tokens="several", max_length=4, unusable="drop", **named)
    assert found.rows == (0,) and found.examples.tokens.shape == (1, 4)
    assert found.reasons == {"prompt and answer longer than the context": 1}
    assert found.dropped["detail"].tolist() == ["5 tokens with all of the answer but its last token, at most 4"]


def test_an_answer_fits_behind_the_longer_one_of_a_pair():
    rows = [LONG[0] | {"wrong_answer": None, "corrupt": "then the cat"}, LONG[1]]
    settings = {"wrong_answer": None, "answer_tokens": "several", "pairs": "any", "unusable": "drop"}
    assert load(rows, max_length=4, **settings).rows == (0, 1)
    assert load(rows, max_length=3, **settings).rows == (1,)


def test_a_model_takes_every_answer_that_is_not_refused():
    """To the last token of its context, with what goes before the prompt."""
    model = spoken("GPT-2")
    context = model.cfg.n_ctx
    rows = [(" the" * n, " Paris Paris Paris") for n in range(context - 5, context + 1)]
    found = tls.load_examples(model, rows, answer_tokens="several", prepend_bos=True, unusable="drop")
    assert found.rows == (0, 1, 2) and found.examples.tokens.shape == (3, context)
    with torch.no_grad():
        model(found.examples.tokens)


UNEQUAL = [
    {"prompt": "the cat", "answer": " sat", "corrupt": "then the dog"},
    {"prompt": "the dog", "answer": " ran", "corrupt": "the cat"},
]


def test_pairs_of_other_length_where_nothing_is_interchanged():
    found = load(UNEQUAL, pairs="any").examples
    assert found.tokens[:, 1:].tolist() == [[THE, CAT], [THE, DOG]]
    assert found.counterfactual_tokens is not None and found.counterfactual_mask is not None
    assert found.counterfactual_tokens[0].tolist() == [THEN, THE, DOG]
    assert found.counterfactual_mask.tolist() == [[True] * 3, [False, True, True]]
    assert found.attention_mask is not None and found.attention_mask.tolist() == [[False, True, True]] * 2
    with pytest.raises(ValueError, match=r"1 rows of 2 that cannot be used.*\n.*a pair of other length"):
        load(UNEQUAL)


def test_else_they_are_refused_by_row():
    model = spoken("GPT-2")
    rows = [("the capital of France is", " Paris", "the river of"), ("the river of", " Rome", "the capital of")]
    table = [dict(zip(("prompt", "answer", "corrupt"), row, strict=True)) for row in rows]
    data = tls.load_examples(model, table, pairs="any", padding_side="left").examples
    units = heads(model)
    reduction = tls.constants.reduced(model, Circuit.empty(units), tls.constants.mean(model, data, units))
    assert tls.risk(model, reduction, data).n == 2  # nothing is interchanged
    swaps = tls.InterventionDistribution.interchange(0.5, source="counterfactual")
    with pytest.raises(ValueError, match=r"1 examples have another length.*\(rows 0\)"):
        tls.risk(model, reduction, data, interventions=swaps)
    with pytest.raises(ValueError, match=r"\(rows 0\)"):
        tls.evaluate(model, reduction, data, ablation="counterfactual")


def test_several_tokens_by_a_tokenizer_of_byte_pairs():
    tokenizer = byte_pairs()
    found = tls.load_examples(tokenizer, [("the river of", " Rome is")], answer_tokens="several").examples
    answer = tokenizer(" Rome is", add_special_tokens=False)["input_ids"]
    assert found.labels[0][found.labels[0] != -100].tolist() == answer and len(answer) == 2
    assert found.tokens[0, -1] == answer[0]
