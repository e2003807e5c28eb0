"""What ``isaerft-sweep serve`` says when it starts, and who may ask it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from helpers.serve_client import Client

from isaerft_sweep.cli import main
from isaerft_sweep.cli.serve_commands import add_serve_commands
from isaerft_sweep.serve.keys import KeyRing
from isaerft_sweep.serve.serve_command import Options, introduce


def test_a_key_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = KeyRing(tmp_path / "keys.jsonl")
    introduce(Options(tmp_path), keys)
    shown = capsys.readouterr()
    key = next(line.rpartition("=")[2] for line in shown.out.splitlines() if "WANDB_API_KEY" in line)
    assert len(key) == 40 and keys.user_of(key) and key not in keys.path.read_text()
    assert "WANDB_BASE_URL=http://127.0.0.1:8090" in shown.out and shown.err == "", "this machine alone: no warning"
    again = KeyRing(tmp_path / "keys.jsonl")
    introduce(Options(tmp_path), again)
    assert "WANDB_API_KEY" not in capsys.readouterr().out and again.user_of(key)
    introduce(Options(tmp_path, new_key=True), again)
    other = capsys.readouterr().out
    assert "WANDB_API_KEY=" in other and key not in other


def test_the_default_is_this_machine_and_others_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_serve_commands(parser.add_subparsers())
    assert parser.parse_args(["serve"]).host == "127.0.0.1"
    introduce(Options(tmp_path, host="0.0.0.0"), KeyRing(tmp_path / "keys.jsonl"))
    shown = capsys.readouterr()
    assert f"WANDB_BASE_URL=http://{socket.getfqdn()}:8090" in shown.out, "an address that other machines can use"
    assert "warning: keys and results cross the network unencrypted" in shown.err
    certified = Options(tmp_path, host="0.0.0.0", certificate=tmp_path / "c.pem")
    introduce(certified, KeyRing(tmp_path / "keys.jsonl"))
    shown = capsys.readouterr()
    assert "https://" in shown.out and shown.err == ""


def test_a_users_keys_can_be_made_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = KeyRing(tmp_path / "keys.jsonl")
    lost, kept = keys.add("lost"), keys.add("kept")
    assert main(["serve", "--data", str(tmp_path), "--revoke", "nobody"]) == 2
    assert "Valid: kept, lost" in capsys.readouterr().err
    assert main(["serve", "--data", str(tmp_path), "--revoke", "lost"]) == 0
    after = KeyRing(tmp_path / "keys.jsonl")
    assert after.user_of(lost) is None and after.user_of(kept) == "kept"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", page) for page in ("/", "/local/p", "/local/p/sweeps/s", "/local/p/runs/r1")),
        *(("POST", place) for place in ("/graphql", "/files/local/p/r1/file_stream")),
    ],
)
def test_every_address_needs_a_key(method: str, path: str, client: Client) -> None:
    client.begin("r1")
    for key in (None, ("api", "x" * 40)):
        assert client.http.request(method, path, auth=key).status_code == 401
