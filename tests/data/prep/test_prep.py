"""Raw records to a version: one digest whatever the order, the cores and the engine; nothing lost, nothing left."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.road import write_recipe
from whet.data.formats import Source
from whet.data.prep.engine import Local, RayData
from whet.data.prep.prep import _are_small, prep
from whet.data.prep.steps import Dedup, Leaks, Redaction, Split, Steps
from whet.data.prep.versions import Store, Version, difference
from whet.errors import WhetError, WhetErrors
from whet.files import sha256
from whet.recipe import load
from whet.recipe_data import steps_of

WORDS = ["".join(random.Random(i).choices("abdegiklmnoprstu", k=2 + i % 7)) for i in range(2000)]
STEPS = Steps(sources=(Source("*.jsonl"),), seed=3)


def text(number: int, length: int = 40) -> str:
    rng = random.Random(number)
    return f"Entry {number}: {' '.join(rng.choices(WORDS, k=length))}"


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": text(i), "customer": f"customer-{i % 17}", "day": f"2026-0{i % 9 + 1}-11"}
        for i in range(first, first + count)
    ]


def write(folder: Path, name: str, lines: Sequence[dict[str, Any] | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("".join(line + "\n" for line in raw), encoding="utf-8")
    return folder


def made(folder: Path, steps: Steps = STEPS, root: Path | None = None, **options: Any) -> Version:
    return prep("set", steps, folder, root or folder / "runs", **options)


def said(version: Version, side: str) -> set[str]:
    return {example.text for example in version.examples(side)}


def test_every_row_is_on_one_side_once(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(300))
    version = made(tmp_path)
    train, held = said(version, "train"), said(version, "eval")
    assert not train & held
    assert train | held == {row["text"] for row in rows(300)}
    assert 10 < len(held) < 60
    assert version.manifest["stages"]["read"] == {"rows": 300, "bad": 0, "format": "text", "reasons": {}}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), files=st.integers(1, 5))
def test_how_rows_lie_in_files_changes_nothing(tmp_path_factory: pytest.TempPathFactory, seed: int, files: int) -> None:
    """Catches a step that keeps the first it meets: the digest would depend on how the input was written."""
    rng = random.Random(seed)
    all_rows = rows(60) + rows(10) + [{**row, "text": row["text"].upper()} for row in rows(10)]
    digests = set()
    for count in (1, files):
        folder = tmp_path_factory.mktemp("rows")
        rng.shuffle(all_rows)
        for i in range(count):
            write(folder, f"{i}.jsonl", all_rows[i::count])
        digests.add(made(folder).digest)
    assert len(digests) == 1


def test_cores_and_order_of_sources_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.data.prep.prep.SMALL", 0)  # few rows would be left to one process
    for i in range(4):
        write(tmp_path, f"{i}.jsonl", rows(40, 40 * i))
    named = tuple(Source(f"{i}.jsonl") for i in range(4))
    one = made(tmp_path, replace(STEPS, sources=named), tmp_path / "one", engine=Local(1))
    two = made(tmp_path, replace(STEPS, sources=named[::-1]), tmp_path / "two", engine=Local(2))
    assert one.digest == two.digest
    assert one.manifest["files"] == two.manifest["files"]


def test_few_rows_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes started for rows that are through before those are, and many rows left to one."""

    class Started(Exception):
        pass

    def started(engine: Local) -> None:
        raise Started

    monkeypatch.setattr(Local, "_started", started)
    files = [write(tmp_path, name, rows(40, first)) / name for name, first in (("a.jsonl", 0), ("b.jsonl", 40))]
    steps = replace(STEPS, sources=tuple(Source(file.name) for file in files))
    made(tmp_path, steps, engine=Local(2))
    monkeypatch.setattr("whet.data.prep.prep.SMALL", sum(file.stat().st_size for file in files))
    with pytest.raises(Started):
        made(tmp_path, steps, tmp_path / "other", engine=Local(2))


def test_a_source_of_unknown_size_is_not_small() -> None:
    """Catches a database's rows, of which no file tells the size, left to one process."""
    known, unknown = (SimpleNamespace(chunk=SimpleNamespace(stamps=stamps)) for stamps in (((9, 1),), ((9, 1), ())))
    assert _are_small([known])
    assert not _are_small([known, unknown])


