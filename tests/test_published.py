"""Published data sets as tasks, from small samples of our own in their columns: what is read, paired and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cards import single
from helpers.published import CITIES, MEN, PROMPTS, WOMEN, minimal_pairs, ravel_files, write_causalgym, write_ravel

import tl_sparsify as tls
from tl_sparsify.tasks import published


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tls.text.load_tokenizer(tls.task.own_language_model())


@pytest.fixture(scope="module")
def gym(tmp_path_factory: pytest.TempPathFactory) -> tls.Task:
    return tls.load_task("causalgym/agr_gender", path=write_causalgym(tmp_path_factory.mktemp("gym")))


@pytest.fixture(scope="module")
def ravel(tmp_path_factory: pytest.TempPathFactory) -> tls.Task:
    return tls.load_task("ravel/city/Country", path=write_ravel(tmp_path_factory.mktemp("ravel")))


def texts(tokenizer: Any, tokens: torch.Tensor) -> list[str]:
    """The prompts, without padding and beginning."""
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens.tolist()]


def test_causalgyms_splits_answers_and_regions(gym: tls.Task, tokenizer: Any):
    splits = gym.examples(0)
    for data, name in zip(splits, ("train", "dev", "test"), strict=True):
        few = {"train": slice(0, 4), "dev": slice(0, 2), "test": slice(1, 4)}[name]
        expected = {
            "".join(row["base"]).removeprefix("<|endoftext|>"): row
            for row in minimal_pairs(MEN[few], WOMEN[few])
            if row["task"] == "agr_gender"
        }
        found = texts(tokenizer, data.tokens)
        assert set(found) == set(expected) and len(found) == 2 * (few.stop - few.start) ** 2
        assert [tokenizer.decode(token) for token in single(data.labels)] == [expected[t]["base_label"] for t in found]
        assert data.counterfactual_labels is not None and data.counterfactual_tokens is not None
        other = [tokenizer.decode(token) for token in single(data.counterfactual_labels)]
        assert other == [expected[t]["src_label"] for t in found]
        assert data.choices is not None and {tokenizer.decode(i) for i in data.choices} == {" he", " she"}
        assert data.tokens[:, 0].eq(tokenizer.bos_token_id).all(), "the published text begins with <|endoftext|>"
        assert data.spans is not None and set(data.spans) == {"region1", "region2", "region3", "changed"}
        for i, (start, stop) in enumerate(data.spans["region3"].tolist()):
            assert tokenizer.decode(data.tokens[i, start:stop]) == " to the house and"
        assert torch.equal(data.spans["changed"], data.spans["region1"])
        assert (data.tokens != data.counterfactual_tokens).sum(1).tolist() == [1] * len(data)
    assert gym.name == "causalgym.agr_gender" and gym.chance == 0.5
    assert gym.dropped is not None and gym.dropped().empty
    again, other = gym.examples(0)[0], gym.examples(1)[0]
    assert torch.equal(again.tokens, splits[0].tokens) and not torch.equal(other.tokens, splits[0].tokens)
    assert gym.dataset(0)["train"]["prompt"] == texts(tokenizer, splits[0].tokens)


def test_half_of_causalgyms_pairs_take_the_sources_label(gym: tls.Task, tokenizer: Any):
    pairs = gym.pairs(16, 0)
    expected = [tokenizer.decode(i) for i in pairs.expected(gym.causal_model, ("type",)).tolist()]
    assert expected == [{"m": " he", "f": " she"}[kind] for kind in pairs.source_inputs["sentence_type"].tolist()]
    differ = pairs.base_inputs["sentence_type"] != pairs.source_inputs["sentence_type"]
    assert differ.sum() == 8
    bases, sources = texts(tokenizer, pairs.base.tokens), texts(tokenizer, pairs.source.tokens)
    assert all(a != b for a, b in zip(bases, sources, strict=True))
    assert pairs.base.spans is not None and pairs.source.spans is not None
    assert torch.equal(pairs.base.spans["changed"], pairs.source.spans["changed"])
    assert torch.equal(gym.pairs(16, 0).base.tokens, pairs.base.tokens)


def test_a_label_that_stays_is_the_bases_own(tmp_path: Path, tokenizer: Any):
    """Where one type has several labels, the source of one's own type leaves one's own label."""
    rows = minimal_pairs()
    for i, row in enumerate(rows[:-1]):
        if i % 4 < 2:  # in half of the pairs the labels are others
            row["base_label"] = {" he": " his", " she": " her"}[row["base_label"]]
            row["src_label"] = {" he": " his", " she": " her"}[row["src_label"]]
    usable = [w for w in (" his", " her") if len(tokenizer(w, add_special_tokens=False).input_ids) == 1]
    assert len(usable) == 2, "the sample needs words of one token"
    task = tls.load_task("causalgym/agr_gender", path=write_causalgym(tmp_path, test=rows))
    pairs = task.pairs(32, 0)
    expected = pairs.expected(task.causal_model, ("type",)).tolist()
    own = single(pairs.base.labels)
    stays = pairs.base_inputs["sentence_type"] == pairs.source_inputs["sentence_type"]
    assert [expected[i] == own[i] for i in range(32)] == stays.tolist()
    assert bool(pairs.tells_apart(task.causal_model, ("type",)).any())


def test_causalgyms_model_is_verified_at_what_differs(gym: tls.Task):
    model, pairs = gym.model(), gym.pairs(16, 0)
    units = tls.residuals(model).at("changed")
    first = next(unit for unit in units if unit.site.layer == 0)
    evidence = tls.verify(model, gym.causal_model, tls.Alignment({"type": [first]}), pairs, draws=1)
    assert "type" in str(evidence.to_frame()["variable"].tolist())


def test_one_file_falls_into_splits_by_its_sentences(tmp_path: Path):
    path = tmp_path / "all.jsonl"
    rows = minimal_pairs()
    path.write_text("\n".join(map(json.dumps, rows)))
    data = tls.load_task("causalgym/agr_gender", path=path).dataset(0)
    sides = [{frozenset((row["prompt"], row["counterfactual_prompt"])) for row in data[name]} for name in data]
    assert sum(map(len, data.values())) == 32
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_parquet_and_names_of_template_files_are_read(tmp_path: Path):
    folder = write_causalgym(tmp_path)
    rows = [row | {"task": f"syntaxgym/{row['task']}"} for row in minimal_pairs()]
    (folder / "train.json").unlink()
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    assert len(tls.load_task("causalgym/agr_gender", path=folder).examples(0)[0]) == 32


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "regions": ({"base": "Paul walked"}, "base is no list of regions"),
    "aligned": ({"src": ["<|endoftext|>", "Anna", " walked"]}, "regions that are not aligned"),
    "label": ({"base_label": None}, "no base_label"),
    "tokens": ({"base_label": " antidisestablishment"}, "answer of several tokens"),
    "type": ({"src_type": "m"}, "base and src of one type"),
    "third": ({"src_type": "n"}, "a third type"),
    "same": ({"src": ["<|endoftext|>", "David", " walked", " to the house and"]}, "src is base"),
    "length": ({"src": ["<|endoftext|>", "Annabellina", " walked", " to the house and"]}, "a pair of other length"),
    "region": ({"src": ["<|endoftext|>", "Anna walked", " to", " the house and"]}, "a region of other length"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_rows_that_cannot_be_used_are_refused_by_file_and_row_or_dropped_and_counted(name: str, tmp_path: Path):
    change, reason = BAD[name]
    rows = minimal_pairs()
    rows[4] = rows[0] | change
    folder = write_causalgym(tmp_path, train=[rows[-1], *rows])  # the first row is another task's
    with pytest.raises(ValueError) as refused:
        tls.load_task("causalgym/agr_gender", path=folder).examples(0)
    message = str(refused.value)
    assert message.startswith("train of agr_gender has 1 rows of 32 that cannot be used; mend the file, or leave")
    assert f"1: {reason} (first: train.json, row 5: " in message and "unusable='drop'" in message
    task = tls.load_task("causalgym/agr_gender", path=folder, unusable="drop")
    assert len(task.examples(0)[0]) == 31 and task.dropped is not None
    [line] = task.dropped().to_dict("records")
    assert (line["split"], line["file"], line["row"], line["reason"]) == ("train", "train.json", "row 5", reason)


def test_what_is_missing_is_said(tmp_path: Path):
    folder = write_causalgym(tmp_path / "gym")
    with pytest.raises(ValueError, match=r"no row of 'agr_number'; its tasks are agr_gender, npi_any"):
        tls.load_task("causalgym/agr_number", path=folder)
    with pytest.raises(ValueError, match=r"path='causalgym'"):
        tls.load_task("causalgym/agr_gender")
    with pytest.raises(ValueError, match="no published data set"):
        tls.load_task("ioi", path=folder)
    (folder / "train.json").write_text(json.dumps([{"base": ["a"], "task": "agr_gender"}]))
    with pytest.raises(ValueError, match="has no column src, base_type, src_type, base_label, src_label"):
        tls.load_task("causalgym/agr_gender", path=folder)
    (folder / "dev.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no dev\.json"):
        tls.load_task("causalgym/agr_gender", path=folder)
    with pytest.raises(FileNotFoundError, match="entity_attributes"):
        tls.load_task("ravel/city/Country", path=tmp_path)
    folder = write_ravel(tmp_path / "ravel")
    with pytest.raises(FileNotFoundError, match="entities there: city"):
        tls.load_task("ravel/verb/Tense", path=folder)
    with pytest.raises(ValueError, match="one of Continent, Country"):
        tls.load_task("ravel/city/Language", path=folder)
    (folder / "ravel_city_entity_to_split.json").write_text('{"Rome": 3}')
    with pytest.raises(ValueError, match=r"ravel_city_entity_to_split.json, 'Rome': '3' is no str"):
        tls.load_task("ravel/city/Country", path=folder)


def test_ravels_splits_are_of_entities_and_prompts(ravel: tls.Task, tokenizer: Any):
    for number, (data, split) in enumerate(zip(ravel.examples(0), CITIES, strict=True)):
        asked = {name: some[number] for name, some in PROMPTS.items()}
        answers = {
            asked[name].replace("%s", city): f" {words.split()[place]}"
            for place, name in enumerate(("Country", "Continent"))
            for city, words in CITIES[split].items()
        }
        found = texts(tokenizer, data.tokens)
        assert set(found) == set(answers) and len(found) == 8
        first = [tokenizer(answers[text], add_special_tokens=False).input_ids[0] for text in found]
        assert single(data.labels) == first
        assert data.counterfactual_labels is not None and data.counterfactual_tokens is not None
        others = texts(tokenizer, data.counterfactual_tokens)
        wrong = [tokenizer(answers[text], add_special_tokens=False).input_ids[0] for text in others]
        assert single(data.counterfactual_labels) == wrong and all(a != b for a, b in zip(first, wrong, strict=True))
        assert data.spans is not None
        for i, (start, stop) in enumerate(data.spans["entity"].tolist()):
            assert tokenizer.decode(data.tokens[i, start:stop]).strip() in CITIES[split]
            assert data.spans["entity_end"][i].tolist() == [stop - 1, stop]
    assert ravel.dropped is not None and ravel.dropped().empty and ravel.name == "ravel.city.Country"


def test_ravels_cause_follows_the_source_and_isolate_stays(ravel: tls.Task, tokenizer: Any):
    pairs, model = ravel.pairs(24, 0), ravel.causal_model
    assert set(model.variables) == {"Country", "Continent", "answer"}
    of = {city: words.split() for some in CITIES.values() for city, words in some.items()}
    country = pairs.expected(model, ("Country",)).tolist()
    continent = pairs.expected(model, ("Continent",)).tolist()
    cause = 0
    for i in range(24):
        base, source = pairs.base_inputs["entity"][i], pairs.source_inputs["entity"][i]
        prompt = pairs.base_inputs["prompt"][i]
        assert base != source and pairs.source_inputs["prompt"][i] == prompt
        asks = PROMPTS["Country"][2] == prompt
        cause += asks
        words = (of[source][0], of[base][0]) if asks else (of[base][1], of[source][1])
        expected = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
        assert [country[i], continent[i]] == expected
    assert cause == 12
    apart = pairs.tells_apart(model, ("Country",))
    assert int(apart.sum()) == 12, "isolate pairs tell the attribute from the answer"


def test_ravels_rows_that_cannot_be_used(tmp_path: Path):
    files = ravel_files()
    files["entity_attributes"]["Rome"]["Country"] = ""
    files["entity_attributes"] |= {"Ouagadougou": {"Country": "Mali", "Continent": "Africa"}}
    files["entity_attributes"] |= {"Oslo": {"Country": "Norway", "Continent": "Europe"}}
    files["entity_to_split"]["Ouagadougou"] = "train"
    files["attribute_to_prompts"]["Country"].append("the country is")
    files["prompt_to_split"]["the country is"] = "val"
    folder = write_ravel(tmp_path, files)
    with pytest.raises(ValueError) as refused:
        tls.load_task("ravel/city/Country", path=folder).examples(0)
    assert "1: no Country (first: ravel_city_entity_attributes.json, 'Rome': Country is ''; it must be text)" in str(
        refused.value
    )
    task = tls.load_task("ravel/city/Country", path=folder, unusable="drop")
    assert [len(data) for data in task.examples(0)] == [6, 8, 8] and task.dropped is not None
    lines = {(line["split"], line["reason"], line["row"]) for line in task.dropped().to_dict("records")}
    alone = "no other entity of as many tokens"
    assert lines == {
        ("train", "no Country", "'Rome'"),
        ("train", "entity without a split", "'Oslo'"),
        ("validation", "prompt without one %s", "'the country is'"),
        ("train", alone, "'Ouagadougou' in '%s is in the country of'"),
        ("train", alone, "'Ouagadougou' in '%s is on the continent of'"),
    }


def test_an_attribute_may_be_named_as_its_variable_and_ends_in_a_quote(tmp_path: Path, tokenizer: Any):
    files = json.loads(json.dumps(ravel_files()).replace("Country", "Home Country"))
    prompt = 'the city "%s" is of "'
    files["attribute_to_prompts"]["Home Country"][2] = prompt
    files["prompt_to_split"][prompt] = "test"
    task = tls.load_task("ravel/city/Home_Country", path=write_ravel(tmp_path, files), unusable="drop")
    test = task.examples(0)[2]
    mine = [i for i, text in enumerate(texts(tokenizer, test.tokens)) if text.endswith('"')]
    words = {city: words.split()[0] for city, words in CITIES["test"].items()}
    firsts = {tokenizer(word, add_special_tokens=False).input_ids[0] for word in words.values()}
    assert mine and {single(test.labels)[i] for i in mine} <= firsts
    pairs = task.pairs(8, 0)
    assert "Home_Country" in task.causal_model.variables
    assert np.isin(pairs.expected(task.causal_model, ("Home_Country",)).numpy(), list(pairs.answers.values())).all()


def test_ravels_model_is_verified_at_the_entity(ravel: tls.Task):
    model, pairs = ravel.model(), ravel.pairs(16, 0)
    first = next(unit for unit in tls.residuals(model).at("entity_end") if unit.site.layer == 0)
    evidence = tls.verify(model, ravel.causal_model, tls.Alignment({"Country": [first]}), pairs, draws=1)
    assert "Country" in str(evidence.to_frame()["variable"].tolist())


def test_the_tokenizer_is_loaded_once_for_all_splits_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[Any] = []
    load = published.load_tokenizer
    monkeypatch.setattr(published, "load_tokenizer", lambda source: (loaded.append(source), load(source))[1])
    for name, folder in (("causalgym/agr_gender", write_causalgym), ("ravel/city/Country", write_ravel)):
        task = tls.load_task(name, path=folder(tmp_path / name.partition("/")[0]))
        task.examples(0), task.pairs(4, 0), task.dropped()
        assert len(loaded) == 1
        loaded.clear()
