"""MLflow, through its client: nothing of it that is global to the process is set, and its telemetry is off."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from whet.runs.trackers.lines import End, Point, Start

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of seven, each waits longer: minutes of a dead server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow.entities import Metric, Param
from mlflow.telemetry import set_telemetry_client
from mlflow.tracking import MlflowClient

# The variable counts from now on: TRL imports MLflow too, and may have been first.
set_telemetry_client()  # type: ignore[no-untyped-call]
for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)  # a line for each table that a new database gets

TAG = "whet.run"
STATES: Mapping[End, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
METRICS, PARAMS, PARAM_LENGTH = 1000, 100, 6000
"""What the server takes in one request: metrics, parameters, characters of a parameter."""


class MLflow:
    """One MLflow run a run of whet, found again by its tag when the run goes on."""

    name = "mlflow"

    def __init__(self, start: Start, address: str, project: str):
        database = (start.root / "mlflow.db").absolute()
        self._client = MlflowClient(tracking_uri=f"sqlite:///{database}" if address == "sqlite" else address)
        place = (start.root / "mlflow-artifacts").absolute().as_uri() if address == "sqlite" else None
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project, artifact_location=place)
        self._run = self._found(experiment, start.run) or self._created(experiment, start)

    def _found(self, experiment: str, run: str) -> str | None:
        runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run}'", max_results=1)
        if not runs:
            return None
        self._client.update_run(runs[0].info.run_id, status="RUNNING")
        return str(runs[0].info.run_id)

    def _created(self, experiment: str, start: Start) -> str:
        created = self._client.create_run(experiment, tags={**start.tags, TAG: start.run}, run_name=start.run)
        identity = str(created.info.run_id)
        params = [Param(_allowed(key), value[:PARAM_LENGTH]) for key, value in start.params.items()]
        for some in _batches(params, PARAMS):
            self._client.log_batch(identity, params=some)
        return identity

    def write(self, points: Sequence[Point]) -> None:
        metrics = [
            Metric(_allowed(name), value, round(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for some in _batches(metrics, METRICS):
            self._client.log_batch(self._run, metrics=some)

    def close(self, end: End, digests: Mapping[str, str]) -> None:
        if digests:
            self._client.log_dict(self._run, dict(digests), "digests.json")
        self._client.set_terminated(self._run, STATES[end])


def _allowed(name: str) -> str:
    """A name in the letters that MLflow allows, and that is no path out of its folder."""
    return re.sub(r"[^\w\-. :/]|(?<![^/])\.+(?=/|$)|^/|(?<=/)/|/$", "_", name, flags=re.ASCII)


def _batches(items: Sequence[Any], size: int) -> list[list[Any]]:
    rest = iter(items)
    return [some for _ in range(-(-len(items) // size)) if (some := list(islice(rest, size)))]
