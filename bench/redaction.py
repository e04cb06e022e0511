"""whet's finder and Presidio's AnalyzerEngine on the same labelled documents, on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python bench/redaction.py --out bench/results/redaction.jsonl --run-id ID [--seed N]

Accuracy: recall and precision by class, by the rules in redaction_scoring.py, on documents of redaction_documents.py.
Without --seed it is taken from the clock, at least 1000: seeds below were used while the rules were written.
Speed: documents of 500 characters a second, cut from the same documents, all classes on, one process; the median of
ROUNDS rounds in which the engines take turns.

Presidio runs its default recognizers, as its registry loads them for each document's language where it supports that
one and for English otherwise, over a blank spaCy pipeline, as no model can be had offline: it finds no names or places
then, and PERSON and LOCATION are not comparable. Its classes are counted for whichever of whet's they can mean
(PRESIDIO), so that a telephone number counts for a FAX. One JSON line an engine and class, one an engine for speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from environment import origin
from redaction_documents import LabelledDocument, documents
from redaction_scoring import Found, score

from whet.data.redact.entities import ENTITIES
from whet.data.redact.find import Finder

FIRST_FRESH_SEED = 1000
CHARACTERS = 500
SPEED_DOCUMENTS = 400
ROUNDS = 5
TARGETS = {"recall": 0.995, "precision": 0.97}

PRESIDIO: dict[str, tuple[str, ...]] = {
    "PERSON": ("PERSON",), "LOCATION": ("LOCATION", "ADDRESS"), "DATE_TIME": ("DATE",), "EMAIL_ADDRESS": ("EMAIL",),
    "URL": ("URL",),
    "IP_ADDRESS": ("IP",), "MAC_ADDRESS": ("MAC",), "PHONE_NUMBER": ("PHONE", "FAX"), "CREDIT_CARD": ("CARD",),
    "IBAN_CODE": ("IBAN",),
    "US_SSN": ("SSN",), "US_ITIN": ("TAX_ID",), "UK_NINO": ("TAX_ID",), "ES_NIF": ("TAX_ID",), "ES_NIE": ("TAX_ID",),
    "DE_TAX_ID": ("TAX_ID",),
    "DE_TAX_NUMBER": ("TAX_ID",), "DE_VAT_ID": ("TAX_ID",), "DE_SOCIAL_SECURITY": ("SSN",), "US_PASSPORT": ("PASSPORT",
    ), "UK_PASSPORT": ("PASSPORT",),
    "ES_PASSPORT": ("PASSPORT",), "DE_PASSPORT": ("PASSPORT",), "DE_ID_CARD": ("PASSPORT",),
    "US_DRIVER_LICENSE": ("DRIVER_LICENSE",),
    "UK_DRIVING_LICENCE": ("DRIVER_LICENSE",), "DE_FUEHRERSCHEIN": ("DRIVER_LICENSE",), "MEDICAL_LICENSE": ("DEA",
    "LICENSE"), "DE_LANR": ("LICENSE",),
    "UK_NHS": ("MRN",), "US_NPI": ("NPI",), "US_MBI": ("HEALTH_PLAN",), "DE_HEALTH_INSURANCE": ("HEALTH_PLAN",),
    "US_BANK_NUMBER": ("ACCOUNT",),
    "ABA_ROUTING_NUMBER": ("ROUTING",), "UK_POSTCODE": ("ADDRESS",), "DE_PLZ": ("ADDRESS",),
    "UK_VEHICLE_REGISTRATION": ("PLATE",), "DE_KFZ": ("PLATE",),
}  # fmt: skip

Engine = Callable[[LabelledDocument], list[Found]]


def whet_engine() -> Engine:
    finder = Finder(ENTITIES)

    def find(document: LabelledDocument) -> list[Found]:
        return [(span.start, span.end, frozenset([span.entity])) for span in finder.find([document.text])[0]]

    return find


def presidio_engine() -> Engine:
    import spacy
    import tldextract
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine

    tldextract.tldextract.TLD_EXTRACTOR.suffix_list_urls = ()  # else it asks the network for the list

    class Blank(SpacyNlpEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(ner_model_configuration=NerModelConfiguration())
            self.nlp = {language: spacy.blank(language) for language in ("en", "de", "fr", "es")}

    languages = ["en", "de", "fr", "es"]
    nlp_engine = Blank()
    registry = RecognizerRegistry(supported_languages=languages)
    registry.load_predefined_recognizers(languages=languages, nlp_engine=nlp_engine)
    engine = AnalyzerEngine(registry=registry, nlp_engine=nlp_engine, supported_languages=languages)

    def find(document: LabelledDocument) -> list[Found]:
        results = engine.analyze(document.text, language=document.locale[:2])
        return [
            (found.start, found.end, frozenset(PRESIDIO.get(found.entity_type, (found.entity_type,))))
            for found in results
        ]

    return find


def replacing() -> dict[str, Engine]:
    """whet's whole redaction of a text, for the speed alone: found, replaced, and searched again until nothing is."""
    from whet.data.redact.policy import load_policy
    from whet.data.redact.redactor import Redactor

    redactor = Redactor(load_policy("hipaa-safe-harbor", Path()))

    def replace(document: LabelledDocument) -> list[Found]:
        redactor.row([document.text])
        return []

    return {"whet, replaced (hipaa-safe-harbor)": replace}


