"""Identifiers and markings of US defense work: CAGE, UEI, contract numbers, CUI and classification banners.

Sources: FAR 4.16 (contract numbers), FAR 52.204-16 (CAGE), SAM.gov (UEI), 32 CFR 2002.20 (CUI markings).
"""

from __future__ import annotations

import re

from whet.data.redact.recognizers import Labelled, Shape

LEVEL = r"(?:TOP SECRET|SECRET|CONFIDENTIAL|UNCLASSIFIED|TS|S|C|U)"
BLOCKS = r"//[A-Z0-9 /\-,]{0,80}(?<![ ,])"
BANNER = re.compile(
    rf"(?<![A-Za-z0-9])(?:(?:CUI|CONTROLLED|{LEVEL}){BLOCKS}|FOR OFFICIAL USE ONLY|FOUO|NOFORN|"
    r"NOT RELEASABLE TO FOREIGN NATIONALS|CONTROLLED UNCLASSIFIED INFORMATION|EXPORT[ -]CONTROLLED|"
    r"ITAR[ -](?:CONTROLLED|RESTRICTED)(?: (?:TECHNICAL DATA|DATA|INFORMATION))?|LAW ENFORCEMENT SENSITIVE|"
    r"SENSITIVE BUT UNCLASSIFIED|LIMDIS|ORCON|REL TO [A-Z]{3,4}(?:, ?[A-Z]{3,4}){0,12})(?![A-Za-z0-9])"
)
PORTION = re.compile(r"\((?:CUI|FOUO|(?:CUI|U|C|S|TS)//[A-Z0-9 /\-,]{1,40})\)(?= ?[A-Z(])")
LINE = re.compile(
    r"^[ \t*#\-]{0,8}(CUI|SECRET|TOP SECRET|CONFIDENTIAL|CONTROLLED|UNCLASSIFIED)[ \t*#\-]{0,8}$", re.MULTILINE
)
STATEMENT = re.compile(r"(?i:distribution statement [a-f](?![a-z]))|(?<![A-Z])DIST(?:RO)? (?:STMT )?[A-F](?![A-Za-z])")

CONTRACT = r"[a-z][a-z0-9]{5}-[0-9]{2}-[a-hj-np-z]-[a-z0-9]{4}(?:-[a-z0-9]{4})?"
PIID = r"(?=[a-z0-9]*[0-9][a-z0-9]*[0-9])[a-z][a-z0-9]{5}[- ]?[0-9]{2}[- ]?[a-hj-np-z][- ]?[a-z0-9]{4}"


def _marking(pattern: re.Pattern[str], score: float, *hints: str) -> Shape:
    return Shape("MARKING", pattern, score, hints=hints, cased=True, digits=False)


BANNER_HINTS = (
    "//",
    "fouo",
    "noforn",
    "official use",
    "controlled",
    "restricted",
    "rel to",
    "limdis",
    "orcon",
    "releasable",
    "sensitive",
)

RECOGNIZERS = (
    _marking(BANNER, 0.95, *BANNER_HINTS),
    _marking(PORTION, 0.6, "(cui", "(u", "(c", "(s", "(ts", "(fouo"),
    _marking(LINE, 0.7, "cui", "secret", "confidential", "controlled", "unclassified"),
    _marking(STATEMENT, 0.9, "dist"),
    Shape("CONTRACT", re.compile(rf"(?<![a-z0-9\-]){CONTRACT}(?![a-z0-9\-])"), 0.93,
    needs=re.compile("-[0-9]{2}-[a-z]-")),
)  # fmt: skip
BY_WORD = (
    Labelled("CAGE", ("cage", "ncage", "cage code", "ncage code"), r"(?=[a-z0-9]{0,4}[0-9])[a-hj-np-z0-9]{5}", 0.88),
    Labelled("UEI", ("uei", "unique entity id", "unique entity identifier", "sam uei"),
        r"(?=[a-z0-9]{0,11}[0-9])[a-hj-np-z1-9][a-hj-np-z0-9]{11}", 0.9),
    Labelled("CONTRACT", ("contract", "piid", "task order", "delivery order", "prime contract", "contract award",
        "subcontract under"), PIID, 0.9),
)  # fmt: skip
