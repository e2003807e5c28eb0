"""The server's pages: what tells runs apart, and that a phone shows them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import browser, complaints, needs_browser  # noqa: F401  (a fixture)
from helpers.serve_client import BUCKET, CREATE, Client
from helpers.serving import BIN, Serving
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SWEPT = """\
method: random
metric: {name: val.acc, goal: maximize}
run_cap: 3
program: train.py
parameters:
  lr: {distribution: log_uniform_values, min: 1.0e-5, max: 1.0}
  optimizer: {parameters: {name: {values: [adam, sgd]}, betas: {values: [[0.9, 0.99], [0.9, 0.999]]}}}
  batch: {values: [8, 16]}
  seed: {value: 1}
  only: {values: [x]}
"""


def table(page: str, name: str) -> tuple[list[str], list[list[str]]]:
    """A table's header and cells."""
    text = page.split(f"<h2>{name}</h2>")[1].split("</table>")[0]
    rows = [
        [unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
        for row in text.split("<tr>")[1:]
    ]
    return rows[0], rows[1:]


@pytest.mark.parametrize("imported", [False, True])
def test_a_sweep_s_runs_show_everything_that_is_swept_by_its_own_name(client: Client, imported: bool) -> None:
    if imported:
        given = 'mutation I($c: String!) { importSweep(input: {name: "abcd1234", entityName: "local", projectName: "p", config: $c}) { sweep { id name } } }'
        sweep = client.get(given, c=SWEPT)["importSweep"]["sweep"]
        points = [
            {"lr": 10.0**-i, "optimizer": {"name": "adam", "betas": [0.9, 0.99]}, "batch": 8, "seed": 1} for i in range(3)
        ]
        for i, point in enumerate(points):
            config = json.dumps({key: {"value": value} for key, value in point.items()})
            client.get(BUCKET, n=f"r{i}", c=config, s=sweep["name"])
    else:
        sweep = client.get(CREATE, c=SWEPT, p="p")["upsertSweep"]["sweep"]
        commands = [client.beat(client.agent(sweep))[0] for _ in range(3)]
        points = [{key: block["value"] for key, block in command["args"].items()} for command in commands]
    page = client.http.get(f"/local/p/sweeps/{sweep['name']}", headers=client.headers).text
    header, rows = table(page, "Runs")
    assert header == [
        "run",
        "state",
        "val.acc",
        "lr",
        "optimizer.name",
        "optimizer.betas",
        "batch",
        "rows",
        "last update",
        "id",
    ]
    wanted = {
        (f"{p['lr']:.6g}", p["optimizer"]["name"], json.dumps(p["optimizer"]["betas"]), str(p["batch"])) for p in points
    }
    assert {tuple(row[3:7]) for row in rows} == wanted and len(wanted) == 3, "no two rows look the same"
    header, rows = table(client.http.get("/local/p", headers=client.headers).text, "Runs")
    assert header[2] == "sweep" and {row[2] for row in rows} == {sweep["name"]}


LONG = "a_metric_with_a_very_long_name_that_nobody_would_like_to_read_on_a_phone/and_then_some_more_of_it"
RUN = "a-run-with-a-rather-long-id-0123456789-0123456789-0123456789"
PROGRAM = f"""
import wandb
run = wandb.init(project="demo", tags=["t" * 60], config={{"k" * 90: "v" * 300}})
for step in range(5):
    run.log({{"{LONG}": step, "b": 1.0 / (1 + step)}})
run.finish()
"""


@needs_browser
@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(tmp_path: Path, browser: Any) -> None:  # noqa: F811
    serving = Serving(tmp_path)
    serving.start()
    try:
        file = tmp_path / "s.yaml"
        names = ", ".join(f"a.swept.parameter.of.some.length.number.{i}: {{min: 0.0, max: 1.0}}" for i in range(8))
        file.write_text(
            f"method: random\nname: {'n' * 100}\nmetric: {{name: {LONG}}}\nprogram: train.py\nparameters: {{{names}}}\n"
        )
        path = serving.sweep(file)
        environment = {
            **serving.environment,
            "WANDB_SWEEP_ID": path.rpartition("/")[2],
            "WANDB_SILENT": "true",
            "WANDB_RUN_ID": RUN,
        }
        subprocess.run([str(BIN / "python"), "-c", PROGRAM], cwd=tmp_path, env=environment, check=True, timeout=120)
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 3, "mobile": True}
        )
        browser.get(f"http://api:{serving.key}@127.0.0.1:{serving.port}/")
        for page in (
            "/",
            "/local/demo",
            f"/local/demo/sweeps/{path.rpartition('/')[2]}",
            f"/local/demo/runs/{RUN}",
            "/local/demo/runs/nothing",
        ):
            browser.get(f"{serving.address}{page}")
            width = browser.execute_script(
                "return [window.innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
            )
            assert max(width) == 390, (page, width, browser.page_source[:500])
            assert "there is no run" in browser.page_source or not page.endswith("nothing")
            assert browser.execute_script(
                "return [...document.querySelectorAll('h1, p, figure, .fields, pre, .wide')].every(e => e.getBoundingClientRect().right <= 390)"
            ), page
        assert [c["message"] for c in complaints(browser) if "404" not in c["message"]] == []
    finally:
        serving.kill()


