"""Hugging Face data sets: folders that were saved, and names on the hub, whose place a server of the test takes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from whet.data.read.rows import Origin, Row, read_rows
from whet.errors import WhetError

RECORDS = [{"messages": [{"role": "user", "content": "é"}], "n": 1}, {"messages": [], "n": None}]


def fault(origin: str | Origin, base: Path) -> WhetError:
    with pytest.raises(WhetError) as caught:
        list(read_rows(origin, base=base))
    assert caught.value.fix
    return caught.value


def test_a_saved_data_set(tmp_path: Path):
    Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "set"))
    assert next(read_rows("./set/", base=tmp_path)).source == "set"
    expected = [Row(values, "set", i) for i, values in enumerate(RECORDS, start=1)]
    assert list(read_rows("set", base=tmp_path)) == expected
    assert [row.values for row in read_rows(str(tmp_path / "set"), base=Path("/"))] == RECORDS


def test_splits_are_named(tmp_path: Path):
    """Catches a test split that is trained on because nobody said which."""
    DatasetDict({"train": Dataset.from_list(RECORDS), "test": Dataset.from_list(RECORDS[:1])}).save_to_disk(
        str(tmp_path / "set")
    )
    assert len(list(read_rows(Origin("set", split="train"), base=tmp_path))) == 2
    assert len(list(read_rows(Origin("set", split="test"), base=tmp_path))) == 1
    assert len(list(read_rows("set/train", base=tmp_path))) == 2
    assert "several splits" in fault("set", tmp_path).what
    assert "it has train, test" in (fault(Origin("set", split="dev"), tmp_path).fix or "")
    assert "without splits" in fault(Origin("set/train", split="train"), tmp_path).what
    DatasetDict({"only": Dataset.from_list(RECORDS)}).save_to_disk(str(tmp_path / "one"))
    assert len(list(read_rows("one", base=tmp_path))) == 2


def test_selected_and_shuffled_rows_stay_so(tmp_path: Path):
    """Catches rows read from the file that a data set's indices leave out, and columns that a format hides."""
    data = Dataset.from_dict({"n": list(range(5000)), "t": ["x"] * 5000}).shuffle(seed=1).select(range(2500))
    wanted = data["n"][:]
    data.with_format("torch", columns=["n"]).save_to_disk(str(tmp_path / "set"), num_shards=3)
    rows = list(read_rows("set", base=tmp_path))
    assert [row.values["n"] for row in rows] == list(wanted)
    assert [row.line for row in rows] == list(range(1, 2501))
    assert rows[0].values.keys() == {"n", "t"}


def test_pictures_are_not_decoded(tmp_path: Path):
    data = Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}]})
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "set"))
    assert next(read_rows("set", base=tmp_path)).values == {"image": {"bytes": b"no picture", "path": None}}


@pytest.mark.parametrize("damage", ["arrow", "cut", "state", "info", "gone", "dict", "climbs"])
def test_damaged_data_sets(tmp_path: Path, damage: str):
    """Catches tracebacks of three libraries, and a list of splits that leads out of the folder."""
    folder = tmp_path / "set"
    Dataset.from_list(RECORDS * 1000).save_to_disk(str(folder))
    (arrow,) = folder.glob("*.arrow")
    if damage == "arrow":
        arrow.write_bytes(b"no table")
    elif damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    elif damage == "gone":
        arrow.unlink()
    elif damage in ("state", "info"):
        next(folder.glob(f"*{damage}.json")).write_text("{")
    else:
        splits = {"dict": {}, "climbs": {"splits": ["../../etc"]}}[damage]
        (folder / "state.json").unlink()
        (folder / "dataset_dict.json").write_text(json.dumps(splits))
    error = fault("set", tmp_path)
    assert "not readable as a saved data set" in error.what
    assert error.where == "set"


def test_an_empty_data_set(tmp_path: Path):
    Dataset.from_dict({"n": []}).save_to_disk(str(tmp_path / "set"))
    assert "no rows" in fault("set", tmp_path).what


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "https://huggingface.co/datasets/a/b", "a b", "hf://x"])
def test_what_is_no_name_of_a_data_set(tmp_path: Path, name: str):
    fault(Origin(hub=name), tmp_path)


def test_a_folder_is_not_taken_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets").mkdir()
    assert "path: tickets" in (fault(Origin(hub="tickets"), tmp_path).fix or "")


READ_BY_NAME = """
import json, sys
from pathlib import Path
from whet.data.read.rows import Origin, read_rows
from whet.data.read.chunks import chunks, read_chunk
from whet.errors import WhetError

for name in sys.argv[1:]:
    origin = Origin(hub=name)
    try:
        rows = list(read_rows(origin, base=Path(".")))
        assert rows == [row for chunk in chunks(origin, Path(".")) for row in read_chunk(chunk)]
        print(json.dumps([[row.values, row.where] for row in rows]))
    except WhetError as error:
        print(str(error).replace("\\n", " "))
"""


def by_name(home: Path, *names: str, **environment: str) -> list[str]:
    """What a process of its own says of each name: libraries read these variables when they are imported."""
    variables = os.environ | environment | {"HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READ_BY_NAME, *names]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, cwd=home)
    return done.stdout.splitlines()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: one data set, acme/tickets, of one Parquet file."""

    commit = "1" * 40
    name = "train-00000-of-00001.parquet"
    content = b""

    def answer(self, status: int, body: object, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(raw))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)

    def do_GET(self) -> None:
        address = self.path.partition("?")[0]
        if address.startswith("/datasets/acme/tickets/resolve/"):
            if address.endswith(self.name):
                self.answer(200, self.content, ETag='"1"', X_Repo_Commit=self.commit, Accept_Ranges="bytes")
            else:
                self.answer(404, {}, X_Error_Code="EntryNotFound")
        elif address.startswith("/api/datasets/acme/tickets/tree/"):
            file = {"type": "file", "path": f"data/{self.name}", "size": len(self.content), "oid": "1"}
            self.answer(200, [file])
        elif address.startswith("/api/datasets/acme/tickets"):
            siblings = [{"rfilename": f"data/{self.name}"}]
            self.answer(200, {"id": "acme/tickets", "sha": self.commit, "tags": [], "siblings": siblings})
        else:
            self.answer(404, {}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), buffer)
    Hub.content = buffer.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_data_set_by_name(tmp_path: Path, hub: str):
    """Catches an error for a wrong name that blames the network, a report of the load to whoever counts loads (it is
    refused, and noted), and a set that was downloaded once but needs the network again."""
    read, missing = by_name(tmp_path, "acme/tickets", "acme/nothing", HF_ENDPOINT=hub, HF_HUB_OFFLINE="0")
    assert json.loads(read) == [[{"text": "a"}, "hub:acme/tickets:1"], [{"text": "b"}, "hub:acme/tickets:2"]]
    assert missing.startswith("hub:acme/nothing: ")
    assert "404" in missing
    assert "check name" in missing
    again, unknown = by_name(tmp_path, "acme/tickets", "acme/nothing", HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert again == read
    assert unknown.startswith("hub:acme/nothing: the hub is not reached (HF_HUB_OFFLINE is set)")
    assert "save_to_disk" in unknown
