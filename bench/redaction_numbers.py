"""Values for the labelled documents: numbers of states, banks, hospitals and suppliers, and keys.

Check digits are worked out here, or by Faker, and not by whet, so that a mistake in its checks shows.
"""

from __future__ import annotations

import base64
import json
import string

from redaction_values import ALPHANUMERIC, SAFE, Maker


def luhn_digit(body: str) -> str:
    total = sum(sum(divmod(int(digit) * (2 - place % 2), 10)) for place, digit in enumerate(reversed(body)))
    return str(-total % 10)


def ssn(m: Maker, labelled: bool = False) -> str:
    if m.country == "DE":
        return (
            m.shape(m.pick("%# ", "%#"))
            + f"{m.rng.randrange(1, 28):02d}{m.rng.randrange(1, 13):02d}"
            + m.shape("%#" + m.pick(" ? ", "?") + "###")
        )
    plain = m.fake.ssn()
    return str(
        m.pick(plain, plain, plain.replace("-", " "), plain.replace("-", ""), "xxx-xx-" + plain[-4:])
        if labelled
        else plain
    )


def steuer_id(m: Maker) -> str:
    digits = m.rng.sample(string.digits, 9)
    digits.insert(m.rng.randrange(10), m.rng.choice(digits))
    if digits[0] == "0" or (digits.count("0") == 2 and digits[0] == "0"):
        return steuer_id(m)
    product = 10
    for digit in digits:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    body = "".join(digits) + str((11 - product) % 10)
    return str(m.pick(body, f"{body[:2]} {body[2:5]} {body[5:8]} {body[8:]}"))


def tax_id(m: Maker, label: str = "") -> str:
    match m.country:
        case "US":
            return str(
                m.fake.ein()
                if "E" in label.split(" ")[0] or "mployer" in label
                else m.fake.itin()
                if "ITIN" in label
                else m.pick(m.fake.itin(), m.fake.ein())
            )
        case "GB":
            if "UTR" in label:
                return m.shape("%#########")
            text = (
                m.pick("AB", "CE", "JK", "PX", "SG", "WM", "YZ", "NR") + m.shape("######") + m.pick("A", "B", "C", "D")
            )
            return str(m.pick(text, f"{text[:2]} {text[2:4]} {text[4:6]} {text[6:8]} {text[8:]}"))
        case "DE":
            return (
                m.shape("%#/###/#####")
                if label == "Steuernummer"
                else m.shape("DE%########")
                if label.startswith("USt")
                else steuer_id(m)
            )
        case "FR":
            if "fiscal" in label:
                return m.shape(m.pick("0%###########", "1# ## ### ### ###"))
            return _nir(m)
        case _:
            text = m.fake.nie() if "NIE" in label else m.pick(m.fake.nif(), m.fake.nie())
            text = text.replace("-", "")
            return str(m.pick(text, text[:8] + "-" + text[8:]))


def _nir(m: Maker) -> str:
    body = f"{m.pick(1, 2)}{m.shape('##')}{m.rng.randrange(1, 13):02d}{m.rng.randrange(1, 96):02d}{m.shape('######')}"
    key = f"{97 - int(body) % 97:02d}"
    return str(m.pick(body + key, f"{body[0]} {body[1:3]} {body[3:5]} {body[5:7]} {body[7:10]} {body[10:]} {key}"))


PASSPORTS = {
    "US": ("%########", "?########"),
    "GB": ("%########",),
    "DE": ("C%#?#?##%", "L01X00T47", "C3J#?####"),
    "FR": ("##?V#####", "##?K#####"),
    "ES": ("???######", "??######", "XDB######"),
}
LICENCES = {
    "US": ("?#######", "%########", "?###-####-####", "?###-###-##-###-#", "?##-##-####", "########"),
    "DE": ("B###***##*#", "J%##00??#51", "N0#?##%####"),
    "FR": ("%###########", "##??#####", "##?%######"), "ES": ("########-?", "########?"),
}  # fmt: skip


def driver_license(m: Maker) -> str:
    if m.country == "GB":
        return (
            (m.fake.last_name().upper().replace("'", "").replace("-", "").replace(" ", "") + "9999")[:5]
            + m.shape("%")
            + f"{m.rng.randrange(1, 13):02d}{m.rng.randrange(1, 29):02d}"
            + m.shape("#??#??").replace("?", "A", 1)
        )
    return m.shape(m.pick(*LICENCES[m.country]))


