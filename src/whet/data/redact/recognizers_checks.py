"""Check digits and other rules that tell a real number from one that looks like it.

Each function takes the value as it was found, separators and case included, and says whether it holds.
"""

from __future__ import annotations

import re

NOT_ALPHANUMERIC = re.compile(r"[^0-9A-Za-z]+")


def plain(value: str) -> str:
    """Upper case, without separators."""
    return NOT_ALPHANUMERIC.sub("", value).upper()


def luhn(value: str) -> bool:
    """ISO/IEC 7812-1, annex B: doubling every second digit from the right, digits sum to a multiple of 10."""
    digits = plain(value)
    if not digits.isdecimal():
        return False
    total = 0
    for position, digit in enumerate(reversed(digits)):
        number = int(digit) * (1 + position % 2)
        total += number - 9 if number > 9 else number
    return total % 10 == 0


CARD_LENGTHS = (  # prefix, lengths: the networks' ranges
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"3(?:0[0-5]|095|[689])"), (14, 16, 19)),
    (re.compile(r"6(?:011|4[4-9]|5|2|0|8)|8[12]"), (16, 17, 18, 19)),
    (re.compile(r"35(?:2[89]|[3-8])|2131|1800"), (15, 16)),
    (re.compile(r"50|5[6-9]|6"), (16, 18, 19)),
)


def card(value: str) -> bool:
    """A network's prefix, its length, and Luhn; not one digit alone repeated."""
    digits = plain(value)
    if not any(len(digits) in lengths and prefix.match(digits) for prefix, lengths in CARD_LENGTHS):
        return False
    return len(set(digits)) > 1 and luhn(digits)


IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28,
    "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MN": 20,
    "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27,
    "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip


def iban(value: str) -> bool:
    """ISO 13616: the country's length, and the number with its first four characters last is 1 modulo 97."""
    text = plain(value)
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


def aba(value: str) -> bool:
    """ABA routing number: weights 3, 7, 1 over nine digits sum to a multiple of 10; a Federal Reserve prefix."""
    digits = plain(value)
    if len(digits) != 9 or not digits.isdecimal():
        return False
    prefix = int(digits[:2])
    if not (prefix <= 12 or 21 <= prefix <= 32 or 61 <= prefix <= 72 or prefix == 80) or digits[:4] == "0000":
        return False
    return sum(int(digit) * weight for digit, weight in zip(digits, (3, 7, 1) * 3, strict=True)) % 10 == 0


def npi(value: str) -> bool:
    """CMS: ten digits from 1 or 2 that pass Luhn behind the prefix 80840."""
    digits = plain(value)
    return len(digits) == 10 and digits[0] in "12" and luhn("80840" + digits)


def dea(value: str) -> bool:
    """Two letters (the second may be 9) and seven digits: d1+d3+d5 + 2(d2+d4+d6) ends in d7."""
    text = plain(value)
    if not re.fullmatch(r"[ABCDEFGHJKLMPRSTUX][A-Z9][0-9]{7}", text):
        return False
    digits = [int(digit) for digit in text[2:]]
    return (sum(digits[0:6:2]) + 2 * sum(digits[1:6:2])) % 10 == digits[6]


VIN_VALUES = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", (*range(1, 9), *range(1, 6), 7, 9, *range(2, 10)), strict=True))
VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)


def vin(value: str) -> bool:
    """49 CFR 565.15: the ninth of 17 characters is the weighted sum modulo 11, X for 10."""
    text = plain(value)
    if len(text) != 17 or not any(character.isdigit() for character in text):
        return False
    try:
        total = sum(
            weight * (int(character) if character.isdigit() else VIN_VALUES[character])
            for character, weight in zip(text, VIN_WEIGHTS, strict=True)
        )
    except KeyError:  # I, O and Q are in no VIN
        return False
    return "0123456789X"[total % 11] == text[8]


def ssn(value: str) -> bool:
    """SSA: area not 000, 666 or 900 and over, group not 00, serial not 0000. 078-05-1120, once printed, counts."""
    digits = plain(value)
    if len(digits) != 9 or not digits.isdecimal():
        return False
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def itin(value: str) -> bool:
    """IRS: from 9, the fourth and fifth digit in 50-65, 70-88, 90-92 or 94-99."""
    digits = plain(value)
    if len(digits) != 9 or digits[0] != "9":
        return False
    group = int(digits[3:5])
    return 50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or group >= 94


