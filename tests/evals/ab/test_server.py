"""The server over HTTP: what it tells whom, what it refuses, and what it keeps."""

from __future__ import annotations

import json
import random
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.evals.ab.ab_site import Client, Site, make_certificate
from tests.evals.ab.studies import SYSTEMS, WORDS, make_study, standing
from whet.errors import WhetError
from whet.evals.ab.server import serve
from whet.evals.ab.study import Study, load
from whet.evals.ab.votes import read


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ab")
    return make_study(folder) | {"folder": str(folder / "study")}


@pytest.fixture(scope="module")
def site(tokens: dict[str, str]) -> Iterator[Site]:
    with Site(Path(tokens["folder"])) as site:
        yield site


def signed_in(site: Site, token: str) -> Client:
    client = Client(site.url)
    client.join(token)
    return client


def every_page(client: Client, comparisons: int) -> None:
    """All that a grader's browser asks for, votes and mistakes among it."""
    for path in ("/", "/join", "/owner", "/static/grade.js", "/static/style.css", "/api/study", "/nowhere"):
        client.send("GET", path)
    for position in range(comparisons + 2):
        client.send("GET", f"/api/comparisons/{position}")
        client.send("PUT", f"/api/comparisons/{position}/vote", {"choice": "left", "comment": f"c{position}"})
        client.send("GET", f"/api/comparisons/{position}")
    client.send("DELETE", "/api/comparisons/2/vote")
    client.send("PUT", "/api/comparisons/1/vote", {"choice": "nonsense"})
    client.send("GET", "/api/owner/results.json")
    client.send("GET", "/api/study")


def test_exchanging_the_systems_and_the_sides_changes_no_byte(tmp_path: Path) -> None:
    """Catches every way to tell which system is where: ids, order, names, lengths, anything that depends on it.

    Two studies: in the second each answer is the other system's, and its secret is one that gives the same order and
    all sides the other way round. A grader sees the same texts in the same places, from the other system. All that
    the server sends must be equal, byte for byte.
    """
    tokens = make_study(tmp_path, 3, ("ada",))
    first = tmp_path / "study"
    study = load(first)
    exchanged = replace(study, items=tuple(replace(item, answers=item.answers[::-1]) for item in study.items))
    twin = next(
        twin
        for twin in (replace(exchanged, secret=secrets.token_bytes(32)) for _ in range(5000))
        if _alike(twin, study)
    )
    second = tmp_path / "twin"
    second.mkdir()
    value = json.loads((first / "study.json").read_text())
    value["commitment"] = twin.commitment
    value["items"] = [item | {"answers": item["answers"][::-1]} for item in value["items"]]
    (second / "study.json").write_text(json.dumps(value))
    (second / "secret.key").write_text(twin.secret.hex())
    votes = (first / "votes.jsonl").read_text()
    (second / "votes.jsonl").write_text(votes.replace(study.digest, twin.digest))
    seen = []
    for folder in (first, second):
        with Site(folder) as site:
            client = signed_in(site, tokens["ada"])
            every_page(client, 3)
            seen.append(client.seen)
    assert seen[0] == seen[1]
    results = [read(folder / "votes.jsonl", load(folder)) for folder in (first, second)]
    assert standing(results[0]) == standing(results[1])


def _alike(twin: Study, study: Study) -> bool:
    """Whether a grader sees the same texts, each from the other system."""
    pairs = zip(twin.seats("ada"), study.seats("ada"), strict=True)
    return all(a.key == b.key and a.left == b.right for a, b in pairs)


def test_no_answer_names_a_system_a_file_or_an_item(site: Site, tokens: dict[str, str]) -> None:
    """Catches an id or a name from the files that tells whose answer it is."""
    client = signed_in(site, tokens["grace"])
    every_page(client, 6)
    everything = b"\n".join(client.seen).lower()
    assert b"here is the reply" in everything
    study = load(Path(tokens["folder"]))
    for word in (*SYSTEMS, *WORDS, study.commitment, study.digest, study.secret.hex()):
        assert word.encode() not in everything, word