def license_number(m: Maker, label: str = "") -> str:
    if "RPPS" in label:
        body = m.shape("10########")
        return body + luhn_digit(body)
    shapes = {
        "US": ("MD######", "?-#####", "ME-######", "######", "RN######", "#######"),
        "GB": ("#######", "##?####?"),
        "DE": ("#########", "ZA-######", "DE-####-###"),
        "FR": ("#########", "FR-####-###"),
        "ES": ("##/#####", "#########", "28/######"),
    }
    return m.shape(m.pick(*shapes[m.country]))


def mrn(m: Maker, label: str = "") -> str:
    if "NHS" in label:
        return _nhs(m)
    return m.shape(
        m.pick("%######", "%#######", "%#####", "MR%######", "M-######", "H%######", "##-##-##%", "00######")
    )


def _nhs(m: Maker) -> str:
    while True:
        body = m.shape("%########")
        check = (11 - sum(int(digit) * weight for digit, weight in zip(body, range(10, 1, -1), strict=True)) % 11) % 11
        if check < 10:
            return str(
                m.pick(
                    f"{body[:3]} {body[3:6]} {body[6:]}{check}",
                    f"{body}{check}",
                    f"{body[:3]}-{body[3:6]}-{body[6:]}{check}",
                )
            )


def health_plan(m: Maker, label: str = "") -> str:
    if label in ("MBI", "Medicare Number"):
        letter = "ACDEFGHJKMNPQRTUVWXY".replace("Q", "")
        one = lambda: m.rng.choice(letter)  # noqa: E731
        text = (
            m.shape("%")
            + one()
            + m.shape("#")
            + m.shape("#")
            + one()
            + m.shape("#")
            + m.shape("#")
            + one()
            + one()
            + m.shape("##")
        )
        return str(m.pick(text, f"{text[:4]}-{text[4:7]}-{text[7:]}"))
    if label in ("Versichertennummer", "Krankenversichertennummer", "KVNR", "Versicherten-Nr."):
        body = m.rng.choice(string.ascii_uppercase) + m.shape("########")
        spread = f"{ord(body[0]) - 64:02d}{body[1:]}"
        return body + str(sum(sum(divmod(int(digit) * (1 + place % 2), 10)) for place, digit in enumerate(spread)) % 10)
    if label in ("Nº Seguridad Social", "NUSS", "Número de afiliación"):
        return m.shape(m.pick("28%#########", "08/########/##", "46 ######## ##"))
    if label == "Group Number":
        return m.shape("%#####")
    return m.shape(m.pick("?########", "%#########", "XYZ#########", "??#######", "%########-##", "H%###-###"))


def npi(m: Maker) -> str:
    body = m.pick("1", "2") + m.shape("########")
    return body + luhn_digit("80840" + body)


def dea(m: Maker) -> str:
    digits = m.shape("######")
    check = (sum(map(int, digits[::2])) + 2 * sum(map(int, digits[1::2]))) % 10
    return m.rng.choice("ABFGM") + m.rng.choice(SAFE) + digits + str(check)


def account(m: Maker, label: str = "") -> str:
    return m.shape(
        m.pick("%#######", "%#########", "%###########", "%### #### ####", "%######", "00########")
        if m.country != "GB"
        else m.pick("%#######", "0#######")
    )


def routing(m: Maker) -> str:
    if m.country == "GB":
        return m.shape(m.pick("##-##-##", "%#####", "## ## ##"))
    if m.country == "DE":
        return m.shape(m.pick("%#######", "%## ### ##"))
    return str(m.fake.aba())


def iban(m: Maker) -> str:
    plain = m.fake.iban()
    return str(m.pick(plain, " ".join(plain[place : place + 4] for place in range(0, len(plain), 4))))


def swift(m: Maker) -> str:
    return str(m.pick(m.fake.swift8(), m.fake.swift11()))


