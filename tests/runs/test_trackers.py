"""Trackers hold what metrics.jsonl holds, read back with their own clients, and can neither slow nor end a training."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs.folders import write_run
from tests.runs.wandb_log import read
from whet.errors import WhetError
from whet.runs.report.record import read_run
from whet.runs.trackers import Trackers, Tracking, digests_of, following, open_trackers, send, start_of
from whet.runs.trackers import follow as follow_module
from whet.runs.trackers.lines import Point, points_of

STEPS = 8
DIGEST = "c4" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs", "desk-5be1c0d8a9", steps=STEPS, stages=("data", "trained", "eval"))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables: it takes seconds to make them."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


def follow(folder: Path, tracking: Tracking, lines: Sequence[Mapping[str, Any]] | None = None) -> None:
    """As training does it: opened, a line at a time, closed."""
    trackers = open_trackers(tracking, start_of(folder))
    for line in read_run(folder).metrics if lines is None else lines:
        trackers.log(line)
    trackers.close("done", digests_of(folder))


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_run(folder).steps}


# ---------------------------------------------------------------- read back


def test_tensorboard_holds_the_run(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(folder, Tracking(tensorboard=True))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == pytest.approx(losses(folder), rel=1e-6)
    assert events.Scalars("train/loss")[0].wall_time == pytest.approx(read_run(folder).steps[0]["time"])
    assert events.Scalars("eval/exact match/tuned")[0].step == STEPS
    assert DIGEST in str(events.Tensors("digests/text_summary"))


def test_tensorboard_shows_a_step_once_when_training_goes_on_from_before_it(folder: Path) -> None:
    """Catches a curve that runs back and forth after a crash."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = read_run(folder).steps
    follow(folder, Tracking(tensorboard=True), steps)
    follow(folder, Tracking(tensorboard=True), [{**line, "loss": 0.5} for line in steps if line["step"] > 5])
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert len(events.Scalars("train/loss")) == STEPS
    assert shown == pytest.approx({step: loss if step <= 5 else 0.5 for step, loss in losses(folder).items()}, rel=1e-6)


def test_mlflow_holds_the_run_and_holds_it_once(folder: Path, empty_database: Path) -> None:
    """Catches a run that goes on under a second name, and lines that are doubled when a run is sent again."""
    from mlflow.tracking import MlflowClient

    shutil.copy(empty_database, folder.parent)

    tracking = Tracking(mlflow="sqlite", project="desk")
    follow(folder, tracking)
    record = read_run(folder)
    send(tracking, start_of(folder), record.metrics, "done", digests_of(folder))

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("desk")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (folder.name, "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == losses(folder)
    assert len(history) == STEPS
    assert history[0].timestamp == round(record.steps[0]["time"] * 1000)
    assert run.data.metrics["eval/exact match/tuned"] == 0.61
    assert run.data.params["train.learning_rate"] == "0.0001"
    assert run.data.params["data.sources.0.path"] == "tickets/*.jsonl"
    assert run.data.tags["input.data"].startswith("5be1c0d8a94f")
    assert run.data.tags["version.torch"] == record.facts["versions"]["torch"]
    assert {tag.partition(".")[0] for tag in run.data.tags} == {"input", "version", "git", "whet", "mlflow"}
    assert [tag for tag in run.data.tags if tag.startswith("mlflow")] == ["mlflow.runName"]
    place = client.download_artifacts(run.info.run_id, "digests.json")
    assert json.loads(Path(place).read_text()) == {"trained/adapter_model.safetensors": DIGEST}
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, "mlflow-artifacts", "mlflow.db"]


def test_mlflow_is_told_how_a_run_ended(folder: Path, empty_database: Path) -> None:
    """Catches a crash that shows as a run still going, and a run going on that shows as over."""
    from mlflow.tracking import MlflowClient

    shutil.copy(empty_database, folder.parent)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    seen = []
    for end in ("stopped", "failed", "done"):
        trackers = open_trackers(Tracking(mlflow="sqlite"), start_of(folder))
        experiment = client.get_experiment_by_name("whet")
        assert experiment is not None
        (running,) = client.search_runs([experiment.experiment_id])
        trackers.close(end)  # type: ignore[arg-type]
        seen.append((running.info.status, client.get_run(running.info.run_id).info.status))
    assert seen == [("RUNNING", "KILLED"), ("RUNNING", "FAILED"), ("RUNNING", "FINISHED")]


