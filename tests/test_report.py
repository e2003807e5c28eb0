"""The report: what it shows, that it is honest, and that it never fails on what a sweep may leave behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from helpers.sweeps import (
    add_latents,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from isaerft_sweep.cli import main
from isaerft_sweep.errors import DataError
from isaerft_sweep.journal.atomic_files import write_json, write_text
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.results.axes import axis
from isaerft_sweep.results.curves import curves_of, thinned
from isaerft_sweep.results.importance import importance
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.report.gather import gather
from isaerft_sweep.results.report.write import write_report


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=2000), st.integers(4, 300))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_ends_and_peaks(values: list[float], points: int) -> None:
    array = np.array(values, dtype=np.float32)
    kept = thinned(array, points)
    assert len(kept) <= max(points, 4) and (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == len(array) - 1
    assert array[kept].max() == array.max() and array[kept].min() == array.min()
    if len(array) <= points:
        assert len(kept) == len(array)


def test_curves_leave_out_what_is_not_a_number() -> None:
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": float("nan")}, {"step": 2, "eval/loss": 1.0}]
    found = curves_of(rows, ["train/loss", "eval/loss", "eval/nll_loss"])
    assert set(found) == {"train/loss", "eval/loss"}
    assert found["train/loss"].steps.tolist() == [1] and found["train/loss"].total == 2


def sweep_of(
    path: Path, file: str, points: list[dict[str, Any]], values: list[float], goal: str = "maximize"
) -> SweepFolder:
    """A sweep's folder with given points and outcomes."""
    folder = SweepFolder(path)
    journal = Journal(folder)
    write_text(folder.definition, file)
    journal.write("sweep", sweep_id="s1234567", question="q", metric="eval/log_odds_chosen", goal=goal)
    for i, (params, value) in enumerate(zip(points, values, strict=True)):
        trial = folder.trial(f"run-{i}")
        trial.path.mkdir(parents=True)
        journal.write("trial", index=i, name=trial.path.name, run_id=f"r{i}", params=params, unit={})
        write_json(trial.status, {"state": "completed", "attempt": 1, "metrics": {"eval/log_odds_chosen": value}})
        journal.write("end", index=i, state="completed", metric=value, message="", seconds=1.0, given_up=False)
    journal.close()
    return folder


SPACE = """\
method: random
metric: {name: eval/log_odds_chosen, goal: maximize}
run_cap: 99
parameters:
  orpo.learning_rate: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}
  orpo.beta: {values: [0.05, 0.1, 0.15, 0.2]}
  orpo.warmup_steps: {distribution: q_uniform, min: 1, max: 9, q: 1}
  orpo.max_grad_norm: {values: [0.1, 1.0, 10.0]}
  orpo.schedule: {values: [linear, cosine]}
"""


def many(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "orpo.learning_rate": float(1e-4 * 1000 ** rng.random()),
            "orpo.beta": float(rng.choice([0.05, 0.1, 0.15, 0.2])),
            "orpo.warmup_steps": int(rng.integers(1, 10)),
            "orpo.max_grad_norm": float(rng.choice([0.1, 1.0, 10.0])),
            "orpo.schedule": str(rng.choice(["linear", "cosine"])),
        }
        for _ in range(count)
    ]


