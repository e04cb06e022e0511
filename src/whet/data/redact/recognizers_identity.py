"""Numbers that states give to people: social security, tax, passports, licences; and those of vehicles and devices."""

from __future__ import annotations

import re

from whet.data.redact import recognizers_checks as checks
from whet.data.redact.recognizers import NEAR, OTHER_BEFORE, Labelled, Shape

RECOGNIZERS = (
    Shape("SSN", re.compile(r"([0-9](?<![0-9a-z.\-][0-9])[0-9]{2}(?:-[0-9]{2}-| [0-9]{2} )[0-9]{4})(?![0-9a-z]|"
        r"[\- .][0-9])"), 0.86, check=checks.ssn, unless=OTHER_BEFORE),
    Shape("TAX_ID", re.compile(r"(9(?<![0-9a-z.\-]9)[0-9]{2}-[0-9]{2}-[0-9]{4})(?![0-9a-z]|-[0-9])"), 0.86,
    check=checks.itin, unless=OTHER_BEFORE),
    Shape("TAX_ID",
        re.compile(r"[A-Z](?<![A-Za-z0-9\-][A-Z])[A-Z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D](?![A-Za-z0-9])"), 0.9,
            check=checks.nino, cased=True),
    Shape("TAX_ID", re.compile(r"([0-9](?<![0-9a-z.\-/][0-9])[0-9] [0-9]{3} [0-9]{3} [0-9]{3})(?![0-9a-z]|"
        r"[ .,\-][0-9])"), 0.85, check=checks.steuer_id, unless=OTHER_BEFORE),
    Shape("TAX_ID", re.compile(r"[1-478](?<![0-9a-z.\-][0-9])[ .]?[0-9]{2}[ .]?[0-9]{2}[ .]?(?:[0-9]{2}|"
        r"2[ab])[ .]?[0-9]{3}[ .]?[0-9]{3}[ .]?[0-9]{2}(?![0-9a-z])"), 0.84, check=checks.nir),
    Shape("TAX_ID",
        re.compile(r"[0-9XYZ](?<![A-Za-z0-9.\-][0-9XYZ])-?[0-9]{7}[\- ]?[A-Z](?![A-Za-z0-9]|-[A-Za-z0-9])"), 0.88,
            check=checks.nif, cased=True, unless=OTHER_BEFORE),
    Shape("TAX_ID", re.compile(r"[0-9](?<![A-Za-z0-9.\-][0-9])[0-9]\.[0-9]{3}\.[0-9]{3}[\- ]?[A-Z](?![A-Za-z0-9])"),
    0.9, check=checks.nif, cased=True),
    Shape("SSN", re.compile(r"[0-9](?<![0-9a-z.\-][0-9])[0-9] ?(?:[0-2][0-9]|3[01]|[5-7][0-9]|8[01])(?:0[1-9]|"
        r"1[0-2])[0-9]{2} ?[a-z] ?[0-9]{3}(?![0-9a-z])"), 0.84),
    Shape("DRIVER_LICENSE", re.compile(
        r"[A-Z9](?<![A-Z0-9][A-Z9])[A-Z9]{4}[0-9][0156][0-9][0-3][0-9]{2}[A-Z9]{2}[0-9A-Z][A-Z]{2}(?![A-Za-z0-9])"),
        0.85, cased=True),
    Shape("PASSPORT", re.compile(r"(?<![A-Z0-9<])P[A-Z<][A-Z]{3}[A-Z<]{39}\s{1,2}[A-Z0-9<]{44}(?![A-Z0-9<])"), 0.97,
    cased=True, hints=("<<",)),
    Shape("VIN", re.compile(r"[A-HJ-NPR-Z0-9](?<![A-Za-z0-9\-][A-Z0-9])[A-HJ-NPR-Z0-9]{16}(?![A-Za-z0-9\-])"), 0.95,
    check=checks.vin, cased=True),
    Shape("DEVICE", re.compile(r"\(01\)\s?[0-9]{14}(?:\s?\((?:11|13|15|17)\)\s?[0-9]{6}|\s?\((?:10|21|"
        r"240)\)\s?[a-z0-9\-/.]{1,20}){0,5}"), 0.96, hints=("(01)",)),
    Shape("DEVICE", re.compile(r"[0-9](?<![0-9a-z\-][0-9])[0-9][\- ][0-9]{6}[\- ][0-9]{6}[\- ][0-9](?![0-9a-z\-])"),
    0.93, check=checks.imei),
)  # fmt: skip