def accuracy_lines(name: str, engine: Engine, labelled: Sequence[LabelledDocument]) -> list[dict[str, Any]]:
    scores = score((document, engine(document)) for document in labelled)
    return [
        {
            "kind": "redaction",
            "engine": name,
            "entity": entity,
            "patterned": ENTITIES[entity].patterned,
            **scores[entity].as_json(),
        }
        for entity in ENTITIES
        if entity in scores
    ]


def pieces(labelled: Sequence[LabelledDocument]) -> list[LabelledDocument]:
    """Documents of CHARACTERS characters, cut from those of each locale one after the other."""
    cut = []
    for locale in sorted({document.locale for document in labelled}):
        text = "\n\n".join(document.text for document in labelled if document.locale == locale)
        for start in range(0, len(text) - CHARACTERS, CHARACTERS):
            cut.append(LabelledDocument(text[start : start + CHARACTERS], [], locale, "piece"))
    return cut[:: max(1, len(cut) // SPEED_DOCUMENTS)][:SPEED_DOCUMENTS]


def speed_lines(engines: dict[str, Engine], labelled: Sequence[LabelledDocument]) -> list[dict[str, Any]]:
    """By wall clock and by processor time, which other work on the machine does not lengthen."""
    cut = pieces(labelled)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            wall, processor = time.perf_counter(), time.process_time()
            for document in cut:
                engine(document)
            rates[name].append((len(cut) / (time.perf_counter() - wall), len(cut) / (time.process_time() - processor)))
    return [
        {
            "kind": "redaction_speed", "engine": name, "documents": len(cut), "characters": CHARACTERS,
            "rounds": ROUNDS,
            "cores": 1,
            "documents_s": round(statistics.median(wall for wall, _ in rate), 1),
            "documents_processor_s": round(statistics.median(processor for _, processor in rate), 1),
        }
        for name, rate in rates.items()
    ]  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The accuracy lines side by side, then the speeds."""
    by_engine = {(line["engine"], line["entity"]): line for line in lines if line["kind"] == "redaction"}
    engines = list(dict.fromkeys(line["engine"] for line in lines))
    rows = [
        "class            labels "
        + "".join(f"{name + ' recall':>18}{'redacted':>10}{'precision':>11}" for name in engines)
    ]
    for entity in ENTITIES:
        shown = [by_engine.get((name, entity)) for name in engines]
        if any(shown):
            labels = next(line["labels"] for line in shown if line)
            cells = "".join(_cells(line) for line in shown)
            rows.append(f"{entity:<16}{labels:>7} {cells}" + ("" if ENTITIES[entity].patterned else "  no pattern"))
    for line in lines:
        if line["kind"] == "redaction_speed":
            rows.append(
                f"{line['engine']}: {line['documents_s']} documents of {line['characters']} characters a second"
            )
    return "\n".join(rows)


def _cells(line: dict[str, Any] | None) -> str:
    values = [line[key] if line else None for key in ("recall", "redacted_share", "precision")]
    return "".join(
        f"{'-' if value is None else f'{value:.4f}':>{width}}"
        for value, width in zip(values, (18, 10, 11), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder whose redaction.jsonl and redaction_speed.jsonl get the lines")
    parser.add_argument("--run-id", default="run")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--engines", nargs="+", choices=("whet", "presidio"), default=("whet", "presidio"))
    arguments = parser.parse_args()
    seed = FIRST_FRESH_SEED + time.time_ns() % 10**9 if arguments.seed is None else arguments.seed
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    labelled = list(documents(arguments.count, seed))
    makers = {"whet": whet_engine, "presidio": presidio_engine}
    engines = {name: makers[name]() for name in arguments.engines}
    lines = [line for name, engine in engines.items() for line in accuracy_lines(name, engine, labelled)]
    lines += speed_lines(engines | replacing(), labelled)
    print(f"{len(labelled)} documents, seed {seed}\n{table(lines)}")
    if arguments.out is not None:
        about = {"run_id": arguments.run_id, "seed": seed, "all_documents": len(labelled), **_origin()}
        for kind in ("redaction", "redaction_speed"):
            with open(arguments.out / f"{kind}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line | about) + "\n" for line in lines if line["kind"] == kind)


def _origin() -> dict[str, Any]:
    full = origin("presidio-analyzer", "spacy", "phonenumbers", "Faker", "regex")
    full["versions"] = {
        name: full["versions"][name]
        for name in ("python", "presidio-analyzer", "spacy", "phonenumbers", "Faker")
        if name in full["versions"]
    }
    return full


if __name__ == "__main__":
    main()
