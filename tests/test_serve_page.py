"""The server's pages: what tells runs apart, and that a phone shows them."""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import browser, complaints, needs_browser  # noqa: F401  (a fixture)
from helpers.serve_client import BUCKET, CREATE, Client
from helpers.serving import BIN, Serving

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