SWEEP_FILE = """\
name: demo
method: random
metric: {name: val/acc, goal: maximize}
constraints: {val/cost: {at_most: 3}}
run_cap: 9
program: train.py
parameters:
  lr: {distribution: log_uniform_values, min: 1.0e-5, max: 1.0}
  width: {values: [8, 16, 32]}
command: ["${env}", "${interpreter}", "${program}", "${args_json}"]
"""
TRAIN = """\
import json, math, sys, wandb
params = json.loads(sys.argv[1])
with wandb.init() as run:
    print("hello from <the run>")
    best = 1 - abs(math.log10(params["lr"]) + 2) / 4
    for step in range(6):
        run.log({"val/acc": best * (1 - 0.5 ** step), "val/cost": params["width"] / 8})
    picture = [[[255 * (i == j), 0, 0] for i in range(16)] for j in range(16)]
    import numpy
    run.log({"picture": wandb.Image(numpy.array(picture, dtype="uint8"))})
    with open("notes.txt", "w") as file:
        file.write("kept")
    run.save("notes.txt")
"""


@pytest.fixture
def served_sweep(tmp_path: Path) -> Iterator[tuple[Serving, str]]:
    """A server with a sweep of which the real agent has run six of nine runs; the sweep's path."""
    serving = Serving(tmp_path)
    serving.start()
    try:
        (tmp_path / "s.yaml").write_text(SWEEP_FILE)
        (tmp_path / "train.py").write_text(TRAIN)
        path = serving.sweep(tmp_path / "s.yaml")
        done = serving.run("wandb", "agent", "--count", "6", path)
        assert done.returncode == 0, done.stderr
        yield serving, path
    finally:
        serving.kill()


def press(browser: Any, label: str) -> None:  # noqa: F811
    browser.find_element(By.XPATH, f"//button[text()='{label}']").click()


@needs_browser
@pytest.mark.long
def test_a_sweep_s_page_is_the_report_with_buttons(served_sweep: tuple[Serving, str], browser: Any) -> None:  # noqa: F811
    serving, path = served_sweep
    browser.get(f"http://api:{serving.key}@127.0.0.1:{serving.port}/")
    browser.get(f"{serving.address}/local/demo/sweeps/{path.rpartition('/')[2]}")
    figures = browser.find_elements(By.CLASS_NAME, "plotly-graph-div")
    assert {figure.get_attribute("id") for figure in figures} >= {"figure-map", "figure-importance", "figure-curve-0"}
    WebDriverWait(browser, 30).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "svg.main-svg")) >= len(figures))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#figure-curve-0 .scatterlayer .js-line")) == 6
    rows = [row.text.split() for row in browser.find_elements(By.CSS_SELECTOR, "#leaderboard ~ .wide tr")][1:7]
    assert [row[0] for row in rows[:1]] == ["1"] and any(row[0].startswith("(") for row in rows), (
        "width 32 breaks the constraint"
    )

    header = next(h for h in browser.find_elements(By.CSS_SELECTOR, "#leaderboard ~ .wide th") if h.text.startswith("lr"))
    for order in (1, -1):
        header.click()
        cells = [
            float(row.text.split()[2]) for row in browser.find_elements(By.CSS_SELECTOR, "#leaderboard ~ .wide tr")[1:7]
        ]
        assert cells == sorted(cells)[::order]

    for label, state in (("Pause", "PAUSED"), ("Resume", "RUNNING"), ("Stop", "FINISHED")):
        press(browser, label)
        WebDriverWait(browser, 30).until(lambda b, s=state: s in b.find_element(By.CSS_SELECTOR, "table.fields").text)
    assert browser.find_elements(By.CSS_SELECTOR, "form button") == []

    browser.find_element(By.CSS_SELECTOR, "tr.best a").click()
    WebDriverWait(browser, 30).until(lambda b: "/runs/" in b.current_url)
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "hello from <the run>" in text and "notes.txt" in text and "Machine" in text
    image = browser.find_element(By.TAG_NAME, "img")
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return arguments[0].naturalWidth", image) == 16)
    assert complaints(browser) == [], "nothing that the content policy forbids"


def test_buttons_need_the_key_and_the_page_s_own_origin(client: Client) -> None:
    sweep = client.get(CREATE, c=SWEPT, p="p")["upsertSweep"]["sweep"]
    address = f"/local/p/sweeps/{sweep['name']}/state"
    post = {"data": {"state": "PAUSED"}, "follow_redirects": False}
    assert client.http.post(address, **post).status_code == 401
    assert client.http.post(address, **post, headers={**client.headers, "Origin": "http://evil.example"}).status_code == 403
    assert client.server.sweeps[sweep["name"]].state == "RUNNING"
    answer = client.http.post(address, **post, headers=client.headers)
    assert answer.status_code == 303 and answer.headers["Location"] == address.removesuffix("/state")
    assert client.server.sweeps[sweep["name"]].state == "PAUSED"
    refused = client.http.post(address, data={"state": "PAUSED"}, headers=client.headers)
    assert refused.status_code == 409 and "is PAUSED and cannot become 'PAUSED'" in refused.json()["error"]


def test_a_file_s_address_stays_in_the_run_s_folder(client: Client) -> None:
    client.get(BUCKET, n="r0", c="{}", s="")
    for name in ("../../server.jsonl", "%2e%2e/%2e%2e/server.jsonl", "/etc/passwd", "nothing.png", "a%00b"):
        answer = client.http.get(f"/local/demo/runs/r0/files/{name}", headers=client.headers)
        assert answer.status_code in (400, 404), name


def test_without_plotly_the_page_is_plain_and_says_so(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isaerft_sweep.serve.app.can_draw", lambda: False)
    sweep = client.get(CREATE, c=SWEPT, p="p")["upsertSweep"]["sweep"]
    page = client.http.get(f"/local/p/sweeps/{sweep['name']}", headers=client.headers).text
    assert "isaerft-sweep[report]" in page and page.startswith("<!doctype html>") and "figure-map" not in page
