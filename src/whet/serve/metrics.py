"""Counters for Prometheus, in a registry of this server's own. Labels hold names of this server only.

whet_requests_total{path, status}                whet_first_token_seconds{model}
whet_request_seconds{path}                       whet_tokens_total{model, kind=prompt|completion}
whet_requests_running                            whet_clients_left_total
whet_draining
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from whet.serve.access_log import Record

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ours = self.registry
        self.requests = Counter("whet_requests", "Requests that have ended.", ["path", "status"], registry=ours)
        self.seconds = Histogram("whet_request_seconds", "From head to end.", ["path"], buckets=SECONDS, registry=ours)
        self.first = Histogram(
            "whet_first_token_seconds", "From head to the first token.", ["model"], buckets=SECONDS, registry=ours
        )
        self.tokens = Counter("whet_tokens", "Tokens read and written.", ["model", "kind"], registry=ours)
        self.running = Gauge("whet_requests_running", "Requests now being served.", registry=ours)
        self.left = Counter("whet_clients_left", "Clients that went away before the end.", registry=ours)
        self.engine = Gauge("whet_engine", "What the engine says of its load.", ["what"], registry=ours)
        self.draining = Gauge("whet_draining", "1 while the server lets its last requests end.", registry=ours)

    def ended(self, record: Record) -> None:
        self.requests.labels(record.route, str(record.status)).inc()
        self.seconds.labels(record.route).observe(time.monotonic() - record.started)
        if record.left:
            self.left.inc()
        if record.model is not None:
            self.tokens.labels(record.model, "prompt").inc(record.prompt_tokens)
            self.tokens.labels(record.model, "completion").inc(record.completion_tokens)
            if record.first_token is not None:
                self.first.labels(record.model).observe(record.first_token - record.started)

    def text(self, load: Mapping[str, float]) -> bytes:
        for what, value in load.items():
            self.engine.labels(what).set(value)
        return generate_latest(self.registry)
