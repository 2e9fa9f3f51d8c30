"""The report of a real model's run and of seventeen methods, opened: light, dark, on a narrow screen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from helpers.drawn import large, large_units
from helpers.written import METHODS, reduction_of, run_folder, table

from tl_sparsify import Scores, report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("large"), reduction=reduction_of(large(share=0.05), "refit"))
    units = large_units()
    values = torch.arange(len(units)).double()
    Scores(units, values, values, "risk", "nats", 0, 0).to_frame().to_csv(folder / "scores.csv", index=False)
    table(("ioi",), (*METHODS, "exchanges")).to_csv(folder / "table.csv", index=False)
    return report.write(folder)


def shades(page: Any) -> tuple[float, float]:
    """How light the page is beside its first picture, and that picture on average."""
    picture = plt.imread(io.BytesIO(page.locator("img").first.screenshot()))[..., :3]
    whole = plt.imread(io.BytesIO(page.screenshot()))[..., :3]
    return float(whole[:, :4].mean()), float(picture.mean())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_are_as_light_or_dark_as_the_page(scheme: str, browser: Any, large_report: Path):
    page = browser.new_page(color_scheme=scheme)
    page.goto(large_report.as_uri())
    beside, picture = shades(page)
    page.close()
    assert (beside < 0.2 and picture < 0.35) if scheme == "dark" else (beside > 0.8 and picture > 0.65)


def test_on_a_narrow_screen_pictures_keep_a_size_that_can_be_read_and_the_page_does_not_move_sideways(
    browser: Any, large_report: Path
):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(large_report.as_uri())
    widths = page.evaluate("[...document.images].map(i => [i.offsetWidth, +i.getAttribute('width')])")
    across = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    page.close()
    assert len(widths) == 10
    assert all(shown >= min(own, 600) for shown, own in widths)
    assert across[0] <= across[1]


def test_thirty_layers_are_folded_away(browser: Any, large_report: Path):
    page = browser.new_page()
    page.goto(large_report.as_uri())
    sentence = page.get_by_text("Layer 17 keeps")
    hidden = not sentence.is_visible()
    page.get_by_text("What each layer keeps").click()
    assert hidden and sentence.is_visible()
    page.close()
