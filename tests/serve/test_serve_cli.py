"""`whet serve` as a process: a real model, a real signal, TLS."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.road import start
from whet.errors import WhetError
from whet.serve import keys
from whet.serve.engines.choice import chosen_for, located

BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it said."""
    process = start("serve", "builtin:tiny", "--port", "0", "--keys", "keys.json", *options, cwd=folder)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready http"), (line, process.stderr and process.stderr.read())
        yield process, line.split()[1]
    finally:
        process.kill()
        process.communicate()


def certificate(folder: Path) -> tuple[str, str]:
    """A certificate for localhost, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(secret)
    return "cert.pem", "key.pem"


def test_sigterm_lets_an_answer_end(tmp_path: Path) -> None:
    """Catches a process that a deployment kills in the middle of a sentence, and one that logs what was said.

    By TLS, since the whole road is open here.
    """
    token = keys.add(tmp_path / "keys.json", "app")
    cert, key = certificate(tmp_path)
    got: list[httpx2.Response] = []
    options = (
        "--certificate",
        cert,
        "--key",
        key,
        "--log",
        "requests.jsonl",
        "--host",
        "localhost",
        "--drain-seconds",
        "300",
    )
    with serving(tmp_path, *options) as (process, url):
        verify = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with httpx2.Client(verify=verify, headers={"authorization": f"Bearer {token}"}, timeout=120) as client:
            first = threading.Event()

            def ask() -> None:
                with client.stream("POST", f"{url}/chat/completions", json={**BODY, "stream": True}) as response:
                    for line in response.iter_lines():
                        first.set()
                        lines.append(line)
                got.append(response)

            lines: list[str] = []
            asking = threading.Thread(target=ask)
            asking.start()
            assert first.wait(120)
            process.send_signal(signal.SIGTERM)
            asking.join(120)
        assert got[0].status_code == 200
        assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
        assert process.wait(120) == 0
    written = (tmp_path / "requests.jsonl").read_text()
    line = json.loads(written.splitlines()[0])
    assert (line["status"], line["key"], line["left"]) == (200, "app", False)
    assert token not in written
    assert (tmp_path / "requests.jsonl").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("model", ["missing", "meta-llama/Llama-3.1-8B", "."])
def test_a_model_that_is_not_there_is_said(here: Any, tmp_path: Path, model: str) -> None:
    """Catches a name that is looked up on a hub: the suite has no network, and a server asks for none."""
    keys.add(tmp_path / "keys.json", "app")
    told = here("serve", model, "--port", "0", "--keys", "keys.json", cwd=tmp_path)
    assert told.code == 2
    assert "no config.json" in told.err


def test_an_export_is_served_by_its_own_name(tmp_path: Path) -> None:
    """Catches an export whose folder can't be given as it is, or whose model is called `merged`."""
    export = tmp_path / "routing"
    (export / "merged").mkdir(parents=True)
    (export / "model-Q8_0.gguf").touch()
    assert located(str(export)) == (str(export / "model-Q8_0.gguf"), "routing")
    (export / "merged" / "config.json").touch()
    assert located(str(export)) == (str(export / "merged"), "routing")
    assert located(str(export / "merged")) == (str(export / "merged"), None)
    assert chosen_for(str(export / "model-Q8_0.gguf")) == "llama.cpp"
    (export / "merged" / "config.json").unlink()
    (export / "model-Q4_K_M.gguf").touch()
    with pytest.raises(WhetError, match="2 GGUF files"):
        located(str(export))


def test_a_model_that_can_not_be_loaded_ends_the_server(here: Any, tmp_path: Path) -> None:
    """Catches a server that stays up without a model."""
    keys.add(tmp_path / "keys.json", "app")
    (tmp_path / "config.json").write_text("{")
    told = here("serve", ".", "--port", "0", "--keys", "keys.json", cwd=tmp_path)
    assert told.code == 2
    assert "Traceback" not in told.err


@pytest.mark.parametrize("fault", ["no file", "other key"])
def test_tls_that_can_not_start_is_said(here: Any, tmp_path: Path, fault: str) -> None:
    keys.add(tmp_path / "keys.json", "app")
    cert, key = certificate(tmp_path)
    if fault == "no file":
        key = "missing.pem"
    else:
        (tmp_path / "other").mkdir()
        certificate(tmp_path / "other")
        key = "other/key.pem"
    options = ("--port", "0", "--keys", "keys.json", "--certificate", cert, "--key", key)
    told = here("serve", "builtin:tiny", *options, cwd=tmp_path)
    assert told.code == 2
    assert "TLS cannot start" in told.err
