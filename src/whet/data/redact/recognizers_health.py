"""Medical records, health plans, and those who treat."""

from __future__ import annotations

import re

from whet.data.redact import recognizers_checks as checks
from whet.data.redact.recognizers import Labelled, Shape

LETTER, EITHER = "[ac-hj-km-np-rt-y]", "[ac-hj-km-np-rt-y0-9]"
MBI = rf"[1-9]{LETTER}{EITHER}[0-9]-?{LETTER}{EITHER}[0-9]-?{LETTER}{{2}}[0-9]{{2}}"
NUMBER = r"(?=[a-z\-/]{0,8}[0-9])(?=[a-z\-/.]{0,8}(?:[0-9][ \-/.a-z]{0,3}){3})[a-z0-9](?:[\-/.]?[a-z0-9]){3,17}"

RECOGNIZERS = (
    Shape("HEALTH_PLAN", re.compile(rf"(?<![a-z0-9\-]){MBI}(?![a-z0-9\-])"), 0.9),
    Shape(
        "DEA",
        re.compile(r"(?<![a-z0-9\-])[abcdefghjklmprstux][a-z9][0-9]{7}(?![a-z0-9\-])"),
        0.6,
        check=checks.dea,
        needs=re.compile("[0-9]{7}"),
    ),
)
BY_WORD = (
    Labelled("MRN", (
        "mrn", "medical record", "medical record number", "med rec", "patient id", "patient no", "patient number",
        "patient identifier",
        "chart number", "chart no", "hospital number", "hospital no", "hosp no", "unit number", "encounter number",
        "encounter id", "nhs number",
        "nhs no", "nhs", "patientennummer", "patienten-nr", "patienten-id", "pat-nr", "pat.-nr", "fallnummer",
        "fall-nr", "krankenaktennummer",
        "aufnahmenummer", "krankenakte", "patientenakte", "numéro de dossier", "n° de dossier", "dossier médical",
        "dossier patient", "n° dossier", "ipp", "numéro patient",
        "n° patient", "historia clínica", "número de historia", "n.º de historia", "nº de historia", "nhc",
        "nº historia", "expediente médico",
        "id de paciente", "id del paciente", "número de paciente",
    ), NUMBER + r"|[0-9]{3}[ \-][0-9]{3}[ \-][0-9]{4}|[0-9]{2,3}(?: [0-9]{2,3}){1,3}", 0.86),
    Labelled("HEALTH_PLAN", (
        "health plan", "health plan id", "member id", "member number", "member no", "policy number", "policy no",
        "policy #", "insurance policy", "policy id",
        "subscriber id", "subscriber number", "beneficiary id", "beneficiary number", "group number", "group no",
        "medicare", "medicare number",
        "medicaid", "medicaid id", "mbi", "hicn", "insurance id", "insurance number", "insurance no",
        "health insurance", "versichertennummer",
        "versicherten-nr", "krankenversichertennummer", "kvnr", "kv-nummer", "versicherungsnummer", "versichertennr",
        "police", "policennummer", "versicherungsschein",
        "numéro d'adhérent", "n° d'adhérent", "n° adhérent", "adhérent", "mutuelle", "numéro d'assuré", "n° assuré",
        "assuré", "assurée", "d'assuré", "contrat mutuelle", "tarjeta sanitaria",
        "número de póliza", "n.º de póliza", "nº de póliza", "póliza", "número de asegurado", "n.º de asegurado",
        "cip", "seguro médico",
        "número de afiliación", "seguridad social", "nuss",
    ), NUMBER + rf"|{MBI}|[0-9]{{3}} ?[0-9]{{3}} ?[0-9]{{3}}|[0-9]{{2}}[ /][0-9]{{8}}[ /][0-9]{{2}}", 0.85),
    Labelled("HEALTH_PLAN", ("kvnr", "versichertennummer", "krankenversichertennummer", "versicherten-nr"),
        r"[a-z] ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}", 0.9, check=checks.kvnr),
    Labelled("NPI", ("npi", "national provider", "national provider identifier", "npi number", "provider npi"),
        r"[12][0-9]{3}[ \-]?[0-9]{3}[ \-]?[0-9]{3}", 0.9, check=checks.npi),
    Labelled("DEA", ("dea", "dea number", "dea registration", "dea no"), r"[abcdefghjklmprstux][a-z9]-?[0-9]{7}", 0.9,
        check=checks.dea),
)  # fmt: skip
