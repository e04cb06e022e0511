"""Countries whose national phone numbers are read: ISO 3166 codes, as `phonenumbers` knows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from whet.errors import WhetError

REGIONS = ("US", "GB", "DE", "FR", "ES")
"""Those of a policy that names none."""

INSTEAD = {"UK": "GB", "EN": "GB", "EL": "GR", "False": "NO"}
"""Codes that people write, and what they mean. YAML reads a bare NO as false."""


def check_regions(regions: Iterable[Any], where: str) -> list[WhetError]:
    """A fault for each that is no region, with all that there are. Raises WhetError without the library."""
    try:
        from phonenumbers import SUPPORTED_REGIONS
    except ModuleNotFoundError as error:
        fix = 'pip install "whet[redact]"'
        raise WhetError("finding phone numbers needs phonenumbers", where=where, fix=fix) from error
    faults = []
    for region in regions:
        if not isinstance(region, str) or region not in SUPPORTED_REGIONS:
            meant = INSTEAD.get(str(region), str(region).upper())
            fix = f'write "{meant}"; ' if meant in SUPPORTED_REGIONS else ""
            fix += f"there are {', '.join(sorted(SUPPORTED_REGIONS))}"
            faults.append(WhetError(f"{region!r} is no region of phone numbers", where=where, fix=fix))
    return faults
