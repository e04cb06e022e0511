"""A PostgreSQL server of the tests' own, in a temporary folder, from the packages of the system.

Debian: apt-get install postgresql. Where it is missing the tests are skipped and say so; with WHET_CI=1 they fail.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

USER, PASSWORD = "reader", "s3cret p@ss/word:%"


@dataclass(frozen=True)
class Server:
    bin: Path
    folder: Path
    port: int
    user: str | None

    def url(self, password: str = "s3cret%20p%40ss%2Fword%3A%25", database: str = "postgres") -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def admin(self, sql: str) -> None:
        """Runs statements as the owner, over the socket."""
        command = [str(self.bin / "psql"), "-v", "ON_ERROR_STOP=1", "-qX", "-h", str(self.folder), "-p", str(self.port)]
        self.run([*command, "-U", "owner", "-d", "postgres", "-f", "-"], input=sql)

    def run(self, command: list[str], **kwargs: str) -> None:
        """The server refuses to run as root, so it and its tools run as another user then."""
        done = subprocess.run(
            command, user=self.user, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False, **kwargs
        )
        assert done.returncode == 0, done.stderr + done.stdout

    def stop(self) -> None:
        self.run([str(self.bin / "pg_ctl"), "stop", "-D", str(self.folder / "data"), "-m", "immediate", "-w"])

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=16MB"
        log = str(self.folder / "log")
        data = str(self.folder / "data")
        self.run([str(self.bin / "pg_ctl"), "start", "-D", data, "-l", log, "-w", "-o", options])


def programs() -> Path:
    """The folder of initdb and postgres; skips, or fails with WHET_CI=1, where there is none."""
    names = ("initdb", "pg_ctl", "psql")
    on_path = [Path(found).resolve().parent for found in map(shutil.which, names[:1]) if found]
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *on_path]
    found = [folder for folder in folders if all((folder / name).is_file() for name in names)]
    if found:
        return found[0]
    missing = "PostgreSQL IS NOT TESTED: no initdb on PATH or in /usr/lib/postgresql; apt-get install postgresql"
    if os.environ.get("WHET_CI") == "1":
        pytest.fail(missing)
    print(missing, file=sys.stderr)
    pytest.skip(missing)


@contextmanager
def running_server() -> Iterator[Server]:
    """A server on a free loopback port, with a role that must give its password and may read `public`."""
    bin = programs()
    user = None
    folder = Path(tempfile.mkdtemp(prefix="whet-pg-"))  # pytest's own folders are closed to other users
    if os.geteuid() == 0:
        user = "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(bin, folder, port, user)
    try:
        data = str(folder / "data")
        initdb = [str(bin / "initdb"), "-D", data, "-U", "owner", "-E", "UTF8", "--no-sync", "--locale=C.UTF-8"]
        server.run([*initdb, "--auth-local=trust", "--auth-host=scram-sha-256"])
        server.start()
        server.admin(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'")
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
