"""A study's server in a process of its own, as `whet ab serve` starts it, and a client that shows every byte."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMAND = [sys.executable, "-c", "from whet.cli_ab import ab; ab()"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Site:
    """Started on entering, killed with SIGKILL on leaving. It keeps its port when it is started again."""

    folder: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    url: str = ""
    process: subprocess.Popen[str] | None = None

    def start(self) -> Site:
        command = [*COMMAND, "serve", str(self.folder), "--port", str(self.port), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("open "):
            raise AssertionError(line + self.process.communicate()[1])
        self.url = line.split()[1]
        return self

    def kill(self) -> None:
        """SIGKILL: no handler, no flush, no goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Site:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


@dataclass
class Client:
    """Speaks HTTP as a browser's page of the study would; `seen` holds all bytes of answers but their date."""

    url: str
    cookie: str = ""
    context: ssl.SSLContext | None = None
    seen: list[bytes] = field(default_factory=list)

    def send(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body). headers: in the place of the usual ones; an empty value leaves one out."""
        origin = urlsplit(self.url)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        usual = {"Host": origin.netloc, "Origin": self.url, "Content-Type": "application/json", "Cookie": self.cookie}
        sent = {name: value for name, value in (usual | (headers or {})).items() if value}
        if self.context:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                origin.hostname or "", origin.port, timeout=20, context=self.context
            )
        else:
            connection = http.client.HTTPConnection(origin.hostname or "", origin.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            if data is not None and "Content-Length" not in sent:
                connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        shown = {name.lower(): value for name, value in answer.getheaders() if name.lower() != "date"}
        self.seen.append(repr((answer.status, shown)).encode() + content)
        return answer.status, shown, content

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's value; fails the test when the request is refused."""
        status, _, content = self.send(method, path, body)
        assert status == 200, (status, content)
        return json.loads(content)

    def join(self, token: str) -> dict[str, str]:
        """Sign in; gives back the answer's headers."""
        status, headers, content = self.send("POST", "/api/join", {"token": token})
        assert status == 200, content
        self.cookie = headers["set-cookie"].split(";")[0]
        return headers


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost, signed with its own key, and the key; valid for a day. Paths of both, in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    return paths
