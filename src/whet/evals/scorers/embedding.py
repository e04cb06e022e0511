"""A scorer of meaning: the cosine similarity of answer and reference in the space of a local embedding model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from whet.errors import WhetError
from whet.evals.scorers.base import Each, Kind, Options, Question, Score

EXTRA = 'pip install "whet[embeddings]"'


class EmbeddingOptions(Options):
    model: str = Field(description="Folder of a sentence-transformers model, relative to the task.")
    threshold: float | None = Field(
        None, gt=0, le=1, description="Score 1 from this similarity on and 0 below; null scores the similarity itself."
    )


@dataclass
class Embedding(Each):
    """max over the references of max(0, cos(answer, reference)), by sentence-transformers (arXiv:1908.10084)."""

    options: EmbeddingOptions
    folder: Path
    _model: Any = field(default=None, init=False, repr=False)

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Score]:
        """All texts go through the model together."""
        references = [reference for question in questions for reference in question.references]
        vectors = self.model.encode([*answers, *references], normalize_embeddings=True, show_progress_bar=False)
        of_answers, of_references = vectors[: len(answers)], iter(vectors[len(answers) :])
        found = []
        for question, answer, own in zip(questions, answers, of_answers, strict=True):
            nearest = max(float(own @ next(of_references)) for _ in question.references)
            found.append(self.worth(nearest) if answer.strip() else Score(0.0, "an empty answer"))
        return found

    def worth(self, similarity: float) -> Score:
        similarity = min(1.0, max(0.0, similarity))
        if self.options.threshold is None:
            return Score(similarity)
        return Score(float(similarity >= self.options.threshold), f"similarity {similarity:.3f}")

    @property
    def model(self) -> Any:
        """Read when it is first needed, from the folder alone, without code or pickles."""
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                what = "similarity is computed by sentence-transformers, which is not here"
                raise WhetError(what, where="scorer", fix=EXTRA) from error
            try:
                self._model = SentenceTransformer(
                    str(self.folder),
                    local_files_only=True,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True},
                )
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                fix = "name a folder that sentence-transformers has saved"
                raise WhetError(f"the model can't be read: {reason}", where=str(self.folder), fix=fix) from error
        return self._model


def _build(options: EmbeddingOptions, folder: Path) -> Embedding:
    path = (folder / options.model).resolve()
    if not path.is_dir():
        fix = "name a folder that sentence-transformers has saved"
        raise WhetError("there is no such folder", where=str(path), fix=fix)
    return Embedding(options, path)


EMBEDDING = Kind(EmbeddingOptions, _build, reads=("model",))
