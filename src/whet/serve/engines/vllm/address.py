"""Where the server is, and the key it wants: as the operator gave them, checked before anything is sent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import SecretStr

from whet.addresses import is_loopback
from whet.errors import WhetError

SCHEMES = ("http://", "https://")
EXAMPLE = "http://127.0.0.1:8001/v1"


def is_address(model: str) -> bool:
    return model.lower().startswith(SCHEMES)


@dataclass(frozen=True)
class Address:
    """url: of the API, without a slash at its end. key: None where the server asks for none."""

    url: str
    key: SecretStr | None = None

    @classmethod
    def of(cls, given: str, key: SecretStr | None = None, *, plain_http: bool = False) -> Address:
        """`/v1` is put at the end where it lacks. Raises WhetError for an address that others could listen in on."""
        try:
            parts = urlsplit(given)
            _ = parts.port  # raises where it is no number
        except ValueError:
            raise WhetError("no address of a server", where=repr(given), fix=f"give one like {EXAMPLE}") from None
        if parts.username is not None or parts.password is not None:
            fix = "put the key into an environment variable, and name that with --upstream-key-env"
            raise WhetError("a key in an address ends up in logs", where=parts.hostname, fix=fix)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise WhetError("no address of a server", where=repr(given), fix=f"give one like {EXAMPLE}")
        if parts.scheme == "http" and not is_loopback(parts.hostname) and not plain_http:
            fix = "use https://, or --upstream-plain-http in a network you trust"
            raise WhetError("prompts and the key would cross the network unencrypted", where=given, fix=fix)
        path = parts.path.rstrip("/")
        return cls(f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}", key)


def key_from(variable: str) -> SecretStr:
    """The key in that environment variable, white space at its ends cut: files of secrets often end in a line break.

    Raises WhetError where there is none, or one that no HTTP header can hold.
    """
    key = os.environ.get(variable, "").strip()
    where = f"--upstream-key-env {variable}"
    if not key:
        raise WhetError("the environment has no such variable", where=where, fix=f"export {variable}=...")
    if not (key.isascii() and key.isprintable()) or " " in key:
        fix = f"export {variable} again, without quotes, spaces and line breaks inside"
        raise WhetError("what it holds is no API key", where=where, fix=fix)
    return SecretStr(key)
