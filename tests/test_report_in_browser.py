"""The report's page in a real browser: it draws, asks the network for nothing, and logs no error."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.browsing import browser, complaints, needs_browser  # noqa: F401  (a fixture)
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.report.write import write_report

pytestmark = [pytest.mark.slow, needs_browser]


def test_the_page_draws_everything_without_a_network(full_sweep: SweepFolder, browser: Any) -> None:  # noqa: F811
    samples = {"made": "today", "max_new_tokens": 9, "trials": {"best": "run-tiny-7"}, "columns": ["untrained", "best"],
               "prompts": [{"prompt": "Hello?", "answers": ["Curt.", "Gladly."]}]}  # fmt: skip
    write_json(full_sweep.samples, samples)
    page, _ = write_report(read_sweep_folder(full_sweep.path))
    browser.get(page.as_uri())
    figures = browser.find_elements(By.CLASS_NAME, "plotly-graph-div")
    names = {figure.get_attribute("id") for figure in figures}
    assert names == {
        "figure-map",
        "figure-parallel",
        "figure-importance",
        "figure-cost",
        "figure-curve-0",
        "figure-similarity-0",
    }
    WebDriverWait(browser, 30).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "svg.main-svg")) >= len(figures))
    for figure in figures:
        assert figure.size["height"] > 100 and figure.size["width"] > 600, figure.get_attribute("id")

    points = browser.find_elements(By.CSS_SELECTOR, "#figure-map .scatterlayer .point")
    assert len(points) == 11, "eight completed trials, one stopped early, one diverged, one failed"
    ticks = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#figure-map .yaxislayer-above text")]
    assert ticks == ["0.1", "0.2", "0.4"]
    lines = browser.find_elements(By.CSS_SELECTOR, "#figure-curve-0 .scatterlayer .js-line")
    assert len(lines) == 8

    rows = browser.find_elements(By.CSS_SELECTOR, "tr.best td")
    assert [cell.text for cell in rows[:2]] == ["1", "#8"]
    answers = browser.find_elements(By.CSS_SELECTOR, ".answers pre")
    assert [a.text for a in answers] == ["Curt.", "Gladly."]
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert fetched == [], "one file, no network"
    assert complaints(browser) == []
    narrow = browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert narrow, "nothing sticks out at the side"
