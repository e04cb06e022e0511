"""Keys and vaults: what is sealed comes back whole, or not at all."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from tests.data.redact.conftest import KEY, OTHER_KEY
from whet.data.redact.keys import derive, load_key, make_key
from whet.data.redact.replace import Replacer
from whet.data.redact.vault import HEADER, restore, seal, unseal, unseal_files
from whet.errors import WhetError

ORIGINALS = {
    "[EMAIL_aaaaaaaaaaaa]": "ann@acme.com",
    "Port Elderholt-Emberfen [#bbbbbbbbbbbb]": "Zürich\n",
    "x": "\ud800",
}


def test_a_vault_gives_back_what_it_was_given():
    assert unseal(seal(ORIGINALS, KEY), KEY) == ORIGINALS
    assert unseal(seal({}, KEY), KEY) == {}


@given(st.dictionaries(st.text(), st.text()))
def test_any_originals_come_back(originals: dict[str, str]):
    assert unseal(seal(originals, KEY), KEY) == originals


def test_equal_originals_make_equal_vaults():
    """Catches a vault that changes when a stopped run goes on."""
    backwards = dict(reversed(ORIGINALS.items()))
    assert seal(ORIGINALS, KEY) == seal(backwards, KEY)
    assert seal(ORIGINALS, KEY) != seal({**ORIGINALS, "y": ""}, KEY)


def test_a_vault_shows_nothing_of_what_it_holds():
    sealed = seal(ORIGINALS, KEY)
    assert b"acme" not in sealed
    assert b"EMAIL" not in sealed


def test_another_key_opens_nothing():
    with pytest.raises(WhetError, match="does not open with this key") as raised:
        unseal(seal(ORIGINALS, KEY), OTHER_KEY)
    assert "acme" not in str(raised.value)


@pytest.mark.parametrize("at", [len(HEADER), len(HEADER) + 15, len(HEADER) + 20, -1])
def test_one_changed_bit_opens_nothing(at: int):
    """Catches a cipher without authentication, which would give back a part."""
    sealed = bytearray(seal(ORIGINALS, KEY))
    sealed[at] ^= 1
    with pytest.raises(WhetError, match="does not open"):
        unseal(bytes(sealed), KEY)


@pytest.mark.parametrize("length", [0, 5, len(HEADER), len(HEADER) + 3, -1])
def test_a_cut_vault_opens_nothing(length: int):
    with pytest.raises(WhetError):
        unseal(seal(ORIGINALS, KEY)[:length], KEY)


def test_another_version_is_refused_by_name():
    with pytest.raises(WhetError, match="another version"):
        unseal(seal(ORIGINALS, KEY).replace(b"vault 1", b"vault 2"), KEY)


def test_a_vault_is_locked_by_another_key_than_the_pseudonyms():
    """Catches one derived key for two purposes."""
    assert derive(KEY, "whet vault 1") != derive(KEY, "whet pseudonyms 1") != derive(KEY, "whet marks 1")


@pytest.mark.parametrize("length", [16, 32, 64, 100])
def test_derived_keys_are_those_of_the_standard(length: int):
    expected = HKDF(SHA256(), length, salt=None, info=b"whet vault 1").derive(KEY)
    assert derive(KEY, "whet vault 1", length) == expected


def test_many_vaults_open_as_one(tmp_path: Path):
    parts = [{"a": "1", "b": "2"}, {"b": "2", "c": "3"}]
    for i, part in enumerate(parts):
        (tmp_path / f"{i}.vault").write_bytes(seal(part, KEY))
    assert unseal_files(sorted(tmp_path.glob("*.vault")), KEY) == {"a": "1", "b": "2", "c": "3"}


def test_vaults_that_contradict_each_other_are_refused(tmp_path: Path):
    """Catches a text that is restored with somebody else's value."""
    for i in range(2):
        (tmp_path / f"{i}.vault").write_bytes(seal({"a": f"secret {i}"}, KEY))
    with pytest.raises(WhetError, match="two originals") as raised:
        unseal_files(sorted(tmp_path.glob("*.vault")), KEY)
    assert "secret" not in str(raised.value)
    assert "1.vault" in str(raised.value)


def test_the_wrong_key_names_the_file(tmp_path: Path):
    (tmp_path / "0.vault").write_bytes(seal({"a": "1"}, KEY))
    with pytest.raises(WhetError, match=r"0\.vault"):
        unseal_files([tmp_path / "0.vault"], OTHER_KEY)


