"""Named spans: from text offsets to tokens, and as positions of units everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tokenized import bridge, byte_pairs, word_level

import tl_sparsify as tls
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import heads

TEXTS = ["the capital of France is", "the river of Rome is the"]


def row(text: str, **spans: str) -> dict[str, Any]:
    places = {name: (text.index(part), text.index(part) + len(part)) for name, part in spans.items()}
    return {"prompt": text, "answer": " Paris", "spans": places}


ROWS = [row(TEXTS[0], place="France", what="capital of"), row(TEXTS[1], place="Rome", what="river of")]


@pytest.fixture(scope="module")
def model() -> Any:
    return bridge("GPT-2")


def positions(model: Any, data: Examples, i: int, part: str) -> list[int]:
    """Slowly: the positions whose tokens, decoded one after the other, make up the part."""
    assert data.tokens is not None
    mask = torch.ones_like(data.tokens[0]) if data.attention_mask is None else data.attention_mask[i]
    text, found = "", []
    start = TEXTS[i].index(part)
    bos = model.tokenizer.bos_token_id
    for place in mask.nonzero().flatten().tolist():
        if data.tokens[i, place] == bos:
            continue
        piece = model.tokenizer.decode([int(data.tokens[i, place])])
        if len(text) < start + len(part) and len(text) + len(piece) > start:
            found.append(place)
        text += piece
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False])
def test_spans_are_found_from_text_offsets(model: Any, side: str, bos: bool):
    data = tls.load_examples(model, ROWS, spans="spans", padding_side=side, prepend_bos=bos).examples
    assert data.spans is not None and set(data.spans) == {"place", "what"}
    for name, parts in {"place": ["France", "Rome"], "what": ["capital of", "river of"]}.items():
        for i, part in enumerate(parts):
            start, stop = data.spans[name][i].tolist()
            assert list(range(start, stop)) == positions(model, data, i, part), (name, i)


def test_a_file_of_text_holds_them_as_json(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer,S1,all\nthe cat,sat,"[4, 7]","{""S2"": [0, 3]}"\n')
    found = tls.load_examples(word_level(), path, spans={"S1": "S1"}).examples.spans
    assert found is not None and found["S1"].tolist() == [[1, 2]]
    found = tls.load_examples(word_level(), path, spans="all").examples.spans
    assert found is not None and found["S2"].tolist() == [[0, 1]]


def test_rows_without_a_usable_span_are_left_out_with_the_reason():
    rows: list[Any] = [{"prompt": "the cat", "answer": " sat", "spans": spans} for spans in (
        {"S1": (0, 3)}, {}, {"S1": (5, 3)}, {"S1": (3, 4)}, {"S1": (0, 99)}
    )]  # fmt: skip
    found = tls.load_examples(word_level(), rows, spans="spans", unusable="drop")
    assert found.rows == (0,)
    assert found.dropped["reason"].tolist() == [
        "no span S1", "span S1 is none", "span S1 of no token", "span S1 is none"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="spans are named"):
        tls.load_examples(word_level(), [rows[0] | {"spans": (0, 3)}], spans="spans")


def by_hand(data: Examples, name: str) -> torch.Tensor:
    """Each example's positions, filled up with the last."""
    assert data.spans is not None
    places = [list(range(a, b)) for a, b in data.spans[name].tolist()]
    longest = max(map(len, places))
    return torch.tensor([some + [some[-1]] * (longest - len(some)) for some in places])


def test_units_at_a_span_are_units_at_its_positions(model: Any):
    """Scores, means, risk and evaluation are those of units with a position for each example."""
    data = tls.load_examples(model, ROWS * 2, spans="spans").examples
    named, placed = heads(model).at("what"), heads(model).at(by_hand(data, "what"))
    assert named.names[0] == "L0H0@what" and named["L0H0@what"] == heads(model)["L0H0@what"]
    means = tls.constants.mean(model, data, named)
    others = tls.constants.mean(model, data, placed)
    for one, other in zip(means.tensors, others.tensors, strict=True):
        assert torch.equal(one, other)
    for score in (tls.score.risk, tls.score.gradient):
        found = score(model, data, named, batch_size=2).scores
        assert torch.allclose(found, score(model, data, placed).scores, rtol=1e-9)
    exact = tls.score.exact(model, data, named, values=means, progress=False).scores
    assert torch.allclose(exact, tls.score.exact(model, data, placed, values=others, progress=False).scores)
    kept = named.names[:1]
    reduction = tls.constants.reduced(model, Circuit.of(named, list(kept)), means)
    same = tls.constants.reduced(model, Circuit(placed, reduction.circuit.mask), others)
    assert tls.risk(model, reduction, data, batch_size=3).mean == pytest.approx(tls.risk(model, same, data).mean)
    swaps = tls.InterventionDistribution.interchange(0.5)
    found = tls.risk(model, reduction, data, interventions=swaps)
    assert found.mean == pytest.approx(tls.risk(model, same, data, interventions=swaps).mean)
    assert tls.evaluate(model, reduction, data).risk.mean == pytest.approx(tls.evaluate(model, same, data).risk.mean)


def test_the_same_reduction_for_other_examples(model: Any, tmp_path: Path):
    """A name holds wherever it is: the circuit goes with its names to other prompts, and through a file."""
    data = tls.load_examples(model, ROWS, spans="spans").examples
    units = heads(model).at("place")
    reduction = tls.constants.reduced(model, Circuit.empty(units), tls.constants.mean(model, data, units))
    reduction.save(tmp_path / "spans.reduction")
    assert tls.Reduction.load(tmp_path / "spans.reduction") == reduction
    other = data[torch.tensor([1])]
    there = heads(model).at(by_hand(other, "place"))
    placed = Reduction(Circuit.empty(there), Values(there, reduction.values.tensors, "mean"))
    found = tls.risk(model, reduction, other)
    assert found.mean == pytest.approx(tls.risk(model, placed, other).mean) and found.mean > 0


def test_spans_that_there_are_not(model: Any):
    data = tls.load_examples(model, ROWS, spans="spans").examples
    with pytest.raises(ValueError, match="are the span 'S1', and the examples have place, what"):
        tls.score.risk(model, data, heads(model).at("S1"))
    plain = tls.load_examples(model, ROWS).examples
    with pytest.raises(ValueError, match="the examples have no spans"):
        tls.score.risk(model, plain, heads(model).at("S1"))
    with pytest.raises(ValueError, match="must hold a first position"):
        Examples(torch.tensor([[1, 2]]), torch.tensor([[-100, 3]]), spans={"S1": torch.tensor([[1, 1]])})


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_pairs(), name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return byte_pairs()(*args, **kwargs)

        def __len__(self) -> int:
            return 340

    with pytest.raises(ValueError, match="Slow is none"):
        tls.load_examples(Slow(), ROWS, spans="spans")
