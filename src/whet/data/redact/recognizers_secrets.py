"""API keys and private keys."""

from __future__ import annotations

import re
from collections.abc import Iterator

from whet.data.redact.recognizers import Document, Labelled, Shape, Span
from whet.data.redact.recognizers_checks import entropic

WHOLE = r"(?<![A-Za-z0-9_\-])(?:{})(?![A-Za-z0-9_\-])"


def _key(pattern: str, *hints: str, score: float = 0.98) -> Shape:
    """A key with a prefix of its maker's own."""
    return Shape("API_KEY", re.compile(WHOLE.format(pattern)), score, hints=hints, cased=True)


KEYS: tuple[Shape, ...] = (
    _key(r"(?:AKIA|ASIA|ABIA|ACCA|AGPA|AROA|AIDA|ANPA)[A-Z2-7]{16}", "akia", "asia", "abia", "acca", "a"),
    _key(r"gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_[A-Za-z0-9_]{40,255}", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
        "github_pat_"),
    _key(r"glpat-[A-Za-z0-9_\-]{20,64}", "glpat-"),
    _key(r"sk-(?:ant-|proj-|svcacct-|admin-|or-)?[A-Za-z0-9_\-]{20,200}", "sk-"),
    _key(r"xox[abeoprs]-[A-Za-z0-9\-]{10,200}|xapp-[A-Za-z0-9\-]{20,200}", "xox", "xapp-"),
    _key(r"AIza[A-Za-z0-9_\-]{35}|GOCSPX-[A-Za-z0-9_\-]{28}|ya29\.[A-Za-z0-9_\-]{20,300}", "aiza", "gocspx-", "ya29."),
    _key(r"(?:sk|rk|pk|whsec)_(?:live|test)_[A-Za-z0-9]{10,200}|whsec_[A-Za-z0-9]{20,100}", "_live_", "_test_",
        "whsec_"),
    _key(r"SG\.[A-Za-z0-9_\-]{16,32}\.[A-Za-z0-9_\-]{16,64}", "sg."),
    _key(r"(?:hf|npm|dop_v1|shpat|pypi|lin_api|r8)[_\-][A-Za-z0-9_\-]{30,250}", "hf_", "npm_", "dop_", "shpat_",
        "pypi-", "lin_", "r8_"),
    _key(r"eyJ[A-Za-z0-9_\-]{8,4096}\.eyJ[A-Za-z0-9_\-]{4,8192}\.[A-Za-z0-9_\-]{0,2048}", "eyj"),
)  # fmt: skip

NAMES = (
    "key", "secret", "token", "passw", "pwd", "passphrase", "bearer", "credential", "clave", "cle api", "cle d'api",
    "schlussel", "contrasen",
    "mot de passe", "mot_de_passe", "kennwort",
)  # fmt: skip
"""Parts of the names that secrets are assigned to, folded."""

ASSIGNED = re.compile(
    r"(?i:[a-zñ]{0,6}(?:[_\- ](?:(?:access[_\- ])?key|id|api))?)[\"']?(?:\s{0,3}(?::=|=>|[:=]|-(?=\s)|is\s|lautet\s|"
    r"est\s|es\s)\s{0,3}|\s{1,3})(?:(?i:bearer|basic)\s)?[\"']?([A-Za-z0-9+/_.~!@$%^*\-]{8,512}={0,2})"
)
KEY_OF = re.compile(r"(?:api|access|secret|private|auth|account|encryption|license|ssh|x)[_\- ]?$")
IDENTIFIER = re.compile(r"[A-Za-z]+[0-9]{0,3}(?:[_\-.][A-Za-z]+[0-9]{0,3})+")  # a name in a program
LONG = 20  # characters of a value from which "key" alone is enough


class AssignedSecrets:
    """The value after "api_key =", "password:", "Authorization: Bearer", if it looks as a machine made it."""

    entity = "API_KEY"

    def find(self, document: Document) -> Iterator[Span]:
        for name in NAMES:
            position = document.folded.find(name)
            while position >= 0:
                end = position + len(name)
                match = ASSIGNED.match(document.text, end)
                if match is not None and self._is_secret(name, match[1], document.before(position, 12)):
                    yield Span(match.start(1), match.start(1) + len(match[1].rstrip(".")), self.entity, 0.75)
                position = document.folded.find(name, end)

    def _is_secret(self, name: str, value: str, before: str) -> bool:
        if name == "key" and len(value) < LONG and KEY_OF.search(before) is None:
            return False
        return IDENTIFIER.fullmatch(value) is None and entropic(value.rstrip("."))


BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")


class PrivateKeys:
    """PEM blocks; one that is cut off runs to the text's end."""

    entity = "PRIVATE_KEY"

    def find(self, document: Document) -> Iterator[Span]:
        position = 0
        while (begin := BEGIN.search(document.text, position)) is not None:
            end = END.search(document.text, begin.end())
            position = end.end() if end is not None else len(document.text)
            yield Span(begin.start(), position, self.entity, 1.0)


RECOGNIZERS = (
    *KEYS,
    AssignedSecrets(),
    PrivateKeys(),
)
BY_WORD: tuple[Labelled, ...] = ()