@given(
    st.lists(st.tuples(st.sampled_from(["EMAIL", "PERSON", "ZIP", "CARD", "IP"]), st.text(min_size=1, max_size=30))),
    st.sampled_from(["placeholder", "pseudonym", "mask", "generalise"]),
)
def test_replacements_side_by_side_are_restored(values: list[tuple[str, str]], mode: str):
    modes = dict.fromkeys(["EMAIL", "PERSON", "ZIP", "CARD", "IP"], mode)
    replacement = Replacer(modes, key=KEY, marks=True).replacement  # type: ignore[arg-type]
    new = [replacement(*value) for value in values]
    originals = {n: value for n, (_, value) in zip(new, values, strict=True) if n != value}
    assert restore(["".join(new)], originals) == ["".join(value for _, value in values)]


def test_what_the_vault_does_not_know_stays():
    text = "[EMAIL_zzzzzzzzzzzz] and [EMAIL] and [EMAIL_aaaaaaaaaaaa]"
    assert restore([text], ORIGINALS) == ["[EMAIL_zzzzzzzzzzzz] and [EMAIL] and ann@acme.com"]


def test_two_replacements_of_one_value_are_both_restored():
    """Catches a value that stands as a placeholder where its substitute had no room, and is looked up by mark alone."""
    originals = {"[CARD_aaaaaaaaaaaa]": "4111", "0000 [#aaaaaaaaaaaa]": "4111"}
    assert restore(["[CARD_aaaaaaaaaaaa] 0000 [#aaaaaaaaaaaa]"], originals) == ["4111 4111"]


def test_a_restored_original_is_not_restored_again():
    """Catches repeated replacing, where an original that looks like a replacement is taken for one."""
    originals = {"[A_aaaaaaaaaaaa]": "[B_bbbbbbbbbbbb]", "[B_bbbbbbbbbbbb]": "b"}
    assert restore(["[A_aaaaaaaaaaaa] [B_bbbbbbbbbbbb]"], originals) == ["[B_bbbbbbbbbbbb] b"]


# keys


def test_a_made_key_is_private_random_and_loads(tmp_path: Path):
    for name in ("one", "two"):
        make_key(tmp_path / name)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    assert len(load_key(tmp_path / "one")) == 32
    assert load_key(tmp_path / "one") != load_key(str(tmp_path / "two"))


def test_the_mode_of_a_made_key_does_not_rest_on_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        make_key(tmp_path / "key")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_overwritten(tmp_path: Path):
    make_key(tmp_path / "key")
    key = load_key(tmp_path / "key")
    with pytest.raises(WhetError, match="never overwritten"):
        make_key(tmp_path / "key")
    assert load_key(tmp_path / "key") == key


def test_a_dangling_link_is_not_written_through(tmp_path: Path):
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WhetError):
        make_key(tmp_path / "key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_in_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(WhetError, match="no such folder"):
        make_key(tmp_path / "gone" / "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_may_read_is_refused_with_the_remedy(mode: int, tmp_path: Path):
    make_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(WhetError) as raised:
        load_key(tmp_path / "key")
    assert raised.value.fix == f"chmod 600 {tmp_path / 'key'}"


SHORT = base64.b64encode(bytes(range(31))).decode()
LONG = base64.b64encode(bytes(range(48))).decode()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no key"),
        ("# only a header\n", "no key"),
        ("not base64 at all!\n", "no key"),
        (f"{LONG}\n{LONG}\n", "no key"),
        (f"# whet\n{SHORT}\n", "31 bytes"),
        ("caf\u00e9\n", "no key"),
    ],
)
def test_what_is_no_key_is_refused_without_being_shown(text: str, what: str, tmp_path: Path):
    path = tmp_path / "key"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(WhetError, match=what) as raised:
        load_key(path)
    shown = f"{raised.value} {raised.value.__cause__}"
    assert not any(line in shown for line in text.splitlines())


@pytest.mark.parametrize(("name", "what"), [("gone", "no such key file"), (".", "folder")])
def test_a_missing_key_is_told(name: str, what: str, tmp_path: Path):
    with pytest.raises(WhetError, match=what):
        load_key(tmp_path / name)


def test_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OUR_KEY", LONG)
    assert load_key("env:OUR_KEY") == bytes(range(48))
    monkeypatch.setenv("OUR_KEY", SHORT)
    with pytest.raises(WhetError, match="31 bytes") as raised:
        load_key("env:OUR_KEY")
    assert SHORT not in str(raised.value)
    monkeypatch.delenv("OUR_KEY")
    with pytest.raises(WhetError, match="not set"):
        load_key("env:OUR_KEY")


def test_a_short_key_is_refused_wherever_it_comes_from():
    with pytest.raises(WhetError, match="too short"):
        seal({}, b"short")
    with pytest.raises(WhetError, match="too short"):
        Replacer({"EMAIL": "pseudonym"}, key=b"short")
