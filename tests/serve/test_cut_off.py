"""Answers that the server has no time left for: it goes down, and they are not whole."""

from __future__ import annotations

import json
import signal
import socket
import threading
from typing import Any

import pytest

from tests.serve.gateways import CHAT, Gateway, events, gateway
from tests.serve.scripted import Scripted


def answered(up: Gateway, body: dict[str, Any], end: Any) -> Any:
    """What a client gets that asks before the server goes down; `end` is done once its answer is being written."""
    got: list[Any] = []
    client = threading.Thread(target=lambda: got.append(up.post(body=body)))
    client.start()
    up.wait_until(lambda: up.engine.running == body.get("n", 1))
    up.in_loop(end)
    client.join(20)
    return got[0]


@pytest.mark.parametrize("answers", [1, 2])
def test_a_stream_that_is_cut_off_says_so(answers: int) -> None:
    """Catches half an answer that looks whole: a chunked body that ends well, without an error."""
    with gateway(Scripted(hold=True), patience=0.05) as up:
        response = answered(up, {**CHAT, "stream": True, "n": answers}, lambda: up.server.end(signal.SIGTERM))
        *chunks, last = events(response.text)
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert last["error"]["code"] == "cut_off"
        assert "[DONE]" not in response.text
        up.wait_until(lambda: not up.engine.started)
        line = up.lines(1)[0]
        assert (line["status"], line["error"], line["left"]) == (200, "cut_off", False)
        assert line["completion_tokens"] == answers, "what was written until then counts"


def test_an_answer_that_is_cut_off_before_it_began_has_a_status() -> None:
    """Catches a connection that closes without a word, which a client can't tell from a crash."""
    with gateway(Scripted(hold=True), patience=0.05) as up:
        response = answered(up, CHAT, lambda: up.server.end(signal.SIGTERM))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "cut_off"
        assert response.headers["retry-after"] == "5"
        up.wait_until(lambda: not up.engine.started)
        assert up.lines(1)[0]["error"] == "cut_off"
        assert up.engine.running == 0


def test_a_second_signal_cuts_off_at_once() -> None:
    """Catches an impatient operator's second Ctrl-C that leaves clients with half an answer."""

    def twice() -> None:
        up.server.end(signal.SIGINT)
        up.server.end(signal.SIGINT)

    with gateway(Scripted(hold=True), patience=300) as up:
        response = answered(up, {**CHAT, "stream": True}, twice)
        assert events(response.text)[-1]["error"]["code"] == "cut_off"
        up.wait_until(lambda: not up.engine.started)


def test_a_client_that_has_left_is_not_told_of_the_end() -> None:
    """Catches a client's own leaving that is logged as the server's doing."""
    with gateway(Scripted(hold=True), patience=300) as up:
        client = socket.create_connection(up.address)
        client.sendall(up.request(json.dumps({**CHAT, "stream": True}).encode()))
        up.wait_until(lambda: up.engine.running == 1)
        client.close()
        up.wait_until(lambda: up.engine.running == 0)
        up.in_loop(lambda: up.server.end(signal.SIGTERM))
        up.wait_until(lambda: not up.engine.started)
        line = up.lines(1)[0]
        assert (line["left"], line["error"]) == (True, None)