MIXED = r"(?=[a-z\-]{0,12}[0-9])"  # at least one digit near the front
PLATE = (
    r"(?:[a-z]{1,3}[\- ][a-z]{1,2}[\- ]?[0-9]{1,4}[eh]?|[a-z]{2}[0-9]{2} ?[a-z]{3}|"
    r"[a-z]{2}[\- ]?[0-9]{3}[\- ]?[a-z]{2}|"
    r"[0-9]{4}[\- ]?[a-z]{3}|[a-z]{1,2}[\- ]?[0-9]{4}[\- ]?[a-z]{1,2}|[a-z]{1,3}[\- ]?[0-9]{1,4}[\- ]?[a-z]{0,3}|"
    r"[0-9]{1,3}[\- ]?[a-z]{2,3}(?:[\- ]?[0-9]{1,3})?|[0-9][a-z]{3}[0-9]{3}|[a-z]{2}[0-9]{2} [a-z]{2}|"
    r"[0-9][a-z]{2}[0-9]{4})"
)
BY_WORD = (
    Labelled("SSN", ("ssn", "social security", "social security number", "ss#", "social sec", "soc sec", "ss number"),
        r"(?:[0-9]{3}[\-. ]?[0-9]{2}[\-. ]?[0-9]{4}|(?:[x*]{3}[\- ]?[x*]{2}[\- ]?)?[0-9]{4})", 0.9),
    Labelled("SSN", ("sozialversicherungsnummer", "sv-nummer", "sozialversicherungsnr", "rentenversicherungsnummer",
        "svnr", "versicherungsnummer der rentenversicherung"), r"[0-9]{2} ?[0-9]{6} ?[a-z] ?[0-9]{3}", 0.9),
    Labelled("TAX_ID", ("itin", "ein", "fein", "tin", "tax id", "taxpayer id", "taxpayer identification",
        "tax identification", "federal tax id", "employer identification", "employer id",
        "employer identification number"), r"[0-9]{2}-?[0-9]{7}|9[0-9]{2}[\- ]?[0-9]{2}[\- ]?[0-9]{4}|"
            r"[0-9]{3}-[0-9]{2}-[0-9]{4}", 0.87),
    Labelled("TAX_ID", ("national insurance", "nino", "ni number", "ni no", "nat ins"),
        r"[a-z]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[a-z]", 0.9),
    Labelled("TAX_ID", ("utr", "unique taxpayer reference"), r"[0-9]{5} ?[0-9]{5}", 0.85),
    Labelled("TAX_ID", ("steuer-id", "steuer id", "steuerid", "steuer-identifikationsnummer",
        "steueridentifikationsnummer", "identifikationsnummer", "idnr", "steuer-idnr",
        "steuerliche identifikationsnummer", "tin"), r"[0-9]{2}[ /]?[0-9]{3}[ /]?[0-9]{3}[ /]?[0-9]{3}", 0.88,
        check=checks.steuer_id),
    Labelled("TAX_ID", ("steuernummer", "steuer-nr", "st.-nr", "steuer nr"), r"[0-9]{2,3}[/ ]?[0-9]{3}[/ ]?[0-9]{4,5}",
        0.88),
    Labelled("TAX_ID", ("vat", "vat id", "vat reg", "ust-idnr", "ust-id", "umsatzsteuer-id", "tva",
        "tva intracommunautaire", "nif-iva", "iva"), r"(?:de ?[0-9]{9}|fr ?[a-z0-9]{2} ?[0-9]{9}|"
            r"es ?[a-z0-9][0-9]{7}[a-z0-9]|gb ?[0-9]{3} ?[0-9]{4} ?[0-9]{2})", 0.85),
    Labelled("TAX_ID", ("nir", "numéro de sécurité sociale", "n° de sécurité sociale", "sécurité sociale", "n° sécu",
        "numéro de sécu", "insee", "n° ss", "sécu", "numéro ss"), r"[1-478][ .]?[0-9]{2}[ .]?[0-9]{2}[ .]?(?:[0-9]{2}|"
            r"2[ab])[ .]?[0-9]{3}[ .]?[0-9]{3}(?:[ ./\-]{0,3}[0-9]{2})?", 0.9),
    Labelled("TAX_ID", ("numéro fiscal", "n° fiscal", "identifiant fiscal", "spi", "référence fiscale"),
        r"[0-3][0-9] ?[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}", 0.88),
    Labelled("TAX_ID", ("nif", "dni", "nie", "dni/nif", "nif/nie", "documento nacional de identidad",
        "identificación fiscal", "documento"), r"(?:[0-9]{1,2}\.?[0-9]{3}\.?[0-9]{3}|[xyz][\- ]?[0-9]{7})[\- ]?[a-z]",
        0.9),
    Labelled("TAX_ID", ("cif", "nif"), r"[a-hjnp-suvw][\- ]?[0-9]{7}[0-9a-j]", 0.85),
    Labelled("PASSPORT", ("passport", "passport number", "pass-nr", "passnummer", "reisepass", "reisepassnummer",
        "reisepass-nr", "passeport", "numéro de passeport", "pasaporte", "número de pasaporte", "personalausweis",
        "personalausweisnummer", "ausweisnummer", "ausweis-nr", "carte d'identité", "carte nationale d'identité",
        "cni", "identity card", "national id", "id card", "travel document"),
        rf"{MIXED}(?=(?:[a-z]{{0,8}}[0-9]){{2}})[a-z0-9]{{7,12}}", 0.87),
    Labelled("DRIVER_LICENSE", ("driver's license", "drivers license", "driver license", "driver's licence",
        "drivers licence", "driving licence", "driving license", "dl", "dl#", "führerschein", "führerscheins",
        "führerscheinnummer", "führerschein-nr", "fahrerlaubnis", "permis de conduire", "n° de permis",
        "numéro de permis", "permiso de conducir", "carnet de conducir", "licencia de conducir", "permis"),
            r"(?=[a-z]{0,6}[\- ]?[0-9])(?:[a-z][0-9]{3}-[0-9]{4}-[0-9]{4}|[a-z][0-9]{2}-[0-9]{2}-[0-9]{4}|"
            r"[a-z][0-9]{3}-[0-9]{3}-[0-9]{2}-[0-9]{3}-[0-9]|[a-z][0-9]{3}(?: [0-9]{3}){2,3}|[0-9]{2} [0-9]{3} "
            r"[0-9]{3}|[a-z0-9]{2,4}-[a-z0-9]{2,6}-[a-z0-9]{2,6}(?:-[a-z0-9]{1,4})?|[0-9]{8}-?[a-z]|[a-z0-9]{5,20})",
            0.87),
    Labelled("LICENSE", ("medical license", "medical licence", "license number", "license no", "license #",
        "licence number", "licence no", "lic no", "lic #", "nursing license", "rn license", "state license",
        "professional license", "certificate number", "certificate no", "certification number", "cert no",
        "bar number", "bar no", "state bar", "gmc", "gmc number", "nmc pin", "approbation", "approbationsnummer",
        "zulassungsnummer", "lanr", "arztnummer", "lebenslange arztnummer", "zertifikatsnummer", "zertifikat", "rpps",
        "numéro rpps", "adeli", "n° de certificat", "numéro de certificat", "numéro de licence", "colegiado",
        "número de colegiado", "n.º colegiado", "num colegiado", "certificado", "número de certificado",
        "número de licencia"), r"(?=[a-z.\-]{0,8}[0-9])(?=[a-z\-./]{0,8}(?:[0-9][a-z\-./]{0,4}){4})[a-z0-9]"
            r"(?:[\-./]?[a-z0-9]){3,17}", 0.84),
    Labelled("LICENSE", ("certificat", "certificado", "zertifikat", "licencia", "licence", "colegiado", "certificate",
        "license"), r"(?=[a-z.\-]{0,8}[0-9])(?=[a-z\-./]{0,8}(?:[0-9][a-z\-./]{0,4}){4})[a-z0-9]"
            r"(?:[\-./]?[a-z0-9]){3,17}", 0.8, gap=NEAR),
    Labelled("PLATE", ("license plate", "licence plate", "plate", "plates", "number plate", "registration plate",
        "vehicle registration", "registration", "reg", "vehicle reg", "car reg", "reg plate", "reg no", "vrm", "vrn",
        "tag number", "license tag", "kennzeichen", "kfz-kennzeichen", "nummernschild", "amtliches kennzeichen",
        "autokennzeichen", "immatriculation", "immatriculé", "immatriculée", "plaque", "plaque d'immatriculation",
        "matrícula", "matriculado", "placa", "numéro d'immatriculation"), PLATE, 0.86, gap=NEAR, lazy=True),
    Labelled("PLATE", ("auto", "wagen", "fahrzeug", "pkw", "vehicle", "car", "van", "truck", "voiture", "véhicule",
        "coche", "vehículo", "moto"), r"(?:[a-z]{1,3}-[a-z]{1,2} ?[0-9]{1,4}[eh]?|[a-z]{2}[0-9]{2} [a-z]{3}|"
            r"[a-z]{2}-[0-9]{3}-[a-z]{2}|[0-9]{4} [a-z]{3})", 0.72, gap=NEAR, lazy=True),
    Labelled("VIN", ("vin", "vehicle identification", "vehicle identification number", "fin", "fahrgestellnummer",
        "fahrzeug-identifizierungsnummer", "fahrzeugidentifizierungsnummer", "châssis", "numéro de châssis",
        "numéro de série du véhicule", "bastidor", "número de bastidor", "chassis"),
        r"(?=[a-z]{0,16}[0-9])[a-hj-npr-z0-9]{17}", 0.92),
    Labelled("DEVICE", ("serial", "serial number", "serial no", "ser no", "s/n", "sn", "device id",
        "device identifier", "device serial", "imei", "meid", "udi", "pacemaker serial", "implant serial",
        "seriennummer", "serien-nr", "seriennr", "gerätenummer", "geräte-nr", "geräte-id", "numéro de série",
        "n° de série", "n° série", "série", "serie", "identifiant de l'appareil", "número de serie", "n.º de serie",
        "núm. de serie", "num serie", "nº serie", "id del dispositivo"), r"(?=[a-z\-./]{0,12}[0-9])(?=[a-z\-./]{0,12}"
            r"(?:[0-9][a-z\-./]{0,8}){3})[a-z0-9](?:[\-./]?[a-z0-9]){4,23}", 0.86),
    Labelled("DEVICE", ("imei",), r"[0-9]{2}[\- ]?[0-9]{6}[\- ]?[0-9]{6}[\- ]?[0-9]", 0.92),
)  # fmt: skip