def test_the_owner_sees_no_vote_before_the_end(site: Site, tokens: dict[str, str]) -> None:
    """Catches an owner who stops when the numbers please: progress is all there is."""
    grader, owner = signed_in(site, tokens["ada"]), signed_in(site, tokens["owner"])
    pages = []
    for choice in ("left", "right"):
        grader.json("PUT", "/api/comparisons/1/vote", {"choice": choice})
        _, _, page = owner.send("GET", "/owner")
        pages.append(page.split(b"latest vote")[1].replace(b"\n", b"")[:120])
        assert owner.send("GET", "/api/owner/results.json")[0] == 409
        assert owner.send("GET", "/api/owner/votes.csv")[0] == 409
    assert pages[0] == pages[1]
    assert b"1 of 6" in pages[0]
    assert all(name.encode() not in page for name in SYSTEMS)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/api/study"), ("GET", "/api/comparisons/1"), ("PUT", "/api/comparisons/1/vote"), ("GET", "/owner"),
     ("DELETE", "/api/comparisons/1/vote"), ("POST", "/api/owner/links"), ("POST", "/api/owner/close"),
     ("GET", "/api/owner/results.json"), ("GET", "/api/owner/votes.csv")],
)  # fmt: skip
@pytest.mark.parametrize("who", ["nobody", "forger", "other role"])
def test_each_role_gets_only_its_own(site: Site, tokens: dict[str, str], method: str, path: str, who: str) -> None:
    """Catches a grader who closes the study or adds graders, and anybody without a link."""
    client = Client(site.url)
    study = load(Path(tokens["folder"])).id
    own, other = ("owner", "grader") if "owner" in path else ("grader", "owner")
    if who == "forger":
        client.cookie = f"whet-ab-{study}-{own}={secrets.token_urlsafe(32)}"
    elif who == "other role":
        client.cookie = f"whet-ab-{study}-{own}={tokens['owner' if other == 'owner' else 'ada']}"
    bodies = {"/api/owner/links": {"name": "eve"}, "/api/comparisons/1/vote": {"choice": "left"}}
    status, _, _ = client.send(method, path, bodies.get(path, {}) if method != "GET" else None)
    assert status == 401


def test_a_wrong_link_signs_nobody_in(site: Site, tokens: dict[str, str]) -> None:
    status, headers, _ = Client(site.url).send("POST", "/api/join", {"token": tokens["ada"][:-1]})
    assert status == 401
    assert "set-cookie" not in headers


def test_cookies_are_out_of_reach_of_scripts_and_other_sites(site: Site, tokens: dict[str, str]) -> None:
    parts = Client(site.url).join(tokens["ada"])["set-cookie"].lower().split("; ")
    assert {"httponly", "samesite=strict", "path=/"} <= set(parts)


FOREIGN: list[tuple[dict[str, str], int]] = [
    ({"Origin": ""}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Content-Type": "text/plain"}, 415),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content-Type": ""}, 415),
    ({"Host": "evil.example"}, 421),
    ({"Host": ""}, 400),
]


@pytest.mark.parametrize(("headers", "status"), FOREIGN)
def test_another_pages_request_changes_nothing(
    site: Site, tokens: dict[str, str], headers: dict[str, str], status: int
) -> None:
    """Catches a page elsewhere that votes with the grader's cookie, and a name pointed at this machine (rebinding)."""
    client = signed_in(site, tokens["ada"])
    votes = Path(tokens["folder"]) / "votes.jsonl"
    before = votes.read_bytes()
    for method, path in (("PUT", "/api/comparisons/5/vote"), ("DELETE", "/api/comparisons/1/vote")):
        assert client.send(method, path, {"choice": "tie"}, headers=headers)[0] == status
    assert votes.read_bytes() == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * 40_000, 413),
        ({"choice": "left", "comment": "x" * 2001}, 422),
        ({"choice": "best"}, 422),
        ({"choice": "left", "grader": "grace"}, 422),
        ({}, 422),
        (b"{", 422),
        (b'{"choice": "left", "comment": "\\ud800"}', 422),
        (b"[" * 30_000, 400),
        (b"\xff\xfe", 422),
    ],
)
def test_bodies_that_are_too_long_or_wrong_are_refused(
    site: Site, tokens: dict[str, str], body: Any, status: int
) -> None:
    """Catches a server that falls over, or keeps what it cannot show again."""
    client = signed_in(site, tokens["ada"])
    votes = Path(tokens["folder"]) / "votes.jsonl"
    before = votes.read_bytes()
    answer = client.send("PUT", "/api/comparisons/5/vote", body)
    assert answer[0] == status
    assert "error" in json.loads(answer[2])
    assert votes.read_bytes() == before
    assert client.send("GET", "/api/comparisons/5")[0] == 200