def test_wandb_offline_holds_the_run_and_nothing_of_the_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches code, packages, git state or the host's name that W&B takes along by itself."""
    monkeypatch.setenv("WANDB_MODE", "online")  # the recipe decides
    follow(folder, Tracking(wandb="offline", project="desk"))
    (offline,) = (folder.parent / "wandb").glob("offline-run-*")
    records = read(offline)
    deadline = time.monotonic() + 60  # W&B's own process writes the file, and may be at it yet
    while "exit" not in records and time.monotonic() < deadline:
        time.sleep(0.05)
        records = read(offline)
    (run,) = records["run"]
    assert (run["id"], run["project"]) == (folder.name, "desk")
    assert run["host"] == ""
    assert run["train.learning_rate"] == "0.0001"
    assert run["tags.version.torch"] == read_run(folder).facts["versions"]["torch"]
    history = [line for line in records["history"] if "train/loss" in line]
    assert {line["train/global_step"]: line["train/loss"] for line in history} == losses(folder)
    summary = {key: value for update in records["summary"] for key, value in update.items()}
    assert DIGEST in json.dumps(summary)
    assert records["exit"] == [{"code": 0}]
    (stored,) = offline.glob("*.wandb")
    for name in (socket.gethostname(), getpass.getuser(), str(Path.cwd())):
        assert name.encode() not in stored.read_bytes() or len(name) < 4  # a short name may be a part of a word
    assert not list(offline.rglob("requirements.txt"))
    assert not list(offline.rglob("wandb-metadata.json"))
    assert not list(offline.rglob("*.py"))


def test_telemetry_is_off_though_others_imported_the_libraries_first() -> None:
    """Catches what MLflow and W&B tell their makers: TRL imports both, before whet can set a variable."""
    code = """
import mlflow, wandb
from mlflow.telemetry import get_telemetry_client
before = get_telemetry_client()
from wandb.analytics.opentelemetry.opentelemetry_proxy import OpenTelemetryProxy
from wandb.env import error_reporting_enabled
import whet.runs.trackers.mlflow, whet.runs.trackers.wandb
online = OpenTelemetryProxy.from_settings(wandb.Settings(mode="online"))
print([before is None, get_telemetry_client() is None, error_reporting_enabled(), online])
"""
    # Without the variables by which MLflow knows that it is tested.
    kept = {
        key: value for key, value in os.environ.items() if key in ("PATH", "PYTHONPATH", "HOME", "WHET_CONNECTIONS")
    }
    told = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[False, True, False, None]"


# ---------------------------------------------------------------- what can't be used is refused before training