EIN_RANGES = ((1, 6), (10, 16), (20, 27), (30, 39), (40, 48), (50, 68), (71, 77), (80, 88), (90, 95), (98, 99))
EIN_PREFIXES = frozenset(prefix for first, last in EIN_RANGES for prefix in range(first, last + 1))


def ein(value: str) -> bool:
    """IRS: the first two digits are a campus's prefix."""
    digits = plain(value)
    return len(digits) == 9 and digits.isdecimal() and int(digits[:2]) in EIN_PREFIXES


def nino(value: str) -> bool:
    """HMRC: two letters (not D, F, I, Q, U, V; no O second; some pairs never issued), six digits, A to D."""
    text = plain(value)
    if not re.fullmatch(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z][0-9]{6}[A-D]", text):
        return False
    return text[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def steuer_id(value: str) -> bool:
    """Germany: eleven digits, not from 0, ISO 7064 MOD 11,10; one or two of the first ten occur more than once."""
    digits = plain(value)
    if len(digits) != 11 or not digits.isdecimal() or digits[0] == "0":
        return False
    repeats = sorted((digits[:10].count(digit) for digit in set(digits[:10])), reverse=True)
    if repeats[0] not in (2, 3) or repeats[1] > 1:
        return False
    return mod_11_10(digits[:10]) == int(digits[10])


def mod_11_10(digits: str) -> int:
    """The check digit of ISO 7064 MOD 11,10."""
    product = 10
    for digit in digits:
        total = (int(digit) + product) % 10 or 10
        product = 2 * total % 11
    return (11 - product) % 10


def nir(value: str) -> bool:
    """France: sex, year, month, place, order; the key is 97 minus the rest modulo 97. 2A and 2B (Corsica) as 19, 18."""
    text = plain(value)
    if not re.fullmatch(r"[1-478][0-9]{2}(?:0[1-9]|1[0-2]|[2-9][0-9])(?:[0-9]{2}|2[AB])[0-9]{8}", text):
        return False
    body = text[:13].replace("2A", "19").replace("2B", "18")
    return body.isdecimal() and 97 - int(body) % 97 == int(text[13:])


NIF_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"


def nif(value: str) -> bool:
    """Spain: DNI or NIE; the letter is the number modulo 23, with X, Y, Z before it as 0, 1, 2."""
    text = plain(value)
    if not re.fullmatch(r"[XYZ0-9][0-9]{7}[A-Z]", text):
        return False
    number = text[:8].replace("X", "0").replace("Y", "1").replace("Z", "2")
    return NIF_LETTERS[int(number) % 23] == text[8]


def cif(value: str) -> bool:
    """Spain, companies: a letter, seven digits, and a check digit or its letter."""
    text = plain(value)
    if not re.fullmatch(r"[ABCDEFGHJNPQRSUVW][0-9]{7}[0-9A-J]", text):
        return False
    digits = [int(digit) for digit in text[1:8]]
    total = sum(digits[1::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[::2])
    check = (10 - total % 10) % 10
    return text[8] in (str(check), "JABCDEFGHI"[check])


def nhs(value: str) -> bool:
    """England: ten digits; weights 10 down to 2, eleven minus the remainder modulo 11."""
    digits = plain(value)
    if len(digits) != 10 or not digits.isdecimal():
        return False
    total = sum(int(digit) * weight for digit, weight in zip(digits, range(10, 1, -1), strict=False))
    return (11 - total % 11) % 11 == int(digits[9])


def kvnr(value: str) -> bool:
    """Germany, health insurance: a letter and nine digits; weights 1, 2 over the letter's place and eight digits."""
    text = plain(value)
    if not re.fullmatch(r"[A-Z][0-9]{9}", text):
        return False
    digits = f"{ord(text[0]) - 64:02d}{text[1:9]}"
    total = sum(sum(divmod(int(digit) * (1 + place % 2), 10)) for place, digit in enumerate(digits))
    return total % 10 == int(text[9])


def imei(value: str) -> bool:
    digits = plain(value)
    return len(digits) == 15 and len(set(digits)) > 1 and luhn(digits)


def entropic(value: str) -> bool:
    """Letters and digits mixed, and few of them repeated, as in a secret that a machine made."""
    kinds = sum(any(test(character) for character in value) for test in (str.islower, str.isupper, str.isdigit))
    return kinds >= 2 and any(map(str.isdigit, value)) and len(set(value)) >= min(12, 0.4 * len(value) + 2)
