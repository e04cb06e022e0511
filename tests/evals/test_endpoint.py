"""An endpoint against a real server on this machine, which fails in the ways that servers do."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from tests.evals.openai_server import ENGINE, NAME, Fault, OpenAIServer
from whet.errors import WhetError
from whet.evals.endpoint import Endpoint, EndpointSettings, Usage
from whet.evals.endpoint_http import Caller, Outcome, _error_in
from whet.evals.generation import Generation
from whet.evals.models import InMemory, Model, Prompt
from whet.retry_after import retry_after

KEY = "sk-a-key-that-nobody-may-see"
HOW = Generation(max_new_tokens=6)
PROMPTS = [Prompt(messages=[{"role": "user", "content": f"Say {i}"}]) for i in range(6)]
FAULTS = {
    "rate limit": (Fault(status=429), "unavailable"),
    "overload": (Fault(status=503), "unavailable"),
    "a connection lost in the middle": (Fault(drop=True), "unavailable"),
    "a proxy's page": (Fault(raw=b"<html>502 Bad Gateway</html>"), "malformed"),
    "a body cut short": (Fault(raw=b'{"choices": [{"mess'), "malformed"),
    "a JSON array": (Fault(raw=b"[1, 2]"), "malformed"),
    "nesting without end": (Fault(raw=b"[" * 100_000), "malformed"),
    "no reply": (Fault(delay=1.0), "timeout"),
    "bytes that trickle in": (Fault(trickle=0.05), "timeout"),
}


def endpoint(server: OpenAIServer, **settings: Any) -> Endpoint:
    return Endpoint(EndpointSettings(**{"url": server.url, "model": NAME, "backoff": 0.001, "retries": 2} | settings))


def first(fault: Fault, times: int) -> Callable[[dict[str, Any]], Fault | str]:
    """A policy: the fault so many times, then an answer."""
    left = [fault] * times
    return lambda body: left.pop() if left else "yes"


def test_answers_equal_those_of_the_model_in_memory(server: OpenAIServer) -> None:
    """Catches prompts whose roles, limit of tokens or order are lost on the way."""
    served = endpoint(server, concurrency=2)
    assert isinstance(served, Model)
    memory = InMemory(*ENGINE.loaded)
    assert served.generate(PROMPTS, HOW) == memory.generate(PROMPTS, HOW)
    assert served.generate([Prompt(text="The json module")], HOW) == memory.generate(
        [Prompt(text="The json module")], HOW
    )
    assert server.requests[-1].path == "/v1/completions"
    assert server.most_at_once == 2


def test_log_probabilities_equal_those_of_the_model_in_memory(server: OpenAIServer) -> None:
    """Catches a sum that takes in the prompt's tokens, or the one that the server generates after the choice."""
    prompts, choices = [Prompt(text="The sky is"), Prompt(text="One and one")], [[" blue", " red"], [" make two"]]
    found = endpoint(server).choice_logprobs(prompts, choices)
    for own, expected in zip(found, InMemory(*ENGINE.loaded).choice_logprobs(prompts, choices), strict=True):
        assert own == pytest.approx(expected, abs=1e-4)
    with pytest.raises(WhetError, match="text only"):
        endpoint(server).choice_logprobs(PROMPTS[:1], [["a"]])
    server.policy = lambda body: "a server that ignores echo"
    with pytest.raises(WhetError, match="does not echo"):
        endpoint(server).choice_logprobs(prompts[:1], [["a"]])


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_is_tried_again(server: OpenAIServer, name: str) -> None:
    fault, kind = FAULTS[name]
    server.policy = first(fault, times=2)
    late = kind == "timeout"  # a machine that is busy may let the answer be late too
    (reply,) = endpoint(server, timeout=0.4 if late else 60.0, retries=20 if late else 2).replies(PROMPTS[:1], HOW)
    assert (reply.text, reply.failure) == ("yes", None)
    assert len(server.requests) == 3 or (late and len(server.requests) > 3)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_a_note_and_no_answer(server: OpenAIServer, name: str) -> None:
    """Catches retries without end, and a failure that looks like an empty answer."""
    fault, kind = FAULTS[name]
    server.policy = lambda body: fault
    served = endpoint(server, timeout=0.3 if kind == "timeout" else 60.0, retries=1)
    (reply,) = served.replies(PROMPTS[:1], HOW)
    assert reply.text is None
    assert reply.failure is not None
    assert reply.failure.kind == kind
    assert "2 tries" in reply.failure.note
    assert len(server.requests) == 2
    with pytest.raises(WhetError, match="1 of 1 prompts got no answer"):
        served.generate(PROMPTS[:1], HOW)


