"""What the real ``wandb`` client writes to the server and reads from it again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Serving

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
