"""Figures are legible (no text clipped or over another), and are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as FilePath

import matplotlib.pyplot as plt
import pytest
from helpers.drawn import CIRCUIT, clipped, large, overlapping
from helpers.written import (
    METHODS,
    UNITS,
    affine,
    evidence,
    path,
    reduction_of,
    scores,
    table,
)
from matplotlib.figure import Figure

from tl_sparsify import Circuit, plot

MANY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
OTHER = [float((7 * i) % 19) for i in range(19)]


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: plot.circuit(reduction_of(CIRCUIT, "refit")),
        lambda: plot.circuit(reduction_of(large(12, 12, 3072), "refit")),
        lambda: plot.circuit(reduction_of(large(32, 32, 11008))),
        lambda: plot.circuit(affine(large(3, 4, 16))),
        lambda: plot.head_map(large(12, 12, 1)),
        lambda: plot.head_map(scores([10.0**-i for i in range(19)], "single-unit risk")),
        lambda: plot.neuron_density(large(12, 1, 3072)),
        lambda: plot.evidence(evidence()),
        lambda: plot.frontier(table(tasks=("a", "b", "c", "d")), "accuracy"),
        lambda: plot.frontier(table(tasks=("a",), methods=METHODS[:3])),
        lambda: plot.frontier(table(tasks=("a",), sizes=MANY)),
        lambda: plot.against(scores(), scores(OTHER, "other")),
    ],
)
def test_no_text_is_clipped_or_over_another(drawn: Callable[[], Figure]):
    figure = drawn()
    assert clipped(figure) == []
    assert overlapping(figure) == []


def test_figures_are_not_left_with_pyplot(tmp_path: FilePath):
    before = plt.get_fignums()
    plot.save(plot.risk_curve(path()), tmp_path / "risk.png")
    plot.save(plot.unit_map(Circuit.full(UNITS), scores()), tmp_path / "map.png")
    plot.save(plot.frontier(table(seeds=1, methods=METHODS[:2])), tmp_path / "frontier.png")
    plot.save(plot.evidence(evidence()), tmp_path / "evidence.png")
    assert plt.get_fignums() == before


def test_a_saved_figure_is_a_png_with_nothing_beside_it(tmp_path: FilePath):
    plot.save(plot.unit_map(CIRCUIT), tmp_path / "map.png")
    image = plt.imread(tmp_path / "map.png")
    assert image.shape[0] > 100 and image.shape[1] > 100 and image.std() > 0
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_the_same_figure_is_saved_as_the_same_bytes(tmp_path: FilePath):
    for name in ("a.png", "b.png"):
        plot.save(plot.risk_curve(path()), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert plot.png(plot.circuit(reduction_of(CIRCUIT))) == plot.png(plot.circuit(reduction_of(CIRCUIT)))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_is_all_or_nothing(error: BaseException, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch):
    whole = FilePath.write_bytes

    def torn(target: FilePath, content: bytes) -> int:
        whole(target, content[: len(content) // 2])
        raise error

    plot.save(plot.risk_curve(path()), tmp_path / "old.png")
    before = (tmp_path / "old.png").read_bytes()
    monkeypatch.setattr(FilePath, "write_bytes", torn)
    for name in ("old.png", "new.png"):
        with pytest.raises(type(error)):
            plot.save(plot.unit_map(Circuit.full(UNITS)), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == before