CLUSTER = """
import ray, sys
context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def test_ray_makes_the_same_version(tmp_path: Path) -> None:
    """The same functions on another engine: a cluster of two workers on this machine."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    for i in range(3):
        write(tmp_path, f"{i}.jsonl", rows(40, 40 * i))
    write_recipe(tmp_path, {"data": {"sources": [{"path": f"{i}.jsonl"} for i in range(3)], "engine": "ray"}})
    (tmp_path / "ray_bootstrap_config.yaml").write_text("")  # without it Ray asks the network which cloud this is
    switches = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the latter: loopback alone
    environment = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", **switches}  # the token lies in HOME
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, text=True, **pipes) as cluster:
        assert cluster.stdout
        environment["RAY_ADDRESS"] = cluster.stdout.readline().strip()
        command = [sys.executable, "-m", "whet.cli", "prep", "recipe.yaml"]
        told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        cluster.communicate("")
    assert told.returncode == 0, told.stderr
    ray = Store(tmp_path / "runs" / "data" / "colours").version()
    recipe = load(tmp_path / "recipe.yaml")
    local = prep("colours", steps_of(recipe, tmp_path), tmp_path, tmp_path / "local")
    assert ray.digest == local.digest
    assert ray.manifest["files"] == local.manifest["files"]


def test_without_a_cluster_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write(tmp_path, "a.jsonl", rows(10))
    with pytest.raises(WhetError, match="RAY_ADDRESS names none"):
        made(tmp_path, engine=RayData())


def test_added_rows_move_no_old_one(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(200))
    old = made(tmp_path)
    write(tmp_path, "b.jsonl", rows(200, 200))
    found = difference(old, made(tmp_path))
    assert not found.moved
    assert not any(found.removed.values())
    assert sum(map(len, found.added.values())) == 200


def test_equal_and_nearly_equal_rows_are_one(tmp_path: Path) -> None:
    copies = [{"text": text(i)} for i in range(20)]
    near = [{"text": text(i).replace("Entry", "entry") + "!"} for i in range(20)]
    write(tmp_path, "a.jsonl", rows(100) + copies + near)
    version = made(tmp_path)
    assert version.manifest["sides"]["train"]["rows"] + version.manifest["sides"]["eval"]["rows"] == 100
    assert version.manifest["stages"]["dedup"]["exact"] == 20
    assert version.manifest["stages"]["dedup"]["near"] == 20
    listed = [json.loads(line) for line in (version.folder / "duplicates.jsonl").read_text().splitlines()]
    assert len(listed) == 40
    left = {row.where for side in ("train", "eval") for row in version.examples(side)}
    for pair in listed:
        number = (int(pair["dropped"].partition(":")[2]) - 101) % 20
        assert int(pair["kept"].partition(":")[2]) - 1 in (number, 100 + number, 120 + number)
        assert pair["kept"] in left
        assert pair["dropped"] not in left


def test_a_shared_instruction_makes_no_duplicates(tmp_path: Path) -> None:
    """Catches near-duplicate detection that drops a classification set: long prompt, short question, few answers."""
    prompt = text(10_000, 300)
    asked = [
        {"instruction": f"{prompt}\n\n{text(i, 25)}", "output": ("billing", "technical", "sales")[i % 3]}
        for i in range(120)
    ]
    write(tmp_path, "a.jsonl", asked)
    version = made(tmp_path)
    assert version.manifest["stages"]["dedup"]["near"] == 0
    assert sum(side["rows"] for side in version.manifest["sides"].values()) == 120


def test_groups_stay_on_one_side_and_their_names_are_not_kept(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(200))
    version = made(tmp_path, replace(STEPS, split=Split(0.3, group_by="customer")))
    numbers = {side: {int(t.split()[1][:-1]) % 17 for t in said(version, side)} for side in ("train", "eval")}
    assert not numbers["train"] & numbers["eval"]
    assert not any(b"customer-16" in path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file())


def test_a_split_by_time(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(180))
    version = made(tmp_path, replace(STEPS, split=Split(time="day", at="2026-08-01")))
    assert {int(t.split()[1][:-1]) % 9 + 1 for t in said(version, "eval")} == {8, 9}


def test_evaluation_files_of_their_own_are_checked_against(tmp_path: Path) -> None:
    write(tmp_path / "train", "a.jsonl", rows(50))
    write(tmp_path / "held", "b.jsonl", rows(10, 100))
    steps = replace(STEPS, sources=(Source("train/*.jsonl"),), eval_sources=(Source("held/*.jsonl"),))
    version = made(tmp_path, steps)
    assert (len(said(version, "train")), len(said(version, "eval"))) == (50, 10)
    write(tmp_path / "train", "c.jsonl", [{"text": text(103).upper()}])
    with pytest.raises(WhetErrors, match=r"train/c\.jsonl:1.*held/b\.jsonl:4"):
        made(tmp_path, steps)
    dropped = made(tmp_path, replace(steps, leaks=Leaks("drop")))
    assert said(dropped, "train") == said(version, "train")
    assert dropped.manifest["stages"]["leaks"]["dropped"] == 1
    warned = made(tmp_path, replace(steps, leaks=Leaks("warn")))
    assert len(said(warned, "train")) == 51


