"""The server with a certificate: the real ``wandb`` command over https, and the status page in a real browser."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import browser, complaints, needs_browser  # noqa: F401  (a fixture)
from helpers.served_sweeps import READ
from helpers.serving import Serving
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.slow
PROGRAM = """
import wandb
run = wandb.init(settings=wandb.Settings(silent=True))
for step in range(6):
    run.log({"loss": run.config.lr + 1 / (1 + step)}, step=step)
run.finish()
"""
SWEEP = """
program: train.py
method: grid
metric: {name: loss, goal: minimize}
parameters: {lr: {values: [0.1, 0.2]}}
"""


class Encrypted(Serving):
    """Clients trust its certificate and no other."""

    @property
    def environment(self) -> Mapping[str, str]:  # type: ignore[override]
        certificate = self.options[self.options.index("--certificate") + 1]
        return {**super().environment, "SSL_CERT_FILE": certificate, "REQUESTS_CA_BUNDLE": certificate}


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Encrypted]:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = [
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ]
    files = ["-keyout", str(key), "-out", str(certificate), "-days", "2"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-x509"]
    subprocess.run(["openssl", "req", *kind, *subject, *files], check=True, capture_output=True)
    server = Encrypted(tmp_path, "--certificate", str(certificate), "--private-key", str(key))
    server.start()
    yield server
    server.kill()


@needs_browser
def test_a_sweep_over_https_and_its_page(serving: Encrypted, tmp_path: Path, browser: Any) -> None:  # noqa: F811
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "s.yaml").write_text(SWEEP)
    path = serving.sweep(tmp_path / "s.yaml")
    assert serving.agent(path, "agent").wait(120) == 0, (tmp_path / "agent.out").read_text()
    done = serving.run(sys.executable, "-c", READ, path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state"] == "FINISHED" and [run["steps"] for run in found["runs"].values()] == [[*range(6)]] * 2
    assert "unencrypted" not in serving.out.read_text()

    entity, project, sweep = path.split("/")
    browser.get(f"https://api:{serving.key}@127.0.0.1:{serving.port}/")
    browser.get(f"https://127.0.0.1:{serving.port}/{entity}/{project}/sweeps/{sweep}")
    assert browser.find_element(By.TAG_NAME, "h1").text == sweep
    lines = "#figure-curve-0 .scatterlayer .js-line"
    WebDriverWait(browser, 30).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, lines)) == 2, "a curve for each run")
    states = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "span.state")]
    assert states.count("finished") == 2 and "FINISHED" in states
    browser.find_element(By.LINK_TEXT, found["runs"][found["best"]]["name"]).click()
    assert found["runs"][found["best"]]["name"] in browser.find_element(By.TAG_NAME, "h1").text
    assert "loss" in [e.text for e in browser.find_elements(By.TAG_NAME, "figcaption")]
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith(f"{serving.address}/static/") for name in fetched), fetched
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert complaints(browser) == []


def test_a_client_that_does_not_trust_the_certificate_is_told(serving: Encrypted, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP)
    trusting = Serving(tmp_path, *serving.options)
    trusting.port, trusting.key = serving.port, serving.key
    done = trusting.run("wandb", "sweep", "-p", "p", str(tmp_path / "s.yaml"))
    assert done.returncode != 0 and "certificate" in (done.stdout + done.stderr).lower()


def test_connections_that_never_greet_are_closed(serving: Encrypted) -> None:
    silent = [socket.create_connection(("127.0.0.1", serving.port), 5) for _ in range(600)]
    began = time.monotonic()
    assert serving.run("wandb", "sweep", "-p", "p", "nothing.yaml").returncode != 0  # it answers, to others' clients too
    for one in silent:
        one.settimeout(30)
        assert one.recv(10) == b""
        one.close()
    assert time.monotonic() - began < 30
