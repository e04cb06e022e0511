"""The classes of personal and controlled data that whet looks for.

`safe_harbor` is the letter of the identifier in 45 CFR 164.514(b)(2)(i), the HIPAA Safe Harbor list: (A) names,
(B) places smaller than a state, (C) dates and ages over 89, (D) telephone, (E) fax, (F) e-mail, (G) social security,
(H) medical records, (I) health plans, (J) accounts, (K) certificates and licences, (L) vehicles, (M) devices, (N) URLs,
(O) IP addresses, (R) any other unique number. (P) biometrics and (Q) photographs are no text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entity:
    """patterned: its form or its label gives it away. The others need a model that knows names."""

    name: str
    description: str
    patterned: bool = True
    safe_harbor: str | None = None


ENTITIES: dict[str, Entity] = {
    entity.name: entity
    for entity in (
        Entity("PERSON", "names of people", patterned=False, safe_harbor="A"),
        Entity("LOCATION", "cities and other places smaller than a state", patterned=False, safe_harbor="B"),
        Entity(
            "ADDRESS", "streets with house numbers, post boxes, European postcodes with their town", safe_harbor="B"
        ),
        Entity("ZIP", "US ZIP codes, five or nine digits", safe_harbor="B"),
        Entity("DATE", "dates finer than a year, with the time attached to them", safe_harbor="C"),
        Entity("AGE", "ages of 90 and over", safe_harbor="C"),
        Entity("PHONE", "telephone numbers", safe_harbor="D"),
        Entity("FAX", "fax numbers", safe_harbor="E"),
        Entity("EMAIL", "e-mail addresses", safe_harbor="F"),
        Entity("URL", "web addresses and connection strings", safe_harbor="N"),
        Entity("IP", "IPv4 and IPv6 addresses", safe_harbor="O"),
        Entity("MAC", "network hardware addresses", safe_harbor="M"),
        Entity("SSN", "social security numbers (US; Germany by label)", safe_harbor="G"),
        Entity("TAX_ID", "ITIN, EIN, NINO, Steuer-ID, NIR, NIF and the like", safe_harbor="R"),
        Entity("PASSPORT", "passport and identity card numbers", safe_harbor="K"),
        Entity("DRIVER_LICENSE", "driving licence numbers", safe_harbor="K"),
        Entity("LICENSE", "professional licences and certificates", safe_harbor="K"),
        Entity("MRN", "medical record and patient numbers", safe_harbor="H"),
        Entity("HEALTH_PLAN", "health plan and insurance numbers", safe_harbor="I"),
        Entity("NPI", "US national provider identifiers", safe_harbor="R"),
        Entity("DEA", "US DEA registrations of prescribers", safe_harbor="K"),
        Entity("ACCOUNT", "account and customer numbers", safe_harbor="J"),
        Entity("ROUTING", "bank codes: ABA routing number, sort code, Bankleitzahl", safe_harbor="J"),
        Entity("IBAN", "international bank account numbers", safe_harbor="J"),
        Entity("SWIFT", "bank identifier codes (BIC)", safe_harbor="J"),
        Entity("CARD", "payment card numbers", safe_harbor="J"),
        Entity("PLATE", "vehicle licence plates", safe_harbor="L"),
        Entity("VIN", "vehicle identification numbers", safe_harbor="L"),
        Entity("DEVICE", "serial numbers, IMEI and UDI of devices", safe_harbor="M"),
        Entity("CAGE", "CAGE and NCAGE codes of suppliers"),
        Entity("UEI", "unique entity identifiers of SAM.gov"),
        Entity("CONTRACT", "US defense contract numbers (PIID)"),
        Entity("MARKING", "CUI, classification and export-control markings"),
        Entity("API_KEY", "API keys, tokens and passwords", safe_harbor="R"),
        Entity("PRIVATE_KEY", "private keys in PEM form", safe_harbor="R"),
    )
}
