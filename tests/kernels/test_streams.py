"""Work on the default stream, in order with the current one; streams are stand-ins that note what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from whet.kernels._streams import on_default_stream


class Stream:
    def __init__(self, name: str, told: list[str]):
        self.name, self.told = name, told

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    default, other = Stream("default", told), Stream("other", told)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        told.append(f"on {chosen.name}")
        yield
        told.append(f"off {chosen.name}")

    current: dict[Any, Stream] = {0: default, 1: other}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[device.index])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return told


def test_another_stream_goes_before_and_waits_after(told: list[str]) -> None:
    """Catches work that reads what the current stream has not written yet, or whose results are read too early."""
    with on_default_stream([torch.device("cuda", 1), torch.device("cpu")]):
        told.append("work")
    assert told == ["default waits for other", "on default", "work", "off default", "other waits for default"]


def test_the_default_stream_is_left_alone(told: list[str]) -> None:
    with on_default_stream([torch.device("cuda", 0)]):
        told.append("work")
    assert told == ["work"]