def card(m: Maker) -> str:
    prefix, length = m.pick(
        ("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("37", 15), ("34", 15), ("6011", 16), ("4", 16)
    )
    body = prefix + "".join(m.rng.choice(string.digits) for _ in range(length - len(prefix) - 1))
    body += luhn_digit(body)
    blocks = (4, 6, 5) if length == 15 else (4, 4, 4, 4)
    parts, start = [], 0
    for size in blocks:
        parts.append(body[start : start + size])
        start += size
    return str(m.pick(body, " ".join(parts), "-".join(parts), " ".join(parts)))


def plate(m: Maker) -> str:
    shapes = {
        "US": ("?????###"[2:], "#???###", "??? ####", "???-####", "###-???"),
        "GB": ("??## ???", "??##???"),
        "FR": ("??-###-??", "?? ### ??"),
        "ES": ("#### ???", "####-???", "####???"),
        "DE": ("?-?? ###", "??-?? ####", "???-? ##", "? ?? ####", "M-?? ####E"),
    }
    return m.shape(m.pick(*shapes[m.country]))


def vin(m: Maker) -> str:
    return str(m.fake.vin())


def device(m: Maker, label: str = "") -> str:
    if "IMEI" in label:
        body = m.pick("35", "86", "01") + m.shape("############")
        body += luhn_digit(body)
        return str(m.pick(body, f"{body[:2]}-{body[2:8]}-{body[8:14]}-{body[14]}"))
    if "UDI" in label:
        return (
            m.shape("(01)0##############"[:18])
            + m.shape("(17)2#0%##")[:10]
            + m.shape(m.pick("(21)%#####", "(10)A###", ""))
        )
    return m.shape(
        m.pick("SN########", "??#######", "%##########", "C02##*##**##", "?##-####-###", "5CD#######", "PM-######")
    )


def cage(m: Maker) -> str:
    return m.shape("%***#")


def uei(m: Maker) -> str:
    return m.shape("?***#*******")


def contract(m: Maker) -> str:
    office = m.pick("W912HN", "FA8650", "N00024", "W56HZV", "SPE4A7", "HR0011", "M67854", "FA8232")
    return f"{office}-{m.rng.randrange(10, 25)}-{m.pick('C', 'D', 'P', 'F', 'M')}-{m.shape('####')}"


def marking(m: Maker) -> str:
    return str(
        m.pick(
            "CUI//SP-PRVCY",
            "CUI//SP-EXPT//NOFORN",
            "FOUO",
            "CUI//NOFORN",
            "CONTROLLED//SP-CTI",
            "SECRET//NOFORN",
            "FOR OFFICIAL USE ONLY",
            "UNCLASSIFIED//FOUO",
            "CUI//SP-CTI//FED ONLY",
            "TOP SECRET//SI//NOFORN",
            "ITAR CONTROLLED",
            "EXPORT CONTROLLED",
            "REL TO USA, GBR",
            "DISTRIBUTION STATEMENT D",
        )
    )


def api_key(m: Maker, label: str = "") -> str:
    generic = m.characters(m.pick(24, 32, 40)) + m.pick("7", "4k", "Z9")
    if label:
        return generic
    c = m.characters
    return str(m.pick("AKIA" + c(16, SAFE.replace("I", "") + "234567"), "ghp_" + c(36),
        "github_pat_" + c(22) + "_" + c(59), "sk-" + c(48), "sk-proj-" + c(60),
        "xoxb-" + m.shape("############-############-") + c(24), "AIza" + c(35, ALPHANUMERIC + "-_"[1:]),
        "sk_live_" + c(24), "glpat-" + c(20), "hf_" + c(34), _jwt(m)))  # fmt: skip


def _jwt(m: Maker) -> str:
    parts = ({"alg": "HS256", "typ": "JWT"}, {"sub": m.shape("##########"), "name": m.fake.word()})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, m.characters(43)])


def private_key(m: Maker) -> str:
    kind = m.pick("RSA ", "EC ", "", "OPENSSH ", "ENCRYPTED ")
    lines = "\n".join(m.characters(64, ALPHANUMERIC + "+/") for _ in range(m.rng.randrange(3, 6)))
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n{m.characters(30)}==\n-----END {kind}PRIVATE KEY-----"


def zip_code(m: Maker) -> str:
    return str(m.pick(m.fake.postcode(), m.fake.postcode() + "-" + m.shape("####")))
