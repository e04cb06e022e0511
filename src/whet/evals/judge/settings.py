"""The rubric, and how the judge is asked.

endpoint: {url: http://localhost:8000/v1, model: NAME, key_env: JUDGE_API_KEY}
criteria:
  - {name: correct, about: The answer states what the reference states., scale: [1, 5]}
repeats: 3
temperature: 0.7
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from whet.evals.endpoint import EndpointSettings

WIDEST = 20  # steps of a scale: models tell few apart


class Criterion(BaseModel):
    """One thing that is graded, on a scale of whole numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$", description="A word of small letters, digits and _.")
    about: str = Field(min_length=1, description="What is graded, as a sentence that is true of a perfect answer.")
    scale: list[int] = Field([1, 5], min_length=2, max_length=2, description="Lowest and highest grade.")
    levels: dict[int, str] = Field(default_factory=dict, description="Grade -> what an answer of that grade is like.")
    weight: float = Field(1.0, gt=0, description="Share in the score, relative to the other criteria's.")

    @model_validator(mode="after")
    def _a_scale(self) -> Criterion:
        if not self.low < self.high <= self.low + WIDEST:
            raise ValueError(f"scale has to rise, by {WIDEST} at most; write the lowest grade first, as [1, 5]")
        if strange := [level for level in self.levels if not self.low <= level <= self.high]:
            raise ValueError(
                f"levels names the grade {strange[0]}, which is not on the scale; use {self.low} to {self.high}"
            )
        return self

    @property
    def low(self) -> int:
        return self.scale[0]

    @property
    def high(self) -> int:
        return self.scale[1]

    @property
    def grades(self) -> range:
        """Every grade, from the lowest."""
        return range(self.low, self.high + 1)

    def share(self, grade: float) -> float:
        """The grade's place on the scale, 0 to 1."""
        return (grade - self.low) / (self.high - self.low)


class JudgeSettings(BaseModel):
    """Who judges, by what, and how often."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    endpoint: EndpointSettings | None = Field(None, description="An OpenAI-compatible server: url, model, key_env.")
    model: str | None = Field(None, min_length=1, description="In its place a local model: a folder or builtin:NAME.")
    load: Literal["nf4", "int8", "16bit", "32bit"] = Field("16bit", description="How a local model is held in memory.")
    criteria: list[Criterion] = Field(min_length=1, max_length=12, description="What is graded: name, about, scale.")
    reference: Literal["required", "optional", "never"] = Field(
        "optional", description="Whether the judge is shown the reference: always, where there is one, or never."
    )
    repeats: int = Field(1, ge=1, le=25, description="Times that each answer is graded.")
    combine: Literal["mean", "majority"] = Field("mean", description="How an answer's repeats become one grade.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 for one repeat; above 0 for several.")
    max_new_tokens: int = Field(1024, ge=16, description="Longest reply of the judge, in tokens.")
    retries: int = Field(2, ge=0, le=10, description="Further questions after a reply that is no verdict.")
    output: Literal["json_schema", "json_object", "text"] = Field(
        "json_schema", description="What the server is told of the reply's form. text: nothing, for servers without it."
    )
    system: bool = Field(True, description="Rubric as a system message; false for templates without one.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the judge's sampling.")

    @field_validator("criteria")
    @classmethod
    def _names_differ(cls, criteria: list[Criterion]) -> list[Criterion]:
        names = [criterion.name for criterion in criteria]
        if len(set(names)) < len(names):
            raise ValueError("two criteria have one name; give each its own")
        return criteria

    @model_validator(mode="after")
    def _consistent(self) -> JudgeSettings:
        if (self.endpoint is None) == (self.model is None):
            raise ValueError("a judge is either an endpoint or a local model; give one of the two")
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError("repeats at temperature 0 ask for the same reply again; set temperature, as 0.7")
        return self