def test_every_parameter_is_drawn_on_the_scale_it_was_searched_on(tmp_path: Path) -> None:
    points = many()
    sweep = read_sweep_folder(sweep_of(tmp_path / "s", SPACE, points, [0.0] * len(points)).path)
    kinds = {key: axis(key, sweep).kind for key in sweep.swept}
    assert kinds == {
        "orpo.learning_rate": "log",
        "orpo.beta": "linear",
        "orpo.warmup_steps": "linear",
        "orpo.max_grad_norm": "log",
        "orpo.schedule": "category",
    }
    assert axis("orpo.beta", sweep).ticks == (0.05, 0.1, 0.15, 0.2)
    assert axis("orpo.learning_rate", sweep).on_scale(1e-3) == pytest.approx(-3)
    assert axis("orpo.schedule", sweep).coordinate("linear") == 1.0


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_importance_is_optunas_and_finds_what_decides(goal: str, tmp_path: Path) -> None:
    points = many(60)
    sign = 1 if goal == "maximize" else -1
    values = [-sign * (np.log10(p["orpo.learning_rate"]) + 2.5) ** 2 for p in points]
    found = importance(read_sweep_folder(sweep_of(tmp_path / "s", SPACE, points, values, goal).path))
    assert found is not None and sum(found.shares.values()) == pytest.approx(1)
    assert (
        max(found.shares, key=lambda key: found.shares[key]) == "orpo.learning_rate"
        and found.shares["orpo.learning_rate"] > 0.5
    )
    assert (found.good, found.trials) == (6, 60)

    low, high = (f(p["orpo.learning_rate"] for p in points) for f in (min, max))
    study = optuna.create_study(direction=goal, sampler=optuna.samplers.RandomSampler(seed=1))
    for p, value in zip(points, values, strict=True):
        study.enqueue_trial({**p, "orpo.warmup_steps": float(p["orpo.warmup_steps"])})

        def objective(trial: optuna.Trial, value: float = value) -> float:
            trial.suggest_float("orpo.learning_rate", low, high, log=True)
            trial.suggest_categorical("orpo.beta", [0.05, 0.1, 0.15, 0.2])
            trial.suggest_float("orpo.warmup_steps", 1, 9)
            trial.suggest_categorical("orpo.max_grad_norm", [0.1, 1.0, 10.0])
            trial.suggest_categorical("orpo.schedule", ["cosine", "linear"])
            return value

        study.optimize(objective, n_trials=1)
    theirs = optuna.importance.get_param_importances(study)
    assert found.shares == pytest.approx(theirs, abs=1e-9)


def test_importance_is_silent_where_nothing_can_be_said(tmp_path: Path) -> None:
    few = many(5)
    assert importance(read_sweep_folder(sweep_of(tmp_path / "few", SPACE, few, [0.1] * 5).path)) is None
    one = [{"orpo.learning_rate": 1e-4 * (i + 1)} for i in range(20)]
    assert importance(read_sweep_folder(sweep_of(tmp_path / "one", SPACE, one, [0.1] * 20).path)) is None


def test_the_page_shows_all_of_a_sweep_that_still_runs(full_sweep: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(full_sweep.path)]) == 0
    printed = capsys.readouterr().out.split()
    page = (full_sweep.path / "report.html").read_text()
    assert printed[0] == str(full_sweep.path / "report.html")
    pictures = {Path(line).name for line in printed[1:]}
    assert pictures == {
        f"{name}.png" for name in ("space", "curves", "parallel", "cost", "importance", "latents", "similarity")
    }
    assert all(Path(line).read_bytes().startswith(b"\x89PNG") for line in printed[1:])
    for wanted in (
        "8 completed, 1 diverged, 1 failed, 1 pruned, 1 running", "stopped early", "held-out pairs", "Try a smaller learning rate", "of 4,803 points are drawn", "PED-ANOVA",
        "neuronpedia.org/gemma-2-2b/2-gemmascope-res-16k/", "log_uniform_values from 0.0001 to 0.1", "report", "--generate",
    ):  # fmt: skip
        assert wanted in page, wanted
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page, "a reason is shown, not executed"
    assert len(page) < 15e6
    body = page[page.index("</head>") :]
    assert 'src="http' not in body and '<link rel="stylesheet"' not in page, "nothing is fetched"


def test_ranked_by_another_metric_it_says_so(full_sweep: SweepFolder) -> None:
    page, _ = write_report(read_sweep_folder(full_sweep.path, "eval/rewards/margins"))
    assert "contains beta itself" in page.read_text() and "the sweep itself searched by" in page.read_text()


def test_answers_are_shown_as_text(full_sweep: SweepFolder) -> None:
    samples = {"made": "today", "max_new_tokens": 9, "trials": {"best": "run-tiny-7"}, "columns": ["untrained", "best"],
               "prompts": [{"prompt": "Hello?", "answers": ["<b>curt</b>", "Gladly."]}]}  # fmt: skip
    write_json(full_sweep.samples, samples)
    page = write_report(read_sweep_folder(full_sweep.path))[0].read_text()
    assert "&lt;b&gt;curt" in page and "Gladly." in page and "Hello?" in page and "make the answers again" not in page
    other = write_report(read_sweep_folder(full_sweep.path, "eval/rewards/margins"))[0].read_text()
    assert "make the answers again" in other, "another trial is the best by that metric"


