"""What `isaerft-sweep sync` uploads, and in which order; real uploads are in test_sync."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isaerft_sweep.cli import main
from isaerft_sweep.errors import SyncError
from isaerft_sweep.tracking.upload import offline_runs, target_from


def offline(folder: Path, name: str, index: int) -> None:
    trial = folder / "trials" / name
    (trial / "wandb" / "wandb" / "offline-run-1").mkdir(parents=True)
    (trial / "wandb" / "wandb" / "offline-run-1" / f"run-{name}.wandb").write_bytes(b"")
    told = {"index": index, "run_id": name, "sweep_id": "s", "experiment": {"tracker": {"project": "p"}}}
    (trial / "spec.json").write_text(json.dumps(told))


def test_trials_are_uploaded_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name, index in (("run-z", 0), ("run-b", 10), ("run-a", 2), ("run-y", 1)):
        offline(tmp_path, name, index)
    assert [one.run_id for one in offline_runs(tmp_path)] == ["run-z", "run-y", "run-a", "run-b"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"index": 1, "run_id": "r", "sweep_id": "s", "experiment": 3}'])
def test_a_broken_trial_is_named(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offline(tmp_path, "good", 0)
    (tmp_path / "trials" / "good" / "spec.json").write_text(text)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert main(["sync", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "spec.json must be a trial's" in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8090", "ftp://a", "http://", "http:// a", "a b"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(SyncError, match="must be an address like"):
        target_from({"WANDB_API_KEY": "k"}, url, None, None)


def test_the_target_s_address() -> None:
    for url in ("http://127.0.0.1:8090", "https://host.example/wandb", "http://[::1]:8090/"):
        assert target_from({"WANDB_API_KEY": "k"}, url, None, None).url == url.rstrip("/")
    assert target_from({"WANDB_API_KEY": "k"}, None, None, None).url == "https://api.wandb.ai"
