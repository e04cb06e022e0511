"""Scorers of how much an answer shares with the references: ROUGE, BLEU, chrF, by the libraries that define them.

An item's score is the library's on that item alone; `measures` has its number over all answers, which for BLEU and
chrF is not the mean of the items'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from whet.errors import WhetError
from whet.evals.scorers.base import Each, Kind, Options, Question, Score

EXTRA = 'pip install "whet[eval]"'


class RougeOptions(Options):
    type: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = Field("rougeL", description="What is counted.")
    measure: Literal["fmeasure", "precision", "recall"] = Field("fmeasure", description="Of the counts.")
    stem: bool = Field(False, description="Reduce English words to their stems.")


@dataclass(frozen=True)
class Rouge(Each):
    """ROUGE by rouge-score (Lin 2004), the best over the references."""

    options: RougeOptions
    scorer: Any

    def one(self, question: Question, answer: str) -> Score:
        found = self.scorer.score_multi(list(question.references), answer)[self.options.type]
        return Score(float(getattr(found, self.options.measure)))


def _rouge(options: RougeOptions, folder: Path) -> Rouge:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise WhetError("ROUGE is computed by rouge-score, which is not here", where="scorer", fix=EXTRA) from error
    return Rouge(options, RougeScorer([options.type], use_stemmer=options.stem))


class BleuOptions(Options):
    tokenize: Literal["13a", "intl", "char", "zh", "none"] | None = Field(
        None, description="How BLEU splits words; null for its own choice, 13a."
    )
    lowercase: bool = Field(False, description="Whether case is ignored.")


class ChrfOptions(Options):
    word_order: Literal[0, 2] = Field(0, description="0 for chrF, 2 for chrF++.")
    lowercase: bool = Field(False, description="Whether case is ignored.")


@dataclass(frozen=True)
class SacreBleu(Each):
    """A metric of sacrebleu (Post 2018, arXiv:1804.08771), of 0 to 1 an item and 0 to 100 over all.

    sentence: the metric for one answer. corpus: for all.
    """

    name: str
    sentence: Any
    corpus: Any

    def one(self, question: Question, answer: str) -> Score:
        found = self.sentence.sentence_score(answer, list(question.references)).score
        return Score(min(1.0, max(0.0, found / 100)))

    def measures(self, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
        """The metric over all answers. Questions may have different numbers of references."""
        most = max(len(question.references) for question in questions)
        streams = [[q.references[i] if i < len(q.references) else None for q in questions] for i in range(most)]
        return {self.name: float(self.corpus.corpus_score(list(answers), streams).score)}


def _bleu(options: BleuOptions, folder: Path) -> SacreBleu:
    metrics = _sacrebleu()
    made = [
        metrics.BLEU(tokenize=options.tokenize, lowercase=options.lowercase, effective_order=effective)
        for effective in (True, False)  # sentences are short: sacrebleu itself counts only the orders they have
    ]
    return SacreBleu("bleu", *made)


def _chrf(options: ChrfOptions, folder: Path) -> SacreBleu:
    metrics = _sacrebleu()
    metric = metrics.CHRF(word_order=options.word_order, lowercase=options.lowercase)
    return SacreBleu("chrf++" if options.word_order else "chrf", metric, metric)


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise WhetError(
            "BLEU and chrF are computed by sacrebleu, which is not here", where="scorer", fix=EXTRA
        ) from error
    return sacrebleu


ROUGE = Kind(RougeOptions, _rouge)
BLEU = Kind(BleuOptions, _bleu)
CHRF = Kind(ChrfOptions, _chrf)