def test_labels_are_shown_and_must_fit(full_sweep: SweepFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([f"meaning {i}" for i in range(32)]))
    assert main(["report", str(full_sweep.path), "--labels", str(labels)]) == 0
    assert (full_sweep.path / "report.html").read_text().count("meaning") >= 15
    labels.write_text(json.dumps({"32": "outside"}))
    assert main(["report", str(full_sweep.path), "--labels", str(labels)]) == 2
    assert "must be for an SAE of 32 latents" in capsys.readouterr().err
    labels.write_text(json.dumps(["too", "few"]))
    with pytest.raises(DataError, match="must be for 32 latents"):
        gather(read_sweep_folder(full_sweep.path), {None: labels})
    csv = tmp_path / "labels.csv"
    csv.write_text("latent,label\n3,third\n")
    assert gather(read_sweep_folder(full_sweep.path), {2: csv}).latents[0].labels == {3: "third"}
    csv.write_bytes(b"\xef\xbb\xbflatent,label\n3,third\n")  # as Excel writes it
    assert gather(read_sweep_folder(full_sweep.path), {None: csv}).latents[0].labels == {3: "third"}
    assert main(["report", str(full_sweep.path), "--labels", f"5={csv}"]) == 2
    assert "must be for a layer" in capsys.readouterr().err
    add_latents(full_sweep, ["run-tiny-1"], layers=(2, 4))
    with pytest.raises(DataError, match="LAYER=FILE"):
        gather(read_sweep_folder(full_sweep.path), {None: csv})
    found = gather(read_sweep_folder(full_sweep.path), {4: csv}).latents
    assert [across.labels for across in found] == [{}, {3: "third"}]


def test_latents_of_different_saes_are_not_compared(full_sweep: SweepFolder) -> None:
    add_latents(full_sweep, ["run-tiny-1", "run-tiny-2"], fingerprint="other")
    sizes = sorted(len(across.entries) for across in gather(read_sweep_folder(full_sweep.path)).latents)
    assert sizes == [2, 6]


def test_a_sweep_without_any_result_has_a_page_too(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "s")
    journal = Journal(folder)
    journal.write("sweep", sweep_id="s1", question="q", metric="eval/log_odds_chosen", goal="maximize")
    page, pictures = write_report(read_sweep_folder(folder.path))
    assert "none yet" in page.read_text() and pictures == []
    journal.write("trial", index=0, name="run-0", run_id="r0", params={"orpo.beta": 0.1}, unit={})
    journal.close()
    page, _ = write_report(read_sweep_folder(folder.path), tmp_path / "elsewhere")
    assert page.parent == tmp_path / "elsewhere" and "1 created" in page.read_text()


def test_one_swept_parameter_is_drawn_against_the_metric(tmp_path: Path) -> None:
    points = [{"orpo.learning_rate": 1e-4 * (i + 1)} for i in range(4)]
    folder = sweep_of(tmp_path / "s", SPACE, points, [0.1, 0.2, 0.3, 0.2])
    page, pictures = write_report(read_sweep_folder(folder.path))
    assert "figure-map" in page.read_text() and {p.name for p in pictures} == {"space.png", "parallel.png", "cost.png"}


