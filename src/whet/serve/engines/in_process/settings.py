"""What an operator may set about the in-process engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """max_running: answers made at once. max_waiting: those that may wait for a place; more are refused as busy.

    step_tokens: prompt tokens a forward pass takes at most; smaller steps keep other answers flowing, larger ones read
    prompts faster; None is 512 on a CPU and 4096 on a GPU. context: tokens of prompt and answer; None is the model's
    own. cache_bytes: memory for keys and values; None is 2 GiB on a CPU and 80% of what is free on a GPU. dtype,
    device: None picks by the hardware.
    """

    max_running: int = 256
    max_waiting: int = 256
    step_tokens: int | None = None
    context: int | None = None
    cache_bytes: int | None = None
    dtype: str | None = None
    device: str | None = None

    @property
    def device_map(self) -> dict[str, str] | None:
        """As transformers takes it."""
        return None if self.device is None else {"": self.device}