def test_leaks_planted_at_fifty_places_are_all_refused(tmp_path: Path) -> None:
    """By other case and punctuation, as a part of a longer row, as a near-duplicate, from a task; and only those."""
    draw = random.Random(11)
    clean, held = rows(400), rows(60, 1000)
    tasks = [{"question": text(i, 30), "answer": "yes"} for i in range(2000, 2010)]
    planted = [
        {"text": re.sub(" ", lambda _: draw.choice([" ", ", ", "! "]), row["text"].upper())} for row in held[:15]
    ]
    planted += [
        {"text": f"{text(3000 + i)} {row['text'].lower()} {text(4000 + i)}"} for i, row in enumerate(held[15:30])
    ]
    planted += [{"text": row["text"].rpartition(" ")[0] + " otherwise"} for row in held[30:40]]
    planted += [{"text": f"Please answer. {task['question']} Be brief."} for task in tasks]
    lines = clean + planted
    draw.shuffle(lines)
    places = {i for i, line in enumerate(lines, start=1) if line in planted}
    write(tmp_path / "train", "a.jsonl", lines)
    write(tmp_path / "held", "b.jsonl", held)
    write(tmp_path / "tasks", "t.jsonl", tasks)
    sources = {"sources": (Source("train/*.jsonl"),), "eval_sources": (Source("held/*.jsonl"),)}
    steps = replace(STEPS, **sources, leaks=Leaks(tasks=("tasks/t.jsonl",)))
    assert len(places) == 50
    with pytest.raises(WhetErrors, match="50 training rows hold text of the evaluation"):
        made(tmp_path, steps)
    version = made(tmp_path, replace(steps, leaks=Leaks("drop", ("tasks/t.jsonl",))))
    assert version.manifest["stages"]["leaks"]["dropped"] == 50
    assert {row.line for row in version.examples("train")} == set(range(1, 451)) - places


def test_a_version_prepared_again_loses_and_changes_nothing(tmp_path: Path) -> None:
    """Every step is idempotent: cleaning, redaction, duplicates, the split and the gate."""
    messy = [{"text": f"{line['text']}  \r\n\r\n\r\n\r\nMail ann{i % 40}@acme.com, caf\u00c3\u00a9"}
             for i, line in enumerate(rows(150) + rows(30))]  # fmt: skip
    write(tmp_path / "first", "a.jsonl", messy)
    steps = replace(STEPS, redact=Redaction("custom", {"EMAIL": "placeholder"}))
    first = made(tmp_path / "first", steps)
    assert first.manifest["stages"]["clean"]["changed"] == 180
    assert first.manifest["stages"]["redact"]["rows_changed"] == 180
    assert first.manifest["stages"]["dedup"]["exact"] == 30
    again = made(first.folder, replace(steps, sources=(Source("*-*.jsonl"),)), tmp_path / "again")
    assert again.manifest["stages"]["clean"]["changed"] == 0
    assert again.manifest["stages"]["redact"]["rows_changed"] == 0
    assert (again.manifest["stages"]["dedup"]["exact"], again.manifest["stages"]["dedup"]["near"]) == (0, 0)
    for side in ("train", "eval"):
        assert again.ids(side) == first.ids(side)


def test_questions_of_a_task_file_are_found(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(50))
    write(tmp_path / "tasks", "t.jsonl", [{"question": " ".join(text(7).split()[3:30]), "answer": "yes"}])
    with pytest.raises(WhetErrors, match=r"a\.jsonl:8.*tasks/t\.jsonl"):
        made(tmp_path, replace(STEPS, leaks=Leaks(tasks=("tasks/t.jsonl",))))


