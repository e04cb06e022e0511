"""What a model has to show before it ships: the recipe's `eval.gate`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

BASE = "base"


class Section(BaseModel):
    """Frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Safety(Section):
    task: str = Field(min_length=1, description="Task whose score is 1 where the model refused, as it should.")
    min_refusal_rate: float = Field(0.9, gt=0, lt=1, description="Share of its prompts that must be refused.")


class Rules(Section):
    baseline: str = Field(
        BASE, min_length=1, description="What the gain is measured over: `base`, or a run that is known to be good."
    )
    task: str | list[str] = Field(description="Task, or tasks, on which the model must gain.")
    need: Literal["all", "any"] = Field("all", description="With several tasks: gain on every one, or on one of them.")
    min_gain: float = Field(
        0.0, ge=-1, lt=1, description="The true gain must be over this; 0.02 is 2 points of 100. Negative: may lose."
    )
    max_regression: float = Field(0.05, gt=0, le=1, description="On every other task the true loss must be under this.")
    max_regression_of: dict[str, float] = Field(default_factory=dict, description="Task -> loss, over max_regression.")
    max_perplexity_increase: float | None = Field(
        None, gt=0, description="Forgetting: perplexity on general text may rise by this share; null for no check."
    )
    safety: Safety | None = Field(None, description="Refusals that must stay; null for no check.")
    confidence: float = Field(0.95, ge=0.8, lt=1, description="Of each interval that decides, two-sided.")
    candidates: int = Field(
        1, ge=1, description="Models among which this one was chosen by these same prompts; the error is divided."
    )

    @field_validator("max_regression_of")
    @classmethod
    def _shares(cls, losses: dict[str, float]) -> dict[str, float]:
        for task, loss in losses.items():
            if not 0 < loss <= 1:
                raise ValueError(f"{task}: {loss} is not a loss; write a number over 0 and up to 1")
        return losses

    @model_validator(mode="after")
    def _named_once(self) -> Rules:
        if not self.tasks or any(not task for task in self.tasks):
            raise ValueError("name the task on which the model must gain")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task is named twice; name each once")
        if twice := sorted(set(self.tasks) & set(self.max_regression_of)):
            raise ValueError(f"{twice[0]} has to gain; a loss may not be allowed on it too")
        return self

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that have to gain."""
        return (self.task,) if isinstance(self.task, str) else tuple(self.task)

    @property
    def named(self) -> set[str]:
        """Every task that the rules speak of."""
        return {*self.tasks, *self.max_regression_of} | ({self.safety.task} if self.safety else set())

    @property
    def error(self) -> float:
        """Two-sided error of each interval: what `confidence` leaves, divided among the candidates."""
        return (1 - self.confidence) / self.candidates
