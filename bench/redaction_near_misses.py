"""Numbers and words that look like personal data and are none: order numbers, versions, years, wrong check digits."""

from __future__ import annotations

from collections.abc import Callable

from redaction_numbers import luhn_digit
from redaction_values import HEX, YOUNG, Maker, clock_time


def _point(m: Maker) -> str:
    return "." if m.language == "en" else ","


def _price(m: Maker) -> str:
    amount = m.rng.randrange(1, 9999)
    if m.country == "US":
        return f"${amount:,}.{m.shape('##')}"
    if m.country == "GB":
        return f"£{amount}.{m.shape('##')}"
    return f"{amount}{m.pick('.', ',')}{m.shape('##')} {m.pick('€', 'EUR', 'Euro')}"


def _bad_card(m: Maker) -> str:
    body = "4" + m.shape("##############")
    return body + str((int(luhn_digit(body)) + m.rng.randrange(1, 10)) % 10)


NEAR_MISSES: dict[str, Callable[[Maker], str]] = {
    "ticket_no": lambda m: m.shape(m.pick("%#####", "%#########", "INC%######", "%####-##")),
    "order_no": lambda m: m.pick(m.shape("%#########"), m.shape("%##-%######-%######"), m.shape("ORD-%#######"),
    _bad_card(m), m.shape("SO%#####")),
    "invoice_no": lambda m: m.shape(m.pick("INV-20##-####", "20##/%###", "%#######", "F%#####", "%########")),
    "part_no": lambda m: m.shape(m.pick("%########", "%##-%####-##", "??-####-#", "%####-%###")),
    "ref_no": lambda m: m.shape(m.pick("??/####/##", "REF%#######", "20##-%####", "%####.%##")),
    "lot_no": lambda m: m.shape(m.pick("L%####", "%#####-?")),
    "tracking": lambda m: m.shape(m.pick("1Z999AA1##########", "%##############", "JD%################")),
    "version": lambda m: m.pick(f"{m.rng.randrange(1, 20)}.{m.rng.randrange(20)}.{m.rng.randrange(30)}",
    m.shape("%.#"), m.shape("v%.##.#")),
    "version4": lambda m: ".".join(str(m.rng.randrange(0, 130)) for _ in range(4)),
    "chapter": lambda m: f"{m.rng.randrange(1, 13)}.{m.rng.randrange(1, 13)}.{m.rng.randrange(1, 9)}",
    "year": lambda m: str(m.rng.randrange(1950, 2027)),
    "small": lambda m: str(m.rng.randrange(2, 99)),
    "quantity": lambda m: str(m.pick(m.rng.randrange(100, 9999),
    f"{m.rng.randrange(1, 90)},{m.shape('###')}" if m.language == "en" else m.shape("%.###"))),
    "decimal": lambda m: f"{m.rng.randrange(1, 99)}{_point(m)}{m.shape('#')}",
    "percent": lambda m: f"{m.rng.randrange(1, 99)}{_point(m)}{m.shape('#')}{'%' if m.language == 'en' else ' %'}",
    "price": _price,
    "bp": lambda m: f"{m.rng.randrange(95, 180)}/{m.rng.randrange(55, 99)}",
    "fraction": lambda m: f"{m.rng.randrange(1, 30)}/30",
    "time": clock_time,
    "room_no": lambda m: m.shape(m.pick("%##", "%##?", "?-%##")),
    "port": lambda m: m.shape("%####"),
    "uuid": lambda m: "-".join(m.characters(size, HEX) for size in (8, 4, 4, 4, 12)),
    "sha": lambda m: m.characters(40, HEX),
    "isbn": lambda m: m.shape("978-%-%##-#####-#"),
    "flight": lambda m: m.shape(m.pick("UA%###", "LH%##", "BA%###")),
    "seat": lambda m: m.shape("%#") + m.pick("A", "C", "F"),
    "young": lambda m: m.pick(*YOUNG[m.language]).format(a=m.rng.randrange(3, 90)),
}  # fmt: skip
