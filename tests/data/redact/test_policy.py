"""Policies: the built-in ones, what they extend, and every fault of a file at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from whet.data.redact.entities import ENTITIES
from whet.data.redact.policy import BUILT_IN, FOLDER, load_policy, with_classes
from whet.data.redact.regions import REGIONS
from whet.errors import WhetError, WhetErrors


def written(folder: Path, text: str, name: str = "ours.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return name


def faults(name: str, folder: Path) -> list[WhetError]:
    with pytest.raises(WhetErrors) as raised:
        load_policy(name, folder)
    return raised.value.errors


def test_the_three_are_there():
    assert BUILT_IN == ("cmmc-cui", "gdpr-basic", "hipaa-safe-harbor")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_policy_bears_its_name(name: str, tmp_path: Path):
    policy = load_policy(name, tmp_path)
    assert policy.name == name
    assert policy.description


def test_safe_harbor_looks_for_every_class_that_the_rule_names(tmp_path: Path):
    """Catches a class that was added to the finder and forgotten in the policy."""
    named = {name for name, entity in ENTITIES.items() if entity.safe_harbor}
    assert set(load_policy("hipaa-safe-harbor", tmp_path).classes) == named
    assert "keep" not in load_policy("hipaa-safe-harbor", tmp_path).classes.values()


def test_safe_harbor_says_the_letter_that_the_class_has():
    """Catches a comment that cites another paragraph than entities.py does."""
    text = (FOLDER / "hipaa-safe-harbor.yaml").read_text(encoding="utf-8")
    letters = dict(re.findall(r"^  (\w+): \w+ +# \((\w)\)", text, re.MULTILINE))
    assert letters == {name: entity.safe_harbor for name, entity in ENTITIES.items() if entity.safe_harbor}


def test_controlled_work_decides_about_every_class(tmp_path: Path):
    assert set(load_policy("cmmc-cui", tmp_path).classes) == set(ENTITIES)
    assert load_policy("cmmc-cui", tmp_path).classes["MARKING"] == "drop"


def test_own_classes_come_on_top_of_those_extended(tmp_path: Path):
    name = written(tmp_path, "name: ours\nextends: hipaa-safe-harbor\nclasses: {EMAIL: mask, URL: keep}\n")
    policy, extended = load_policy(name, tmp_path), load_policy("hipaa-safe-harbor", tmp_path)
    assert policy.classes == {**extended.classes, "EMAIL": "mask", "URL": "keep"}
    assert policy.extends == "hipaa-safe-harbor"


def test_a_recipe_puts_classes_on_top(tmp_path: Path):
    safe_harbor = load_policy("hipaa-safe-harbor", tmp_path)
    policy = with_classes(safe_harbor, {"EMAIL": "mask", "CAGE": "drop"})
    assert policy.classes == {**safe_harbor.classes, "EMAIL": "mask", "CAGE": "drop"}
    with pytest.raises(WhetErrors) as raised:
        with_classes(safe_harbor, {"EMIAL": "mask", "SSN": "hide"})
    assert [error.where for error in raised.value.errors] == ["redact.classes.EMIAL", "redact.classes.SSN"]


def test_a_file_that_is_extended_lies_beside_the_one_that_extends_it(tmp_path: Path):
    """Catches paths that start at the recipe, which break when a policy is shared."""
    (tmp_path / "shared").mkdir()
    written(tmp_path / "shared", "name: base\nclasses: {SSN: drop, EMAIL: mask}\n", "base.yaml")
    written(tmp_path / "shared", "name: middle\nextends: base.yaml\nclasses: {EMAIL: placeholder}\n", "middle.yaml")
    name = written(tmp_path, "name: ours\nextends: shared/middle.yaml\n")
    assert load_policy(name, tmp_path).classes == {"SSN": "drop", "EMAIL": "placeholder"}


def test_all_faults_are_told_at_once_with_line_key_and_remedy(tmp_path: Path):
    text = "naem: ours\nextends: hipaa-safe-harbour\nclasses:\n  EMIAL: mask\n  SSN: masked\n  card: drop\n"
    found = {error.where.split(": ")[-1]: error for error in faults(written(tmp_path, text), tmp_path) if error.where}
    assert set(found) == {"naem", "name", "extends", "classes.EMIAL", "classes.SSN", "classes.card"}
    assert found["classes.EMIAL"].fix == "did you mean 'EMAIL'?"
    assert found["classes.SSN"].fix == "did you mean 'mask'?"
    assert found["classes.card"].fix == "did you mean 'CARD'?"
    assert found["extends"].fix == "did you mean 'hipaa-safe-harbor'?"
    assert f"{tmp_path / 'ours.yaml'}:5" in str(found["classes.SSN"].where)


def test_faults_of_the_extended_file_are_told_too(tmp_path: Path):
    written(tmp_path, "name: base\nclasses: {SSN: hide}\n", "base.yaml")
    name = written(tmp_path, "name: ours\nextends: base.yaml\nclasses: {EMAIL: hide}\n")
    assert sorted(Path(str(e.where).split(":")[0]).name for e in faults(name, tmp_path)) == ["base.yaml", "ours.yaml"]


def test_regions_are_the_file_s_own_or_those_of_what_it_extends(tmp_path: Path):
    written(tmp_path, "name: base\nclasses: {PHONE: mask}\nregions: [CH, AT]\n", "base.yaml")
    name = written(tmp_path, "name: ours\nextends: base.yaml\n")
    assert load_policy(name, tmp_path).regions == ("CH", "AT")
    assert with_classes(load_policy(name, tmp_path), {"SSN": "drop"}).regions == ("CH", "AT")
    name = written(tmp_path, "name: ours\nextends: base.yaml\nregions: [US]\n")
    assert load_policy(name, tmp_path).regions == ("US",)
    assert load_policy("gdpr-basic", tmp_path).regions == REGIONS


@pytest.mark.parametrize(
    ("regions", "what", "fix"),
    [
        ("[US, UK]", "'UK' is no region", 'write "GB"; there are AC, AD, '),
        ("[us]", "'us' is no region", 'write "US"'),
        ("[Germany]", "'Germany' is no region", "there are AC, AD, "),
        ("[NO, SE]", "False is no region", 'write "NO"'),
        ("US", "a list of countries", "regions: [US, DE]"),
        ("[]", "a list of countries", "regions: [US, DE]"),
        ("[[US]]", "is no region", "there are"),
    ],
)
def test_what_is_no_region_is_refused_with_those_there_are(regions: str, what: str, fix: str, tmp_path: Path):
    """Catches a bare NO, which YAML reads as false, and the UK, whose code is GB."""
    text = f"name: ours\nclasses: {{PHONE: mask}}\nregions: {regions}\n"
    (error,) = faults(written(tmp_path, text), tmp_path)
    assert what in error.what
    assert fix in str(error.fix)
    assert str(error.where).endswith("ours.yaml:3: regions")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_of_extends_is_refused(length: int, tmp_path: Path):
    """Catches endless recursion."""
    for i in range(length):
        written(tmp_path, f"name: p{i}\nextends: p{(i + 1) % length}.yaml\n", f"p{i}.yaml")
    (error,) = faults("p0.yaml", tmp_path)
    assert "in a circle: p0.yaml -> " in error.what
    assert error.what.endswith("-> p0.yaml")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- EMAIL\n", "a mapping of keys"),
        ("", "a mapping of keys"),
        ("name: [ours\n", "not valid YAML"),
        ("name: ours\nclasses: [EMAIL]\n", "a mapping of classes"),
        ("name: 3\nclasses: {EMAIL: mask}\n", "is no text"),
        ("name: ours\nclasses: {EMAIL: [mask]}\n", "is no mode"),
        ("name: ours\nclasses: {3: mask}\n", "there is no class 3"),
        ("name: ours\n", "looks for nothing"),
        ("name: ours\nname: theirs\nclasses: {EMAIL: mask}\n", "stands here twice"),
        ("name: ours\nclasses:\n  EMAIL: mask\n  EMAIL: keep\n", "stands here twice"),
        ("name: 2001-99-99\nclasses: {EMAIL: mask}\n", "not valid YAML"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, what: str, tmp_path: Path):
    errors = faults(written(tmp_path, text), tmp_path)
    assert any(what in error.what for error in errors)
    assert all("ours.yaml" in str(error.where) for error in errors)


@pytest.mark.parametrize(
    ("name", "what"),
    [("gone.yaml", "no such file"), ("hipaa", "no such file"), (".", "folder"), ("a\0b", "null"), ("x" * 300, "read")],
)
def test_what_cannot_be_read_is_refused(name: str, what: str, tmp_path: Path):
    (error,) = faults(name, tmp_path)
    assert what in error.what


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "ours.yaml").write_bytes(b"name: \xff\xfe\n")
    (error,) = faults("ours.yaml", tmp_path)
    assert "UTF-8" in error.what


def test_a_policy_does_not_change(tmp_path: Path):
    policy = load_policy("gdpr-basic", tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        policy.name = "other"
