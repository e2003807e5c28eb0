"""Metrics by dotted names, in whatever shape a client has written them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from helpers.serve_client import CREATE, Client
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep.tracking.metric_names import as_json, flat, logged_value, may_hold, number_at, value_at

KEYS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)
NESTED = st.recursive(st.integers(0, 9), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=8)


@given(st.dictionaries(KEYS, NESTED, max_size=4))
def test_every_value_is_found_by_its_dotted_name(content: dict[str, Any]) -> None:
    names = Counter(name for name, _ in flat(content))
    for name, value in flat(content):
        if names[name] == 1:
            assert value_at(content, name) == value or isinstance(value_at(content, name), dict), name
    assert value_at(content, "a.z") is None and value_at(content, "") is None


def test_the_longest_key_that_fits_goes_first() -> None:
    assert value_at({"a": {"b": 1}, "a.b": 2}, "a.b") == 2
    assert value_at({"a": {"b": {"d": 1}}, "a.b": {"c": 2}}, "a.b.d") == 1, "another is tried where that has none"
    assert value_at({"a": None}, "a", 5) is None and value_at({"a": 3}, "a.b", 5) == 5


@pytest.mark.parametrize(
    ("summary", "name", "goal", "value"),
    [
        ({"acc": 3}, "acc", "maximize", 3.0),
        ({"val": {"acc": 3}}, "val.acc", "maximize", 3.0),
        ({"val.acc": 3}, "val.acc", "maximize", 3.0),
        ({"acc": {"max": 3}}, "acc", "maximize", 3.0),
        ({"acc": {"max": 3}}, "acc", "minimize", 3.0),  # the only one that the program has asked for
        ({"acc": {"max": 3}}, "acc.max", "maximize", 3.0),
        ({"m": {"min": 1, "max": 3, "mean": 2, "last": 2.5}}, "m", "maximize", 3.0),
        ({"m": {"min": 1, "max": 3, "mean": 2, "last": 2.5}}, "m", "minimize", 1.0),
        ({"m": {"min": 1, "max": 3, "mean": 2, "last": 2.5}}, "m", None, 2.5),
        ({"m": {"best": 7, "max": 3}}, "m", "minimize", 7.0),
        ({"d": {"q": {"min": 1}}}, "d.q", "minimize", 1.0),
        ({"h": {"_type": "histogram", "max": 3}}, "h", "maximize", None),
        ({"val": {"max": 1, "acc": 2}}, "val", "maximize", None),
        ({"acc": "NaN"}, "acc", None, None),
        ({"acc": float("inf")}, "acc", None, None),
        ({"acc": True}, "acc", None, None),
        ({}, "acc", None, None),
    ],
)
def test_the_number_that_a_summary_holds(summary: Any, name: str, goal: str | None, value: float | None) -> None:
    assert number_at(summary, name, goal) == value


ROW_NAMES = KEYS | st.sampled_from(["a.max", "a.b.mean", "loss<1", 'a"b', "é", "a/b.c", "max"])


@given(st.dictionaries(KEYS | ROW_NAMES, NESTED, max_size=3), ROW_NAMES, st.booleans())
def test_no_row_that_holds_a_metric_is_passed_over(row: dict[str, Any], name: str, ascii_only: bool) -> None:
    text = json.dumps(row, ensure_ascii=ascii_only)
    for written in (text, text.replace("<", "\\u003c")):  # as Go writes it
        assert may_hold(written, name) or logged_value(row, name) is None


def test_a_row_of_the_history() -> None:
    assert logged_value({"val": {"acc": 2}}, "val.acc") == 2 and logged_value({"acc": 2}, "acc.max") == 2
    assert logged_value({"acc": {"x": 2}}, "acc") is None and logged_value({"acc": 2}, "acc.x") is None
    assert as_json({"a": [float("nan"), float("-inf")], "b": 1e999}) == {"a": ["NaN", "-Infinity"], "b": "Infinity"}


# -- on the server

SHAPES = {
    "nested": ("val.acc", lambda v: {"val": {"acc": v}}, lambda v, best: {"val": {"acc": v}}),
    "dotted": ("val.acc", lambda v: {"val.acc": v}, lambda v, best: {"val.acc": v}),
    "both": ("val.top.1", lambda v: {"val": {"top.1": v}}, lambda v, best: {"val": {"top.1": v}}),
    "aggregated": ("acc", lambda v: {"acc": v}, lambda v, best: {"acc": {"max": best}}),
    "aggregated, nested": ("val.acc", lambda v: {"val": {"acc": v}}, lambda v, best: {"val": {"acc": {"max": best}}}),
    "the aggregate itself": ("acc.max", lambda v: {"acc": v}, lambda v, best: {"acc": {"max": best, "last": v}}),
}  # fmt: skip


def sweep_for(client: Client, metric: str, more: str = "", method: str = "bayes") -> Any:
    config = f"{{method: {method}, metric: {{name: {metric}, goal: maximize}}, {more} run_cap: 4, parameters: {{lr: {{min: 0.0, max: 1.0}}}}}}"
    return client.get(CREATE, c=config, p="p")["upsertSweep"]["sweep"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sweep_reads_its_metric_in_every_shape(client: Client, shape: str) -> None:
    metric, row, summary = SHAPES[shape]
    sweep = sweep_for(client, metric)
    agent, names = client.agent(sweep), []
    for values in ((1.0, 2.0, 1.5), (4.0, 6.0, 5.0), (3.0, 3.5, 3.2)):
        name = client.beat(agent)[0]["run_id"]
        names.append(name)
        client.begin(name, sweep)
        rows = [{"_step": step, **row(value)} for step, value in enumerate(values, 1)]
        client.stream(name, rows, summary=summary(values[-1], max(values)), complete=True, exitcode=0)
    served = client.server.sweeps[sweep["name"]]
    best = "aggregate" in shape
    wanted = [2.0, 6.0, 3.5] if best else [1.5, 5.0, 3.2]
    assert [served.record_of(name).metric for name in names] == wanted  # type: ignore[union-attr]
    assert [value for _, value in served.sampler._model.observed] == wanted  # type: ignore[union-attr]
    assert client.server.runs[next(k for k in client.server.runs if k.name == names[1])].curve == [4.0, 6.0, 5.0]
    runs = 'query Runs($o: String, $f: JSONString) { project(name: "p") { runs(order: $o, filters: $f) { edges { node { name } } } sweep(sweepName: "S") { bestLoss } } }'.replace(
        'S"', sweep["name"] + '"'
    )

    def found(**asked: str) -> list[str]:
        return [edge["node"]["name"] for edge in client.get(runs, **asked)["project"]["runs"]["edges"]]

    assert found(o=f"-summary_metrics.{metric}") == [names[i] for i in (1, 2, 0)]
    assert found(o=f"+summaryMetrics.{metric}") == [names[i] for i in (0, 2, 1)]
    assert found(f=json.dumps({f"summary_metrics.{metric}": {"$gt": wanted[2] - 0.1}})) == names[1:]
    assert client.get(runs)["project"]["sweep"]["bestLoss"] == max(wanted)
    sampled = (
        'query H($s: [JSONString!]!) { project(name: "p") { run(name: "RUN") { sampledHistory(specs: $s) historyKeys } } }'
    )
    base = metric.removesuffix(".max")
    run = client.get(sampled.replace("RUN", names[0]), s=[json.dumps({"keys": ["_step", base]})])["project"]["run"]
    assert run["sampledHistory"] == [[{"_step": i, base: v} for i, v in enumerate((1.0, 2.0, 1.5), 1)]]
    assert run["historyKeys"] == {
        "lastStep": 3,
        "keys": {
            "_step": {"typeCounts": [{"type": "number", "count": 3}]},
            base: {"typeCounts": [{"type": "number", "count": 3}]},
        },
        "sets": [],
    }
    page = client.http.get(f"/local/p/sweeps/{sweep['name']}", headers=client.headers).text
    assert all(f'<td class="number">{value:.4g}</td>' in page for value in wanted), "and the page shows it"
    chart = client.http.get(f"/local/p/runs/{names[0]}", headers=client.headers).text
    assert f"<figcaption>{base}</figcaption>" in chart


def test_early_stopping_sees_a_nested_metric(client: Client) -> None:
    sweep = sweep_for(client, "val.acc", "early_terminate: {type: hyperband, min_iter: 1, eta: 2},", "random")
    agent, stopped = client.agent(sweep), []
    for value in (3.0, 1.0):
        name = client.beat(agent)[0]["run_id"]
        client.begin(name, sweep)
        answer = client.stream(name, [{"_step": 1, "val": {"acc": value}}])
        stopped.append(bool(answer.json().get("stopped")))
        client.stream(name, [], summary={"val": {"acc": value}}, complete=True, exitcode=0)
    assert stopped == [False, True]


@pytest.mark.parametrize("client_s", ["0.31", "0.24"])
@pytest.mark.parametrize("steps", [range(3000), range(0, 6000, 2), range(10, 2500)])
def test_pages_of_a_history_by_keys_hold_every_row_once(client: Client, steps: range, client_s: str) -> None:
    """As wandb's clients page: up to 0.27 they name the next page's first step, later ones their own last one."""
    client.begin("r1")
    client.stream(
        "r1",
        [
            {"_step": step, "loss": float(step), "rare": 1} if step % 7 else {"_step": step, "loss": float(step)}
            for step in steps
        ],
    )
    query = 'query H($s: JSONString!) { project(name: "p") { run(name: "r1") { sampledHistory(specs: [$s]) } } }'
    for keys in (["loss"], ["loss", "rare"]):
        found: list[int] = []
        end = steps[-1] + 1
        for low in range(0, end, 1000):
            high = min(low + 1000, end)
            spec = {"keys": [*keys, "_step"], "minStep": low, "samples": high - low, "maxStep": high - (client_s == "0.31")}
            found += [row["_step"] for row in client.get(query, s=json.dumps(spec))["project"]["run"]["sampledHistory"][0]]
        assert found == [step for step in steps if step % 7 or "rare" not in keys]
    for bad in ("[", "3", '{"keys": 3}', '{"minStep": -1}', '{"maxStep": "x"}', '{"samples": true}', '{"keys": [{}]}'):
        assert "must be" in client.ask(query, s=bad)["errors"][0]["message"], bad
