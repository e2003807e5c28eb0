"""What the real ``wandb`` client writes to the server and reads from it again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import Serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Told = Callable[..., Any]
START = """
import json, math, sys, wandb
def init(sweep=None, **more):
    settings = wandb.Settings(silent=True, x_disable_stats=True, console="off", sweep_id=sweep)
    return wandb.init(project="p", settings=settings, **more)
def tell(**found):
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all tests here: each uses runs of its own."""
    made = Serving(tmp_path_factory.mktemp("served"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def told(server: Serving, tmp_path: Path) -> Told:
    """Run a program that uses wandb; what it tells."""

    def run(program: str, *arguments: str) -> Any:
        done = server.run(sys.executable, "-c", START + program, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


# -- metrics

SWEPT = """
best = {}
for i, values in enumerate(([1.0, 3.0, 2.0], [9.0, 4.0, 5.0], [6.0, 8.0, 2.5])):
    run = init(sys.argv[1].rpartition("/")[2], id=f"{sys.argv[2]}{i}", reinit="finish_previous")
    if sys.argv[2].startswith("max"):
        run.define_metric("acc", summary="max")
        run.define_metric("all", summary="min,max,mean,last")
    for value in values:
        run.log({"acc": value, "all": value, "val": {"acc": value, "deep": {"x.y": value}}, "train.loss": value, "not": math.nan})
    run.finish()
sweep = wandb.Api().sweep(sys.argv[1])
run = wandb.Api().run(f"p/{sys.argv[2]}1")
def rows(keys):
    return [list(run.history(keys=keys, pandas=False)), list(run.scan_history(keys=keys))]
tell(best=sweep.best_run().id, best_loss=sweep._attrs.get("bestLoss"), summary=run.summary._json_dict,
     order=[r.id for r in wandb.Api().runs("p", order="-summary_metrics." + sys.argv[3], filters={"sweep": sweep.id})],
     above=[r.id for r in wandb.Api().runs("p", filters={"sweep": sweep.id, "summary_metrics." + sys.argv[3]: {"$gte": 5}})],
     rows={key: rows([key]) for key in ("acc", "val.acc", "val.deep.x.y", "train.loss", "not")}, two=rows(["val.acc", "acc"]),
     keys=sorted(wandb.Api().run(f"p/{sys.argv[2]}1").history_keys["keys"]), last=run.lastHistoryStep)