def test_half_written_trials_and_foreign_folders(
    full_sweep: SweepFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_sweep.trial("run-now").metrics.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the worker writes at this moment
    foreign = SweepFolder(tmp_path / "foreign")
    foreign.path.mkdir()
    foreign.journal.write_bytes(b"\xff\n")
    assert main(["report", str(full_sweep.path)]) == 0
    assert main(["report", str(tmp_path)]) == 2
    assert "must be a sweep's folder" in capsys.readouterr().err
    full_sweep.trial("run-tiny-3").latents.write_bytes(b"PK\x03\x04 cut short")
    full_sweep.trial("run-tiny-4").metrics.write_text('{"step": 1}\n{"train/loss": 2.0}\nno json\n')
    full_sweep.trial("run-tiny-5").status.write_text('{"metrics": null, "state":')
    full_sweep.samples.write_text("{half")
    full_sweep.environment.write_text('{"host": "here"}')
    assert main(["report", str(full_sweep.path)]) == 0
    page = (full_sweep.path / "report.html").read_text()
    for name in ("run-tiny-3", "run-tiny-4", "run-tiny-5", "samples.json", "environment.json"):
        assert re.search(f"{name}.*cannot be read|cannot be read from .*{name}", page), name
    assert "7 completed" not in page.split("unreadable")[0].split("trials")[0] and "1 unreadable" in page


@pytest.mark.parametrize(
    "values",
    [
        [None, 10, 50],
        ["cosine", None, "linear"],
        [[{"layer": 1}], [{"layer": 2}], [{"layer": 1}, {"layer": 2}]],
        [True, False, True],
    ],
    ids=["none", "names", "sites", "booleans"],
)
def test_odd_parameters_are_drawn(values: list[Any], tmp_path: Path) -> None:
    points = [{"orpo.learning_rate": 1e-4 * (i + 1), "adapter.top_k": values[i % 3]} for i in range(9)]
    points[4].pop("adapter.top_k")  # W&B's runs may lack a parameter
    folder = sweep_of(tmp_path / "s", SPACE, points, [0.1 * i for i in range(9)])
    page, pictures = write_report(read_sweep_folder(folder.path))
    assert "figure-map" in page.read_text() and "space.png" in {p.name for p in pictures}
    found = axis("adapter.top_k", read_sweep_folder(folder.path))
    assert found.kind == "category" and (values[1] != 10 or found.values == (None, 10, 50))


def test_without_the_extra_the_error_names_it(full_sweep: SweepFolder) -> None:
    code = "import sys; sys.modules['plotly'] = None; from isaerft_sweep.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "report", str(full_sweep.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'isaerft-sweep[report]'" in done.stderr, done.stderr


def test_the_report_never_loads_torch(full_sweep: SweepFolder) -> None:
    code = (
        "import sys; from isaerft_sweep.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'wandb'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "report", str(full_sweep.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout


def test_figures_for_papers_have_legends_intervals_and_formats(full_sweep: SweepFolder) -> None:
    for entry in read_sweep_folder(full_sweep.path).entries[:10]:
        if entry.rank and entry.folder:
            ends = {"step": 601, "time": 2.0, "eval/log_odds_chosen": entry.value("eval/log_odds_chosen")}
            with entry.folder.metrics.open("a") as file:
                file.write(json.dumps({"step": 300, "eval/log_odds_chosen": 0.0}) + "\n" + json.dumps(ends) + "\n")
    _, pictures = write_report(read_sweep_folder(full_sweep.path))
    best = read_sweep_folder(full_sweep.path).best()
    assert best.interval is not None
    for png in pictures:
        pdf, svg = png.with_suffix(".pdf"), png.with_suffix(".svg")
        assert pdf.read_bytes().startswith(b"%PDF") and "<svg" in svg.read_text()[:1000], png
    text = {png.stem: png.with_suffix(".svg").read_text() for png in pictures}
    assert "completed" in text["space"] and "#8" in text["curves"], "each has its legend"
    assert "95 % over held-out pairs" in text["cost"] and "95 % over held-out pairs" in text["curves"]
    assert "best: #8" in text["parallel"] and "log odds" in text["parallel"]
    assert "raised" in text["latents"] and "cosine" in text["similarity"]
    assert ">lr<" in text["importance"] and ">lr<" in text["space"] and "orpo." not in text["space"], "one name everywhere"
    before = {path: path.read_bytes() for path in pictures[0].parent.glob("*.svg")}
    write_report(read_sweep_folder(full_sweep.path))
    assert {path: path.read_bytes() for path in pictures[0].parent.glob("*.svg")} == before, "the same sweep, the same file"


def test_error_bars_are_the_intervals(full_sweep: SweepFolder) -> None:
    from isaerft_sweep.results.report.figures import cost
    from isaerft_sweep.results.report.pictures import _error_bars

    sweep = read_sweep_folder(full_sweep.path)
    entries = [entry for entry in sweep.entries if entry.interval]
    values = [entry.value(sweep.metric.name) or 0.0 for entry in entries]
    below, above = _error_bars(entries, values)
    for entry, value, low, high in zip(entries, values, below, above, strict=True):
        assert (value - low, value + high) == pytest.approx(entry.interval)
    drawn = next(trace for trace in cost(gather(sweep)).data if trace.mode == "markers")
    assert len(drawn.error_y.array) == len(drawn.y)