def test_a_body_without_a_length_is_cut_off(site: Site, tokens: dict[str, str]) -> None:
    """Catches a limit that trusts Content-Length: a chunked body has none."""
    origin = urlsplit(site.url)
    with socket.create_connection((origin.hostname or "", origin.port or 0), timeout=20) as connection:
        head = f"PUT /api/comparisons/1/vote HTTP/1.1\r\nHost: {origin.netloc}\r\nOrigin: {site.url}\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(5):
            connection.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "path", ["/", "/join", "/owner", "/api/study", "/static/grade.js", "/nowhere", "/static/../study.json"]
)
def test_every_answer_has_the_security_headers(site: Site, path: str) -> None:
    _, headers, _ = Client(site.url).send("GET", path)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


@pytest.mark.parametrize("name", ["../study.py", "%2e%2e/study.py", "__init__.py", "owner.html.jinja", "..%2fstudy.py"])
def test_only_the_pages_own_files_are_served(site: Site, name: str) -> None:
    assert Client(site.url).send("GET", f"/static/{name}")[0] == 404


def test_after_the_end_votes_are_refused_and_results_are_there(tmp_path: Path) -> None:
    tokens = make_study(tmp_path, 4)
    with Site(tmp_path / "study") as site:
        grader, owner = signed_in(site, tokens["ada"]), signed_in(site, tokens["owner"])
        grader.json("PUT", "/api/comparisons/1/vote", {"choice": "left", "comment": "<script>alert(1)</script>"})
        added = owner.json("POST", "/api/owner/links", {"name": "lin"})
        assert signed_in(site, added["token"]).json("GET", "/api/study")["grader"] == "lin"
        owner.json("POST", "/api/owner/close", {})
        assert grader.send("PUT", "/api/comparisons/2/vote", {"choice": "left"})[0] == 409
        assert grader.send("DELETE", "/api/comparisons/1/vote")[0] == 409
        assert grader.json("GET", "/api/study")["closed"] is True
        found = owner.json("GET", "/api/owner/results.json")
        assert [ballot["choice"] for ballot in found["ballots"]] == ["left"]
        assert b"ocelot" in owner.send("GET", "/api/owner/votes.csv")[2]
        _, _, page = owner.send("GET", "/owner")
        assert b"win rate of ocelot" in page
        assert b"<script>alert" not in page
        assert grader.send("GET", "/api/owner/results.json")[0] == 401


def test_votes_that_were_confirmed_survive_kill_9(tmp_path: Path) -> None:
    """Catches a vote called saved that was still in a buffer, and a link that ends with the server's process."""
    tokens = make_study(tmp_path, 6)
    folder = tmp_path / "study"
    site = Site(folder).start()
    clients = {name: signed_in(site, tokens[name]) for name in ("ada", "grace")}
    confirmed: dict[str, dict[int, str]] = {"ada": {}, "grace": {}}
    rng = random.Random(5)
    for _ in range(2):
        killed = threading.Event()
        graders = [
            threading.Thread(target=_vote_until_killed, args=(clients[name], confirmed[name], killed))
            for name in confirmed
        ]
        for grader in graders:
            grader.start()
        time.sleep(0.2 + 0.2 * rng.random())
        site.kill()
        killed.set()
        for grader in graders:
            grader.join()
        site.start()
        for name, client in clients.items():
            votes = client.json("GET", "/api/study")["votes"]
            sure = {position: choice for position, choice in confirmed[name].items() if choice != "?"}
            assert sure
            assert {position: votes[position - 1] for position in sure} == sure
    site.kill()


