"""What a replacement looks like, so that it is known again: by the next pass, and by the vault.

    [EMAIL]                    a placeholder
    [EMAIL_k3f9q2w7x5a2]       a placeholder with a mark
    Robin Aldermere-Fennelholt [#k3f9q2w7x5a2]      any other replacement with a mark

A mark is 60 bits of a keyed hash of the class and the value as it is written, so two spellings have two marks and a
text can be restored letter by letter. Of ten million values, two share a mark with a chance of 4 in 100,000.
"""

from __future__ import annotations

import base64
import re

TAG = "[a-z2-7]{12}"
MARK = re.compile(rf"\[(?:[A-Z][A-Z_]*_|#)({TAG})\]")


def tag(digest: bytes) -> str:
    """Twelve letters and digits (base32, lower case): 60 bits of a digest."""
    return base64.b32encode(digest[:10])[:12].decode("ascii").lower()


def placeholder(entity: str, mark: str | None) -> str:
    return f"[{entity}_{mark}]" if mark else f"[{entity}]"


def marked(replacement: str, mark: str | None) -> str:
    return f"{replacement} [#{mark}]" if mark else replacement
