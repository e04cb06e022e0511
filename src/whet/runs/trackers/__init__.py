"""A run followed by MLflow, Weights & Biases or TensorBoard: the lines of metrics.jsonl, sent on by a thread.

    with following(Tracking(mlflow="sqlite"), run.folder) as trackers:    # refuses what can't work, before training
        trackers.log(line)                                              # training never waits

A tracker that fails once training runs is named in the log and left alone from then on. Training goes on, and its
metrics.jsonl has every line: `send` follows a run afterwards.

Metrics are called as transformers' own callbacks call them (train/loss, train/grad_norm), so dashboards made for these
fit. The callbacks themselves are not used: docs/tracking.md says why.
"""

from whet.runs.trackers.follow import Trackers, following, open_trackers, send
from whet.runs.trackers.lines import Tracking
from whet.runs.trackers.start import digests_of, start_of

__all__ = ["Trackers", "Tracking", "digests_of", "following", "open_trackers", "send", "start_of"]
