"""Writes one run as a wandb offline run, from JSON on stdin. A process of its own, since wandb has one run per process."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def rewrite(content: dict[str, Any]) -> None:
    """Write the run in ``content``: ``folder`` is the target, the rest is from ``serve.run_export.served_uploads``."""
    import wandb

    os.environ.update(WANDB_RUN_ID=content["run_id"], WANDB_PROJECT=content["project"], WANDB_MODE="offline")
    if content["sweep_id"]:
        os.environ["WANDB_SWEEP_ID"] = content["sweep_id"]
    run = wandb.init(
        name=content["name"],
        group=content["group"],
        job_type=content["job_type"],
        tags=content["tags"],
        notes=content["notes"],
        config=content["config"],
        dir=content["folder"],
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True),
    )
    for row in content["rows"]:
        step = row.pop("_step")
        run.log({name: value for name, value in row.items() if name not in ("_runtime", "_wandb")}, step=step)
    run.summary.update({name: value for name, value in content["summary"].items() if not name.startswith("_")})
    for path in content["files"]:
        run.save(path, base_path=content["files_base"], policy="now")
    for artifact in content["artifacts"]:
        options = {name: artifact[name] for name in ("type", "description", "metadata")}
        copy = wandb.Artifact(artifact["name"], **options)
        for name, file in artifact["files"].items():
            copy.add_file(file, name=name, policy="immutable", skip_cache=True)
        run.log_artifact(copy, aliases=artifact["aliases"])
    run.finish(exit_code=content["exitcode"])


if __name__ == "__main__":
    rewrite(json.load(sys.stdin))
