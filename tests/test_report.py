"""The report: one file that loads nothing, sentences that hold the numbers, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers.written import METHODS, UNITS, about, affine, baselines, evidence, reduction_of, row, run_folder, table
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify import Circuit, Evidence, report
from tl_sparsify.abstraction.verdicts import accepted
from tl_sparsify.presentation import sentences
from tl_sparsify.presentation.results import RUN_FILES, RunResults

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
EVIL = "<script>alert('1')</script> & \"quoted\""


class Page(HTMLParser):
    """The words, tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def images(self) -> list[bytes]:
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


def bench_folder(folder: Path, frame: pd.DataFrame | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (table(methods=METHODS[:5]) if frame is None else frame).to_csv(folder / "table.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a folder with a run and a benchmark."""
    folder = bench_folder(run_folder(tmp_path_factory.mktemp("both")))
    assert report.write(folder) == folder / "report.html"
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(both: Path) -> Page:
    return Page(both.read_text())


def test_the_report_loads_nothing(both: Path, page: Page):
    text = both.read_text()
    assert "http:" not in text and "https:" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    assert [attributes for tag, attributes in page.tags if "href" in attributes or "onload" in attributes] == []
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy is not None and "default-src 'none'" in policy


def test_every_picture_is_whole_has_a_size_and_says_what_it_shows(page: Page):
    for content in page.images():
        assert plt.imread(io.BytesIO(content)).std() > 0
    for tag, attributes in page.tags:
        if tag == "img":
            assert len(str(attributes["alt"])) > 20 and 100 < int(str(attributes["width"])) < 1400
    assert len(page.images()) == 7 + 3


@pytest.mark.parametrize(
    "said",
    [
        "6 of 19 units (31.6%) answer 99.7% of the test examples right, where the whole model answers 99.9%",
        "The hypothesised algorithm is not accepted on this evidence",
        "The search kept 3 heads, 3 neurons; the other 13 are replaced by refitted constants",
        "Layer 0 keeps 1 of 3 heads (1) and 1 of 5 neurons",
        "a model of 227 parameters instead of 1,000 (22.7%)",
        "differ from the ablated model's by at most 1.2e-06",
        "On 1,234 test examples",
        "a constant answer 50.0%",
        "is 0.0101 nats (95% interval 0.00814 to 0.0121)",
        "Faithfulness is 0.697",
        "completeness 0.005",
        "with probability 0.1, in both models alike, 89.1% of the answers agree and the risk is 0.593 nats",
        "With the same refit for all, the found circuit's risk is 0.012 nats",
        "the best of the other orders, activation variance, has 0.5 nats (accuracy 75.0%), 41.7 times as much",
        "On the original model, accepted: left, left & right, left & right (a source each). Rejected: right.",
        "On the reduced model, accepted: left. Rejected: right.",
        "0.522 (random units, for left)",
        "Of the units aligned with left, the reduced model lacks 3 of 10",
        "12.5% of the pairs do not count",
        "changes 56.7% of the original model's answers",
        "one seed (3)",
        "5 methods on 2 tasks, 3 seeds",
        "Tasks on which no other method has a lower risk, with mean ablation: 2 of 2 at 20%",
        "Settings and versions of the run",
    ],
)
def test_it_says_so_in_plain_sentences(said: str, page: Page):
    assert said in page.text


def test_tables_hold_every_row(page: Page):
    for method in (*METHODS[:5], "found circuit, as saved", "random", "L0H0"):
        assert method in page.text
    assert page.text.count("rejected") >= 2 and page.text.count("accepted") >= 5


@pytest.mark.parametrize("with_run", [True, False])
def test_either_alone_works(with_run: bool, tmp_path: Path):
    folder = run_folder(tmp_path) if with_run else bench_folder(tmp_path)
    found = Page(report.write(folder, tmp_path / "other.html").read_text())
    assert ("What was found" in found.text) == with_run
    assert ("Risk against units kept" in found.text) == (not with_run)
    assert len([tag for tag, _ in found.tags if tag == "h1"]) == 1
    assert not (tmp_path / "report.html").exists()


def test_the_same_results_give_the_same_bytes_and_nothing_is_left_beside(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    first = report.write(folder).read_bytes()
    before = sorted(folder.iterdir())
    assert report.write(folder).read_bytes() == first and sorted(folder.iterdir()) == before


def test_everything_is_escaped(tmp_path: Path):
    changed = about(task=EVIL, description=EVIL, versions={EVIL: EVIL})
    wrong = Evidence((row("original", EVIL, EVIL, 0.5), *evidence().rows))
    beside = baselines().replace("activation variance", EVIL)
    folder = run_folder(tmp_path, about=changed, evidence=wrong, baselines=beside)
    bench_folder(folder, table(tasks=(EVIL,), methods=(EVIL, "joint risk")))
    text = report.write(folder).read_text()
    assert "<script" not in text and "alert('1')" not in text
    found = Page(text)
    assert EVIL in found.text and {tag for tag, _ in found.tags} <= set(
        "html head meta title style body h1 h2 h3 p ul li dl div dt dd figure img figcaption table tr th td details "
        "summary code".split()
    )


def test_affine_replacements_and_a_whole_model_are_described(tmp_path: Path):
    some = Circuit.of(UNITS, ["L0H1", "L0N4", "L1N0", "L2N1"])
    one = run_folder(tmp_path / "affine", reduction=affine(some))
    assert "affine maps of kept units, refitted" in Page(report.write(one).read_text()).text
    two = run_folder(tmp_path / "full", reduction=reduction_of(Circuit.full(UNITS), "refit"))
    assert "The search kept 5 heads, 14 neurons: all of them." in Page(report.write(two).read_text()).text


@pytest.mark.parametrize("folder", ["empty", "none"])
def test_a_folder_without_results_is_refused_with_the_commands_that_make_them(folder: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no results") as error:
        report.write(tmp_path / folder)
    assert "tl-sparsify run TASK --out" in str(error.value) and "tl-sparsify bench --out" in str(error.value)
    assert "run.json" in str(error.value) and "table.csv" in str(error.value)


@pytest.mark.parametrize("missing", [("run.json",), ("circuit.reduction", "evidence.csv"), RUN_FILES[2:]])
def test_an_unfinished_run_is_refused_by_what_is_missing(missing: tuple[str, ...], tmp_path: Path):
    folder = bench_folder(run_folder(tmp_path))
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="unfinished run") as error:
        report.write(folder)
    assert ", ".join(missing) in str(error.value) and "tl-sparsify run TASK" in str(error.value)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", "{", "run.json is damaged"),
        ("path.csv", "", "path.csv is no table"),
        ("path.csv", "kept,fraction\n", "path.csv has no rows"),
        ("circuit.reduction", "nothing", "is damaged or truncated"),
        ("scores.csv", "unit,kind,layer,index,score,stderr\nL0H0,head,0,0,1,0\n", "are of different units"),
        ("table.csv", "task,method\na,b\n", "table.csv has no column seed"),
        ("settings.json", "[", "settings.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, said: str, tmp_path: Path):
    folder = bench_folder(run_folder(tmp_path))
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        report.write(folder)


def test_where_it_cannot_be_written_is_said(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="a folder: name a file in it"):
        report.write(folder, tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        report.write(folder, tmp_path / "far" / "report.html")


@given(
    st.one_of(st.just(math.nan), st.floats(0, 1)),
    st.one_of(st.just(math.nan), st.floats(0, 1)),
)
def test_a_variable_is_accepted_by_one_rule_which_controls_are_held_to_as_well(accuracy: float, changed: float):
    fine = accuracy >= 0.95 and not changed < 0.9
    rows = (row("original", "aligned units", "v", accuracy, changed), row("original", "do nothing", "v", 0.96, 0.91))
    verdict = Evidence(rows).verdicts().iloc[0]
    assert verdict.accepted == fine == accepted(accuracy, changed) == Evidence(rows).verdict("v").accepted
    assert verdict.passing == ["do nothing"] and (verdict.control, verdict.control_accuracy) == ("do nothing", 0.96)


def test_a_control_that_passes_is_a_limit_and_so_is_what_is_left_in_the_rest(tmp_path: Path):
    plain = sentences.limits(RunResults.load(run_folder(tmp_path / "plain")))
    assert not any("accepted too" in said or "Completeness" in said for said in plain)
    found = evidence(random={"accuracy": 0.97, "accuracy_changed": 0.96})
    odd = RunResults.load(run_folder(tmp_path / "odd", evidence=found, evaluation={"completeness": 0.41}))
    said = sentences.limits(odd)
    assert any("For left (original) random weights would be accepted too" in each for each in said)
    assert any("Completeness is 0.410" in each for each in said)


def test_intervals_of_resampled_examples_go_before_those_by_standard_errors(tmp_path: Path):
    plain = sentences.quality(RunResults.load(run_folder(tmp_path / "plain")))
    assert any("is 0.0101 nats (95% interval 0.00814 to 0.0121)" in said for said in plain)
    resampled = run_folder(tmp_path / "resampled", evaluation={"risk_low": 0.0021, "risk_high": 0.0391})
    assert any(
        "0.0101 nats (95% interval 0.0021 to 0.0391)" in said for said in sentences.quality(RunResults.load(resampled))
    )
    none = run_folder(tmp_path / "none", evaluation={"risk": 3e-9, "risk_stderr": 1e-9, "completeness": -1e-9})
    said = " ".join(sentences.quality(RunResults.load(none)))
    assert "is less than 1e-06 nats." in said and "completeness 0.000" in said


def test_the_search_is_not_praised_where_it_is_not_ahead(tmp_path: Path):
    behind = sentences.compared(RunResults.load(run_folder(tmp_path / "a", baselines=baselines(found=0.6, best=0.5))))
    assert all("the search is not ahead of it here" in said for said in behind) and len(behind) == 2
    equal = sentences.compared(RunResults.load(run_folder(tmp_path / "b", baselines=baselines(found=0.5, best=0.5))))
    assert all(said.endswith(": the same.") for said in equal)
    nothing = sentences.compared(RunResults.load(run_folder(tmp_path / "c", baselines=baselines(found=0.0, best=0.5))))
    assert all("times" not in said and said.endswith(").") for said in nothing)
    tiny = sentences.compared(RunResults.load(run_folder(tmp_path / "d", baselines=baselines(found=3e-15, best=1e-15))))
    assert all(said.endswith(": the same, up to rounding.") and "less than 1e-06 nats" in said for said in tiny)


def test_a_benchmark_in_which_another_method_wins_says_where():
    frame = table(tasks=("one", "two"), methods=("joint risk", "EAP", "random"))
    frame.loc[(frame.task == "two") & (frame["size"] == 0.1) & (frame.method == "EAP"), "risk"] = 1e-9
    best = sentences.leading(frame).set_index(["task", "size"])
    assert best.loc[("two", 0.1), "other"] == "EAP" and best.loc[("two", 0.1), "other_risk"] == pytest.approx(1e-9)
    means = frame[(frame.task == "one") & (frame.method == "joint risk")].groupby("size").risk.mean()
    for size, risk in means.items():
        assert best.loc[("one", size), "ours_risk"] == pytest.approx(risk)
    said = sentences.summary(frame)
    assert any("2 of 2 at 20%, 1 of 2 at 10%" in each for each in said)
    assert any("another method is ahead on" in each and "two at 10% (EAP)" in each for each in said)


def test_methods_has_a_row_for_each_with_means_over_seeds():
    frame = table(tasks=("a", "b"), methods=("joint risk", "EAP"))
    part = frame[frame.task == "b"].assign(setting=lambda some: some.seed.map({0: "one", 1: "two", 2: "two"}))
    found = sentences.methods(part).set_index("method")
    joint = part[(part.method == "joint risk") & (part["size"] == 0.05)]
    assert found.loc["joint risk", "5% kept"] == f"{joint.risk.mean():.3g} ({joint.accuracy.mean():.3f})"
    assert found.loc["EAP", "auroc"] == pytest.approx(part[part.method == "EAP"].auroc.mean())
    assert found.loc["EAP", "setting"] == "two"
    assert "auroc" not in sentences.methods(frame[frame.task == "a"])  # where the true units are not known


def chromium(file: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium): not rendered")
@pytest.mark.parametrize("width", [1100, 420])
def test_a_browser_shows_the_text_every_picture_and_no_sideways_scrolling(width: int, both: Path, tmp_path: Path):
    probe = (
        "<script>onload = () => { const all = [...document.images]; document.body.dataset.found = JSON.stringify("
        "[all.length, all.filter(i => !i.complete || !i.naturalWidth).length, "
        "document.documentElement.scrollWidth <= innerWidth]) }</script></body>"
    )
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", both.read_text())
    (tmp_path / "probed.html").write_text(text.replace("</body>", probe))
    size = f"--window-size={width},900"
    shown = chromium(tmp_path / "probed.html", tmp_path / "one", size, "--dump-dom").stdout.decode()
    [found] = [a["data-found"] for tag, a in Page(shown).tags if tag == "body"]
    assert found == "[10,0,true]"
    assert "6 of 19 units (31.6%)" in shown and "with mean ablation" in shown


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium): not rendered")
def test_a_browser_draws_it(both: Path, tmp_path: Path):
    target = tmp_path / "page.png"
    chromium(both, tmp_path / "profile", "--window-size=1100,1600", f"--screenshot={target}")
    image = plt.imread(target)
    assert image.shape[:2] == (1600, 1100) and image.std() > 0.05
    rows: Any = np.ptp(image[..., :3], axis=(1, 2)) > 0.3
    assert rows.mean() > 0.5  # most rows of pixels have ink


def test_a_report_says_where_pairs_cannot_tell_a_variable_from_the_answer(tmp_path: Path):
    unclear = [replace(r, tells_apart=0.01) if r.variable == "left" else r for r in evidence().rows]
    run = RunResults.load(run_folder(tmp_path / "run", evidence=Evidence(tuple(unclear))))
    said = " ".join(sentences.algorithm(run))
    assert "On the original model, accepted: left & right, left & right (a source each). Rejected: right." in said
    assert said.count("Cannot tell: left.") == 2
    assert any(text.startswith("1.0% of the pairs tell left from the answer") for text in sentences.limits(run))
    one = Evidence(tuple(r for r in unclear if r.variable == "left"))
    assert "neither accepted nor rejected" in sentences.headline(
        RunResults.load(run_folder(tmp_path / "one", evidence=one))
    )
    page = report.write(tmp_path / "run", tmp_path / "report.html").read_text()
    assert "<td>cannot tell</td>" in page and "<td>1.0%</td>" in page and "<td>50.0%</td>" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"refitted_in_rounds": True}, "refitted in every round of its search and once more"),
        ({"refitted_in_rounds": False}, "refitted once, after its search"),
        ({}, "refitted otherwise"),
    ],
)
def test_a_report_says_how_often_the_circuit_was_refitted(changes: dict[str, Any], said: str, tmp_path: Path):
    run = RunResults.load(run_folder(tmp_path, about=about(**changes)))
    assert f"The saved circuit was {said}:" in " ".join(sentences.limits(run))


@pytest.mark.parametrize("name", ["null", "nan", "NA"])
def test_a_variable_may_be_named_as_nothing(name: str, tmp_path: Path):
    named = tuple(replace(r, variable=name) if r.variable == "left" else r for r in evidence().rows)
    text = Page(report.write(run_folder(tmp_path, evidence=Evidence(named))).read_text()).text
    assert f"On the original model, accepted: {name}, left & right" in text