def test_one_failure_leaves_the_other_answers(server: OpenAIServer) -> None:
    """Catches a batch that is lost for one request, and answers that take the place of the failed one."""
    server.policy = lambda body: Fault(status=400, error="too long") if "Say 2" in str(body) else str(body["messages"])
    replies = endpoint(server).replies(PROMPTS, HOW)
    assert [reply.failure.note for reply in replies if reply.failure] == ["HTTP 400: too long"]
    assert [f"Say {i}" in (reply.text or "") for i, reply in enumerate(replies)] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]


def test_the_servers_wait_is_taken_and_one_too_long_is_not(server: OpenAIServer) -> None:
    """Without Retry-After the first wait here would be half a minute."""
    server.policy = first(Fault(status=429, headers={"retry-after": "0"}), times=2)
    assert endpoint(server, backoff=600.0).replies(PROMPTS[:1], HOW)[0].text == "yes"
    server.requests.clear()
    server.policy = lambda body: Fault(status=429, headers={"retry-after": "7200"})
    (reply,) = endpoint(server).replies(PROMPTS[:1], HOW)
    assert reply.failure is not None
    assert "asks to wait 7200 s" in reply.failure.note
    assert len(server.requests) == 1


REFUSALS = {
    "refusal": Fault(message={"content": None, "refusal": "I can't help with that."}),
    "filtered reply": Fault(message={"content": "I"}, finish="content_filter"),
    "filtered prompt": Fault(status=400, code="content_filter", error="filtered"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_told_from_an_answer_and_not_tried_again(server: OpenAIServer, name: str) -> None:
    server.policy = lambda body: REFUSALS[name]
    (reply,) = endpoint(server).replies(PROMPTS[:1], HOW)
    assert reply.text is None
    assert reply.failure is not None
    assert reply.failure.kind == "refused"
    assert len(server.requests) == 1


def test_a_refusals_words_are_the_answer_to_a_task(server: OpenAIServer) -> None:
    """Catches a safety task that fails where the model does as it should."""
    server.policy = lambda body: REFUSALS["refusal"]
    assert endpoint(server).generate(PROMPTS[:1], HOW) == ["I can't help with that."]


def test_what_every_request_would_meet_ends_it_at_once(server: OpenAIServer) -> None:
    with pytest.raises(WhetError, match="does not exist"):
        endpoint(server, model="another").replies(PROMPTS, HOW)
    server.policy = lambda body: Fault(status=429, code="insufficient_quota", error="You exceeded your quota")
    with pytest.raises(WhetError, match="quota"):
        endpoint(server).replies(PROMPTS, HOW)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(WhetError, match="cannot connect"):
        endpoint(server, url=url).replies(PROMPTS, HOW)


def test_once_it_has_answered_no_fault_loses_the_replies(server: OpenAIServer) -> None:
    """Catches a quota that runs out at the last item and takes all that was paid for with it."""
    served = endpoint(server, concurrency=1)
    server.policy = lambda body: Fault(status=401) if "Say 5" in str(body) else "yes"
    replies = served.replies(PROMPTS, HOW)
    assert [reply.text for reply in replies] == ["yes"] * 5 + [None]


def test_the_key_is_sent_and_shown_nowhere(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server quotes the key in its error, as some do."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")  # as a mounted secret often ends
    server.key = KEY
    served = endpoint(server, key_env="JUDGE_KEY")
    assert len(served.generate(PROMPTS[:2], HOW)) == 2
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    server.key = "another"
    (reply,) = served.replies(PROMPTS[:1], HOW)
    with pytest.raises(WhetError, match=r"Incorrect API key provided: Bearer \*\*\*") as refused:
        endpoint(server, key_env="JUDGE_KEY").replies(PROMPTS[:1], HOW)
    shown = [reply, refused.value, served, vars(served), vars(served._caller), served.settings, caplog.text]
    assert not [text for text in map(repr, shown) if KEY in text]


def test_no_key_is_sent_that_was_not_asked_for(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches OpenAI's key on its way to somebody else's server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint(server).generate(PROMPTS[:1], HOW)
    assert KEY not in str(server.requests)


def test_a_redirect_is_not_followed(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key that goes where a redirect points."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.policy = lambda body: Fault(status=307, headers={"location": server.url + "/elsewhere"})
    with pytest.raises(WhetError, match="HTTP 307"):
        endpoint(server, key_env="JUDGE_KEY").replies(PROMPTS[:1], HOW)
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", [None, "", "two words", f"{KEY}\nX-Other: 1", "schlüssel"])
def test_a_key_that_cannot_be_is_refused_without_showing_it(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the HTTP client's own error, which quotes the header."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(WhetError, match="JUDGE_KEY") as refused:
        Endpoint(EndpointSettings(url="http://localhost/v1", model="m", key_env="JUDGE_KEY"))
    assert not value or value not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"url": f"https://user:{KEY}@host/v1"},
        {"url": f"https://host/v1?key={KEY}"},
        {"url": f"{KEY}"},
        {"url": "file:///etc/passwd"},
        {"url": "http://host/v1", "key_env": KEY},
        {"url": "http://host/v1", "api_key": KEY},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_without_showing_it(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        EndpointSettings(model="m", **settings)
    assert KEY not in str(refused.value)


def test_tokens_are_counted_from_usage(server: OpenAIServer) -> None:
    """Catches replies without a count that pass for free ones."""
    served = endpoint(server)
    left = [Fault(usage=False), Fault(), Fault(status=500), Fault()]
    server.policy = lambda body: left.pop()
    served.replies(PROMPTS[:3], HOW)
    assert served.usage == Usage(requests=3, prompt_tokens=14, completion_tokens=10, uncounted=1)


def test_the_body_is_as_the_server_wants_it(server: OpenAIServer) -> None:
    """Catches a server for which max_tokens has another name, or a temperature is a fault."""
    server.policy = lambda body: "yes"
    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 9}
    endpoint(server, extra=extra).replies(PROMPTS[:1], Generation(stop=("\n",), seed=3, top_p=0.5))
    body = server.requests[0].body
    assert "max_tokens" not in body
    assert "temperature" not in body
    assert (body["max_completion_tokens"], body["stop"], body["seed"], body["top_p"]) == (9, ["\n"], 3, 0.5)


def test_an_interruption_ends_it(server: OpenAIServer) -> None:
    """Catches Ctrl-C that waits for every request that is left."""

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    server.policy = lambda body: "yes"
    with pytest.raises(KeyboardInterrupt):
        endpoint(server, concurrency=1).replies(PROMPTS, HOW, done=interrupt)
    assert len(server.requests) < len(PROMPTS)


def test_it_works_where_an_event_loop_runs(server: OpenAIServer) -> None:
    """Catches a notebook."""

    async def in_a_notebook() -> list[str]:
        return endpoint(server).generate(PROMPTS[:2], HOW)

    assert len(asyncio.run(in_a_notebook())) == 2


def test_an_interruption_ends_it_in_a_notebook_too(server: OpenAIServer) -> None:
    """Catches a cell that cannot be stopped until the last request is through."""

    def interrupt(count: int) -> None:
        if count == 1:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    async def in_a_notebook() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as IPython has it
        endpoint(server, concurrency=1).replies(PROMPTS, HOW, done=interrupt)

    server.policy = lambda body: Fault(delay=0.2)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(in_a_notebook())
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(server.requests) < len(PROMPTS)


def test_openais_own_client_takes_the_test_server_for_one(server: OpenAIServer) -> None:
    """Catches a test server that only this package's client understands."""
    import openai

    client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    messages: Any = [{"role": "user", "content": "Say 0"}]
    said = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6, temperature=0)
    assert said.choices[0].message.content == endpoint(server).generate(PROMPTS[:1], HOW)[0]
    assert said.usage is not None
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    echoed = client.completions.create(model=NAME, prompt="The sky is", echo=True, logprobs=1, max_tokens=1)
    assert echoed.choices[0].text.startswith("The sky is")
    server.policy = lambda body: Fault(status=429)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model=NAME, messages=messages)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["choices", "message", "content", "text"]), inner),
)


NOWHERE = Endpoint(EndpointSettings(url="http://localhost/v1", model="m"))


@given(JSON, st.sampled_from(["choices", "usage", "error"]))
def test_any_reply_is_a_text_or_a_failure(value: Any, name: str) -> None:
    """Catches a server's odd reply that ends an evaluation with a traceback."""
    reply = NOWHERE._reply(Outcome({name: value}, None, 1))
    assert isinstance(reply.text, str) != (reply.failure is not None)


@given(st.binary() | st.builds(lambda value: str(value).encode(), JSON), st.text())
def test_a_servers_words_are_one_harmless_line(content: bytes, text: str) -> None:
    """Catches an error's body that is no JSON, and one that writes to the terminal or quotes the key."""
    caller = Caller("http://localhost", SecretStr(KEY), timeout=1, retries=0, backoff=1)
    shown = caller.shown(f"{_error_in(content)[0]}{text}\x1b[2J{KEY}")
    assert shown.isprintable()
    assert KEY not in shown
    assert len(shown) <= 201


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("-1", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), ("", None), ("nan", None)],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": header}) == seconds