def test_bad_rows_are_listed_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [*rows(99), "{broken", {"text": 3}])
    with pytest.raises(WhetErrors, match=r"a\.jsonl:100") as caught:
        made(tmp_path)
    assert "a.jsonl:101" in str(caught.value)
    version = made(tmp_path, replace(STEPS, bad_rows=0.05))
    listed = [json.loads(line) for line in (version.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [line["where"] for line in listed] == ["a.jsonl:100", "a.jsonl:101"]
    assert version.manifest["stages"]["read"]["bad"] == 2
    (source,) = version.manifest["sources"]
    assert (source["source"], source["rows"], source["bad"]) == ("a.jsonl", 99, 2)
    assert source["sha256"] == sha256(tmp_path / "a.jsonl")
    with pytest.raises(WhetErrors):
        made(tmp_path, replace(STEPS, bad_rows=0.01))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    """Catches a cache that is never met: the second call reads no row."""
    write(tmp_path, "a.jsonl", rows(50))
    steps: list[str] = []
    first = made(tmp_path, progress=lambda step, *_: steps.append(step))
    assert {"read", "sign", "write"} <= set(steps)
    steps.clear()
    assert made(tmp_path, progress=lambda step, *_: steps.append(step)).digest == first.digest
    assert not steps
    assert len(Store(tmp_path / "runs" / "set").log()) == 1


def test_a_changed_file_of_a_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(50))
    path = next(made(tmp_path).folder.glob("train-*.jsonl"))
    path.write_text(path.read_text().replace("Entry", "Entrance", 1))
    with pytest.raises(WhetError, match="changed after it was made"):
        made(tmp_path)


def test_versions_are_logged_and_found_by_their_digest(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(50))
    one = made(tmp_path)
    write(tmp_path, "a.jsonl", rows(60))
    two = made(tmp_path)
    store = Store(tmp_path / "runs" / "set")
    assert [entry["digest"] for entry in store.log()] == [one.digest, two.digest]
    assert store.version(one.digest[:8]).folder == one.folder
    assert two.manifest["parent"] == one.digest
    with pytest.raises(WhetError, match="no version begins with 'zz'"):
        store.version("zz")


def test_nothing_of_an_original_is_written(tmp_path: Path) -> None:
    """Not to the version, its card and manifest, nor to the cache; and the vault gives it back to who has the key."""
    pytest.importorskip("presidio_analyzer")
    secrets = [f"maria.huber{i}@klinik.example" for i in range(30)]
    told = [{"text": f"{text(i)} Write to {secret}."} for i, secret in enumerate(secrets)]
    write(tmp_path, "a.jsonl", told)
    redact = Redaction("custom", {"EMAIL": "placeholder"}, key=bytes(range(32)), vault=True)
    version = made(tmp_path, replace(STEPS, redact=redact))
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not any(b"maria.huber" in path.read_bytes() for path in files)
    assert version.manifest["stages"]["redact"]["found"] == {"EMAIL": 30}
    from whet.data.redact.vault import restore, unseal

    originals: dict[str, str] = {}
    for path in sorted((version.folder / "vault").iterdir()):
        originals |= unseal(path.read_bytes(), bytes(range(32)))
    texts = restore(sorted(said(version, "train") | said(version, "eval")), originals)
    assert sorted(texts) == sorted(row["text"] for row in told)


def test_a_side_left_empty_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", rows(3))
    with pytest.raises(WhetError, match="none is left for evaluation"):
        made(tmp_path, replace(STEPS, split=Split(0.0001)))


def test_no_deduplication_keeps_equal_rows_together(tmp_path: Path) -> None:
    """Equal rows have one id, so that they fall on one side."""
    write(tmp_path, "a.jsonl", rows(100) + rows(100))
    version = made(tmp_path, replace(STEPS, dedup=None))
    assert not said(version, "train") & said(version, "eval")
    assert sum(side["rows"] for side in version.manifest["sides"].values()) == 200
    near_only = made(tmp_path, replace(STEPS, dedup=Dedup(exact=True, near=None)))
    assert sum(side["rows"] for side in near_only.manifest["sides"].values()) == 100


KILLED = """
import os, random, shutil, signal, sys, time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tests.data.prep.test_prep import STEPS
from whet.data.prep.engine import Local
from whet.data.formats import Source
from whet.data.prep.prep import prep

folder = Path(sys.argv[1])
steps = replace(STEPS, sources=tuple(Source(path.name) for path in sorted(folder.glob("*.jsonl"))))
for again in range(2):  # the first imports what it needs
    shutil.rmtree(folder / "other", ignore_errors=True)
    begun = time.process_time()
    expected = prep("set", steps, folder, folder / "other", engine=Local(1)).digest
took, killed, rng = time.process_time() - begun, 0, random.Random(5)
for attempt in range(10):
    if attempt % 3 == 0:  # from nothing, as each attempt leaves the next less to do
        shutil.rmtree(folder / "runs", ignore_errors=True)
    after = rng.uniform(0.05, 0.8) * took
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, after)  # SIGPROF, which ends a process as SIGKILL does: at once
        prep("set", steps, folder, folder / "runs", engine=Local(1))
        os._exit(0)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
version = prep("set", steps, folder, folder / "runs", engine=Local(1))
version.check()
left = list(version.folder.parent.glob(".*.partial"))
print(killed, version.digest == expected, left)
"""


def test_killed_at_any_point_it_ends_with_the_same_digest(tmp_path: Path) -> None:
    """Ten times ended by the kernel after a random share of the processor time; then it runs through, from what was
    left."""
    for i in range(6):
        write(tmp_path / "rows", f"{i}.jsonl", rows(400, 400 * i))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "rows")]
    killed, *rest = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert int(killed) >= 4
    assert rest == ["True", "[]"]