def _vote_until_killed(client: Client, confirmed: dict[int, str], killed: threading.Event) -> None:
    """Votes without end. confirmed: position -> choice; "?" for one that was sent and not answered."""
    number = 0
    while not killed.is_set():
        position, choice = number % 6 + 1, ("left", "tie", "right", "skip")[number % 4]
        before = confirmed.get(position)
        confirmed[position] = "?"
        try:
            status, _, _ = client.send("PUT", f"/api/comparisons/{position}/vote", {"choice": choice})
        except OSError:
            return
        confirmed[position] = choice if status == 200 else before or "?"
        number += 1


def test_a_full_disk_is_told_and_the_server_goes_on(tmp_path: Path) -> None:
    """Catches a vote called saved that was not, and a path of the server's told to a grader."""
    tokens = make_study(tmp_path)
    folder = tmp_path / "study"
    size = (folder / "votes.jsonl").stat().st_size
    with Site(folder) as site:
        client = signed_in(site, tokens["ada"])
        assert site.process is not None
        limit = ["prlimit", f"--pid={site.process.pid}"]
        subprocess.run([*limit, f"--fsize={size + 10}:unlimited"], check=True)
        status, _, body = client.send("PUT", "/api/comparisons/1/vote", {"choice": "left"})
        assert status == 503
        assert str(tmp_path) not in body.decode()
        assert client.json("GET", "/api/study")["votes"][0] is None
        subprocess.run([*limit, "--fsize=unlimited:unlimited"], check=True)
        client.json("PUT", "/api/comparisons/1/vote", {"choice": "left"})
        assert client.json("GET", "/api/study")["votes"][0] == "left"


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"host": "0.0.0.0"}, "without encryption"),
        ({"host": "::"}, "without encryption"),
        ({"host": ""}, "without encryption"),
        ({"host": "192.0.2.1"}, "without encryption"),
        ({"host": "example.org"}, "without encryption"),
        ({"host": "0.0.0.0", "plain_http": True}, "under any name"),
        ({"url": "ab.example.org"}, "no address"),
        ({"certificate": Path("missing.pem")}, "TLS cannot start"),
    ],
)
def test_unsafe_addresses_are_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    """Catches login links and answers that cross a network in the clear because of one option."""
    make_study(tmp_path)
    with pytest.raises(WhetError, match=what):
        serve(tmp_path / "study", ready=pytest.fail, port=0, **options)


def test_a_port_that_is_taken_is_told(tmp_path: Path, site: Site) -> None:
    make_study(tmp_path)
    with pytest.raises(WhetError, match="cannot listen"):
        serve(tmp_path / "study", ready=pytest.fail, port=site.port)


def test_tls_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    """Catches a cookie that a browser would also send without encryption."""
    certificate, key = make_certificate(tmp_path)
    tokens = make_study(tmp_path)
    options = ("--host", "0.0.0.0", "--url", "https://localhost:8443")
    with Site(tmp_path / "study", (*options, "--certificate", str(certificate), "--key", str(key))) as site:
        assert site.url == "https://localhost:8443"
        client = Client(f"https://localhost:{site.port}", context=ssl.create_default_context(cafile=str(certificate)))
        assert client.send("GET", "/")[0] == 421, "the name with another port is not the one that was given"
        ours = {"Host": "localhost:8443", "Origin": "https://localhost:8443"}
        status, headers, _ = client.send("POST", "/api/join", {"token": tokens["ada"]}, headers=ours)
        assert status == 200
        cookie = headers["set-cookie"]
        assert cookie.startswith("__Host-whet-ab-")
        assert "; Secure" in cookie