"""


@pytest.mark.parametrize(
    ("name", "metric", "at_least_5"),
    [
        ("plain", "acc", [1]),
        ("nested", "val.acc", [1]),
        ("deep", "val.deep.x.y", [1]),
        ("max", "acc", [1, 2]),
        ("max", "all", [1]),  # a filter has no goal: the last value counts
    ],
)
def test_metrics_with_dots_and_aggregates(
    server: Serving, told: Told, tmp_path: Path, name: str, metric: str, at_least_5: list[int]
) -> None:
    (tmp_path / "s.yaml").write_text(
        f"method: random\nmetric: {{name: {metric}, goal: maximize}}\nprogram: p.py\nparameters: {{lr: {{min: 0.0, max: 1.0}}}}\n"
    )
    path, prefix = server.sweep(tmp_path / "s.yaml", "p"), f"{name}-{metric}-"
    found = told(SWEPT, path, prefix, metric)
    assert found["best"] == f"{prefix}1", found["summary"]  # the last values are 2, 5, 2.5; the largest ones 3, 9, 8
    assert found["order"] == [f"{prefix}{i}" for i in (1, 2, 0)]
    assert found["above"] == [f"{prefix}{i}" for i in at_least_5]
    if name == "max":
        assert found["summary"]["acc"] == {"max": 9} and found["summary"]["all"] == {
            "min": 4,
            "max": 9,
            "mean": 6,
            "last": 5,
        }
    for key in ("acc", "val.acc", "val.deep.x.y", "train.loss"):
        wanted = [{"_step": i, key: value} for i, value in enumerate((9, 4, 5))]
        assert found["rows"][key] == [wanted, wanted], key
    assert found["rows"]["not"] == [[{"_step": i, "not": "NaN"} for i in range(3)]] * 2, "as W&B writes it"
    assert found["two"][1] == [{"_step": i, "acc": value, "val.acc": value} for i, value in enumerate((9, 4, 5))]
    assert {"acc", "val.acc", "val.deep.x.y", "train.loss", "not"} <= set(found["keys"]) and found["last"] == 2


AGENT = """
def trial():
    run = wandb.init(settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"))
    run.define_metric("best.acc", summary="max")
    for step in range(4):
        run.log({"val": {"acc": run.config.lr * (3 - step)}, "best": {"acc": run.config.lr * (3 - step)}})
    run.finish()
wandb.agent(sys.argv[1], function=trial, count=3)
sweep = wandb.Api().sweep(sys.argv[1])
tell(runs={run.id: run.config["lr"] for run in sweep.runs}, best=sweep.best_run().config["lr"])
"""


@pytest.mark.parametrize(("metric", "factor"), [("val.acc", 0), ("best.acc", 3)])
def test_an_agent_s_runs_teach_the_sampler(server: Serving, told: Told, tmp_path: Path, metric: str, factor: int) -> None:
    (tmp_path / "s.yaml").write_text(
        f"method: bayes\nmetric: {{name: {metric}, goal: maximize}}\nrun_cap: 3\nprogram: p.py\nparameters: {{lr: {{min: 1.0, max: 2.0}}}}\n"
    )
    path = server.sweep(tmp_path / "s.yaml", "p")
    found = told(AGENT, path)
    given = {e["run_id"]: e["params"]["lr"] for e in server.journal(path) if e["event"] == "trial"}
    assert found["runs"] == given and len(given) == 3
    ends = [e["metric"] for e in server.journal(path) if e["event"] == "end"]
    assert ends == pytest.approx([factor * lr for lr in given.values()]), "of the one the last value, of the other the best"
    if factor:
        assert found["best"] == max(given.values())


LONG = """
run = init(id="long")
for step in range(3000):
    run.log({"loss": step, **({"rare": step} if step % 10 == 0 else {})}, step=2 * step)
run.finish()
run = wandb.Api().run("p/long")
def steps(**asked):
    return [row["_step"] for row in run.scan_history(**asked)]
tell(all=steps(), loss=steps(keys=["loss"]), rare=steps(keys=["rare", "loss"]), part=steps(keys=["loss"], min_step=500, max_step=600),
     small=steps(keys=["loss"], page_size=37), count=len(run.history(keys=["loss"], samples=100, pandas=False)))
"""


def test_a_long_history_by_keys_holds_every_row_once(told: Told) -> None:
    found = told(LONG)
    assert found["all"] == found["loss"] == found["small"] == list(range(0, 6000, 2))
    assert found["rare"] == list(range(0, 6000, 20)) and found["part"] == list(range(500, 600, 2)) and found["count"] == 100


# -- artifacts

ARTIFACTS = """
from pathlib import Path
Path("m.bin").write_bytes(b"one"); Path("deep").mkdir(); Path("deep/x%20 y#?.txt").write_text("two")
run = init(id="maker")
first = wandb.Artifact("model", type="model", description="the first", metadata={"beta": 0.1})
for i in range(150):
    with first.new_file(f"many/{i}.txt") as file: file.write(str(i))
first.add_file("m.bin"); first.add_file("deep/x%20 y#?.txt", name="deep/x%20 y#?.txt")
first = run.log_artifact(first, aliases=["best", "latest"]).wait()
Path("m.bin").write_bytes(b"two!")
second = wandb.Artifact("model", type="model")
second.add_file("m.bin")
second = run.log_artifact(second).wait()
run.finish()

run = init(id="user", reinit="finish_previous")
used = run.use_artifact("model:best")
folder = Path(used.download(root="used"))
files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
many = [files.pop(f"many/{i}.txt") for i in range(150)]
again = wandb.Artifact("model", type="model")
again.add_file("m.bin")
again = run.log_artifact(again, aliases=["same"]).wait()
draft = used.new_draft()
draft.add_file("m.bin", name="more.bin")
third = run.log_artifact(draft).wait()
run.finish()

api = wandb.Api()
def named(name):
    found = api.artifact("p/" + name)
    return [found.version, sorted(found.aliases), found.state]
changed = api.artifact("p/model:v0")
changed.aliases.append("kept"); changed.aliases.remove("best"); changed.metadata["more"] = 1; changed.description = "new"
changed.save()
changed = api.artifact("p/model:kept")
try:
    api.artifact("p/model:nothing")
except Exception as error:
    missing = str(error)
tell(many=many, count=used.file_count, listing=len([f.name for f in used.files()]), first=first.version, second=second.version, files=files, metadata=used.metadata, description=used.description,
     again=[again.version, sorted(again.aliases)], third=third.version, size=used.size,
     names={name: named(name) for name in ("model", "model:latest", "model:v0", "model:v1", "model:v2", "model:same")},
     listed=[a.name for a in api.artifacts("model", "p/model")], types=[t.name for t in api.artifact_types("p")],
     collections=[c.name for c in api.artifact_type("model", "p").collections()], exists=[api.artifact_exists(f"p/model:v{i}") for i in (0, 9)],
     entry=Path(api.artifact("p/model:v0").get_entry("m.bin").download(root="one")).read_text(),
     whole=sorted(p.name for p in Path(api.artifact("p/model:v2").download(root="three")).rglob("*") if p.is_file() and p.parent.name != "many"),
     logged=[a.name for a in api.run("p/maker").logged_artifacts()], used=[a.name for a in api.run("p/user").used_artifacts()],
     by=[used.logged_by().id, [r.id for r in used.used_by()]], changed=[sorted(changed.aliases), changed.metadata, changed.description], missing=missing)
"""


def test_artifacts_are_logged_used_read_and_renamed(server: Serving, told: Told, tmp_path: Path) -> None:
    found = told(ARTIFACTS)
    assert (found["first"], found["second"], found["third"]) == ("v0", "v1", "v2")
    assert found["files"] == {"m.bin": "one", "deep/x%20 y#?.txt": "two"} and found["size"] == 6 + len(
        "".join(found["many"])
    )
    assert found["many"] == [str(i) for i in range(150)] and found["count"] == found["listing"] == 152
    assert found["metadata"] == {"beta": 0.1} and found["description"] == "the first"
    assert found["again"] == ["v1", ["latest", "same"]], "the same content is the same version"
    assert found["names"] == {
        "model": ["v2", ["latest"], "COMMITTED"],
        "model:latest": ["v2", ["latest"], "COMMITTED"],
        "model:v0": ["v0", ["kept"], "COMMITTED"],  # asked for when it had been changed
        "model:v1": ["v1", ["same"], "COMMITTED"],
        "model:v2": ["v2", ["latest"], "COMMITTED"],
        "model:same": ["v1", ["same"], "COMMITTED"],
    }
    assert found["listed"] == ["model:v2", "model:v1", "model:v0"] and found["exists"] == [True, False]
    assert found["types"] == ["model"] and found["collections"] == ["model"]
    assert found["entry"] == "one" and found["whole"] == ["m.bin", "more.bin", "x%20 y#?.txt"], (
        "also what an older version has"
    )
    assert found["logged"] == ["model:v0", "model:v1"] and found["used"] == ["model:v0"]
    assert found["by"] == ["maker", ["user"]] and "not found" in found["missing"]
    assert found["changed"] == [["kept"], {"beta": 0.1, "more": 1}, "new"]
    server.kill()
    server.start()
    done = server.run("wandb", "artifact", "get", "p/model:kept", "--root", "got", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "got" / "m.bin").read_text() == "one", done.stdout + done.stderr
    (tmp_path / "data.txt").write_text("rows")
    done = server.run("wandb", "artifact", "put", "-n", "p/rows", "-t", "dataset", "data.txt", cwd=tmp_path)
    assert done.returncode == 0 and "rows:v0" in done.stdout + done.stderr, done.stdout + done.stderr
    done = server.run("wandb", "artifact", "ls", "p", cwd=tmp_path)
    assert "rows:v0" in done.stdout + done.stderr and "model:v2" in done.stdout + done.stderr


# -- runs and files

TWICE = """
for i in range(2):
    run = init(id="twice", reinit="finish_previous", config={"i": i})
    for step in range(5 - 2 * i):
        run.log({"v": 10 * i + step})
    run.finish()
run = wandb.Api().run("p/twice")
tell(rows=[row["v"] for row in run.scan_history()], state=run.state, config=dict(run.config), summary=run.summary["v"])
"""


def test_a_second_init_with_the_same_id_overwrites_the_run(told: Told) -> None:
    assert told(TWICE) == {"rows": [10, 11, 12], "state": "finished", "config": {"i": 1}, "summary": 12}


FILES = """
from pathlib import Path
names = ["100%.txt", "a?b.txt", "a#b.txt", "%2e.txt", "sub/é &=+ c.txt", ".upload.txt"]
run = init(id="pairs.jsonl")
for name in names:
    Path(name).parent.mkdir(exist_ok=True); Path(name).write_text(name)
    run.save(name, policy="now")
run.log({"text": wandb.Html("<b>x</b>"), "table": wandb.Table(columns=["a"], data=[[1]])})
run.finish()
run = wandb.Api().run("p/pairs.jsonl")
found = {}
for file in run.files():
    if file.name in names:
        found[file.name] = Path(file.download(root="got", exist_ok=True).name).read_text()
tell(found=found, media=sorted(f.name.split("/")[1] for f in run.files() if f.name.startswith("media/")))
"""


def test_files_of_any_name_and_a_run_called_like_a_log(server: Serving, told: Told) -> None:
    found = told(FILES)
    names = ["100%.txt", "a?b.txt", "a#b.txt", "%2e.txt", "sub/é &=+ c.txt", ".upload.txt"]
    assert found == {"found": {name: name for name in names}, "media": ["html", "table"]}
    server.kill()
    server.start()  # the run's files lie in a folder that is not taken for a log


LISTED = """
from datetime import datetime, timedelta, timezone
import time
run = init(id="early", name="first try")
run.finish()
time.sleep(2)
run = init(id="late", name="second try", reinit="finish_previous")
run.finish()
api = wandb.Api()
between = api.run("p/late").created_at
def ids(**filters):
    return sorted(r.id for r in api.runs("p", filters={"$and": [filters, {"name": {"$in": ["early", "late"]}}]}, per_page=7))
def refused(**filters):
    try:
        return ids(**filters)
    except Exception as error:
        return str(error)
tell(since=ids(created_at={"$gte": between}), before=ids(createdAt={"$lt": between}), day=ids(created_at={"$gt": "2020-01-01"}),
     none=ids(created_at={"$gt": (datetime.now(timezone.utc) + timedelta(days=1)).isoformat()}), at=ids(createdAt=between),
     regex=ids(display_name={"$regex": "^(first|third) .*y$"}), any_case=ids(display_name={"$regex": "SECOND", "$options": "i"}),
     neither=ids(display_name={"$not": {"$regex": "^first"}}), time=refused(created_at={"$gt": "yesterday"}),
     pattern=refused(display_name={"$regex": "("}), slow=refused(display_name={"$regex": "^(([a-z ])+.)+[A-Z]([a-z])+$"}))
"""


def test_runs_are_found_by_time_and_by_pattern(told: Told) -> None:
    found = told(LISTED)
    assert found["since"] == found["at"] == ["late"] and found["before"] == ["early"] and found["none"] == []
    assert (
        found["day"] == ["early", "late"]
        and found["regex"] == ["early"]
        and found["any_case"] == found["neither"] == ["late"]
    )
    assert "like 2026-11-27" in found["time"] and "must be a regular expression" in found["pattern"]
    assert found["slow"] == [] or "takes too long" in found["slow"]