@pytest.mark.parametrize(("extra", "tracking"), [
    ("mlflow", Tracking(mlflow="sqlite")),
    ("wandb", Tracking(wandb="offline")),
    ("tensorboard", Tracking(tensorboard=True)),
])  # fmt: skip
def test_a_tracker_that_is_not_installed_is_refused(
    extra: str, tracking: Tracking, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"whet.runs.trackers.{extra}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == extra]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, extra, None)  # type: ignore[arg-type]
    with pytest.raises(WhetError, match=f"{extra} is not installed") as refused:
        open_trackers(tracking, start_of(folder))
    assert refused.value.fix == f'pip install "whet[{extra}]"'


def test_a_server_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training that begins, and only then finds nobody follows."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(WhetError, match="mlflow can't be used") as refused:
        open_trackers(Tracking(mlflow="http://127.0.0.1:9"), start_of(folder))
    assert refused.value.where == "track.mlflow"
    assert "\n" not in refused.value.what


def test_wandb_online_without_a_key_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(WhetError, match="wandb can't be used"):
        open_trackers(Tracking(wandb="online"), start_of(folder))


# ---------------------------------------------------------------- training comes first


class Recorder:
    """A tracker that keeps what it gets. It waits for `let` first, and fails from write number `fails_at` on."""

    def __init__(self, name: str = "recorder", fails_at: int | None = None):
        self.name, self.fails_at = name, fails_at
        self.points: list[Point] = []
        self.writes = 0
        self.ended: list[str] = []
        self.let = threading.Event()
        self.let.set()

    def write(self, points: Sequence[Point]) -> None:
        self.let.wait()
        self.writes += 1
        if self.fails_at is not None and self.writes >= self.fails_at:
            raise ConnectionError(f"{self.name} is gone\nand more")
        self.points += points

    def close(self, end: str, digests: Mapping[str, str]) -> None:
        self.ended.append(end)


def line(step: int) -> dict[str, Any]:
    return {"time": 1.0, "stage": "train", "step": step, "loss": 1.0}


def test_training_does_not_wait_for_a_tracker() -> None:
    """Catches a step that takes as long as a server's answer."""
    slow = Recorder()
    slow.let.clear()
    trackers = Trackers([slow], pause=0.01)
    for step in range(1000):
        trackers.log(line(step))
    assert slow.points == []  # all were taken, though the tracker has not answered once
    slow.let.set()
    trackers.close("done")
    assert [point.step for point in slow.points] == list(range(1000))
    assert slow.ended == ["done"]


def test_a_tracker_that_fails_is_left_alone_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a training that ends because a server is down, and one warning a step."""
    broken, good = Recorder("broken", fails_at=1), Recorder("good")
    with caplog.at_level(logging.WARNING, "whet"):
        trackers = Trackers([broken, good], pause=0.01)
        for step in range(20):
            trackers.log(line(step))
        trackers.close("done")
    assert broken.writes == 1
    assert broken.ended == []
    assert [point.step for point in good.points] == list(range(20))
    (told,) = caplog.messages
    assert told.startswith("broken failed and gets no more of this run: broken is gone;")


def test_close_twice_and_log_after_it_do_nothing() -> None:
    """Catches a second end of a run: the first call is in a `finally` that follows another."""
    recorder = Recorder()
    trackers = Trackers([recorder], pause=0.01)
    trackers.log(line(1))
    trackers.close("stopped")
    trackers.log(line(2))
    trackers.close("done")
    assert [point.step for point in recorder.points] == [1]
    assert recorder.ended == ["stopped"]


@pytest.mark.parametrize(("raised", "end"), [(None, "done"), (KeyboardInterrupt, "stopped"), (MemoryError, "failed")])
def test_how_a_run_ended_is_told_however_it_ends(
    folder: Path, raised: type[BaseException] | None, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that was stopped, or crashed, and shows as done."""
    recorder = Recorder()
    monkeypatch.setattr(follow_module, "_open_all", lambda *args: [recorder])
    with contextlib.suppress(KeyboardInterrupt, MemoryError), following(Tracking(), folder, pause=0.01) as trackers:
        trackers.log(line(1))
        if raised is not None:
            raise raised
    assert recorder.ended == [end]
    assert len(recorder.points) == 1


def test_without_trackers_there_is_no_thread() -> None:
    before = threading.active_count()
    trackers = Trackers([])
    trackers.log(line(1))
    assert threading.active_count() == before
    trackers.close("done")


# ---------------------------------------------------------------- lines and names


def test_names_are_those_of_transformers_callbacks_and_texts_stay_here() -> None:
    """Catches dashboards that find no curve, and an answer's text that leaves the machine."""
    lines = [
        {"time": 2.0, "stage": "train", "step": 3, "loss": 1.5, "grad_norm": 0.2, "tokens": 10.0, "memory": 7},
        {"time": 3.0, "stage": "eval", "task": "triage", "mean": 0.5, "low": 0.4, "high": 0.6, "worst": "SECRET"},
        {"time": 4.0, "stage": "eval", "base": {"loss": 2.0}, "tuned": {"loss": 1.0, "note": "SECRET"}},
        {"time": 5.0, "stage": "watch", "step": 4, "what": "SECRET", "underflow": 0.01, "on": True},
        {"time": 6.0, "stage": "watch", "what": "SECRET"},
    ]
    points = points_of(lines, 0)
    assert [(point.step, dict(point.values)) for point in points] == [
        (3, {"train/loss": 1.5, "train/grad_norm": 0.2, "train/tokens_per_step": 10.0, "train/memory_bytes": 7.0}),
        (3, {"eval/triage/tuned": 0.5, "eval/triage/tuned/low": 0.4, "eval/triage/tuned/high": 0.6}),
        (3, {"eval/loss/base": 2.0, "eval/loss/tuned": 1.0}),
        (4, {"watch/underflow": 0.01}),
    ]


def test_a_line_without_a_step_belongs_to_the_last_one_of_an_earlier_process() -> None:
    """Catches the evaluation of a run that went on, shown at step 0."""
    recorder = Recorder()
    trackers = Trackers([recorder], step=400, pause=0.01)
    trackers.log({"time": 1.0, "stage": "eval", "tuned": {"loss": 1.0}})
    trackers.close("done")
    assert [point.step for point in recorder.points] == [400]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["time", "stage", "step", "task", "mean", "model", "low", "loss"]) | st.text(max_size=5)


@given(st.lists(st.dictionaries(KEYS, JSON | st.sampled_from(["train", "eval", "watch"]), max_size=6), max_size=4))
def test_no_line_can_break_the_thread(lines: list[dict[str, Any]]) -> None:
    """Catches a line of another version that would end all following: what is no number is left out."""
    for found in points_of(lines, 0):
        assert all(isinstance(value, float) for value in found.values.values())


@given(st.text(min_size=1, max_size=30))
def test_mlflow_takes_every_name(name: str) -> None:
    """Catches a task's name that MLflow refuses, with the whole batch of its metrics."""
    from mlflow.utils.validation import _validate_metric_name

    from whet.runs.trackers.mlflow import _allowed

    _validate_metric_name(_allowed(f"eval/{name}/tuned"))
