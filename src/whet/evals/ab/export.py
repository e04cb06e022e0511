"""Results as JSON (everything), CSV (a line a vote), and in words."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from pathlib import Path

from whet.evals.ab.results import Ballot, Duel, Results
from whet.evals.statistics import Interval
from whet.files import refused_when_full, write_text

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the start of a formula."""


def as_json(results: Results) -> str:
    return json.dumps(asdict(results), indent=1, allow_nan=False) + "\n"


def as_csv(results: Results) -> str:
    """Texts that a spreadsheet would run get an apostrophe in front, which it hides."""
    names = [field.name for field in fields(Ballot)]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(names)
    for ballot in results.ballots:
        writer.writerow([_harmless(getattr(ballot, name) or "") for name in names])
    return file.getvalue()


def save(text: str, path: Path) -> None:
    """Write one of them; folders that are not there are made."""
    with refused_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def as_text(results: Results) -> str:
    """What a terminal shows."""
    lines = [f"{results.title}: {results.items:,} items, {len(results.graders)} graders, closed {results.closed}"]
    for duel in results.duels:
        lines += _duel(duel)
    for strength in results.strengths:
        lines.append(f"{strength.system}: preferred to {results.systems[0]} with chance {shown(strength.chance)}")
    agreement = results.agreement
    lines.append(
        f"agreement: {share(agreement.agreeing)} of pairs of votes alike, alpha {number(agreement.alpha)}, "
        f"ordinal {number(agreement.ordinal)}, on {agreement.comparisons:,} comparisons"
    )
    return "\n".join(lines) + "\n"


def _duel(duel: Duel) -> list[str]:
    won, tied, lost = duel.votes
    return [
        f"{duel.second} against {duel.first}, {duel.items:,} items ({duel.identical:,} with the same answers):",
        f"  win rate       {shown(duel.win_rate)}, ties as half",
        f"  without ties   {shown(duel.decided)}",
        f"  items          {duel.wins:,} won, {duel.ties:,} tied, {duel.losses:,} lost; sign test p = {duel.p:.2g}",
        f"  votes          {won:,} won, {tied:,} tied, {lost:,} lost, {duel.skips:,} skipped",
    ]


def shown(interval: Interval | None) -> str:
    """63.0% [52.1%, 72.8%]"""
    if interval is None:
        return "n/a"
    return f"{share(interval.estimate)} [{share(interval.low)}, {share(interval.high)}]"


def share(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}%"


def number(interval: Interval | None) -> str:
    """0.41 [0.22, 0.58]"""
    return "n/a" if interval is None else f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _harmless(text: str) -> str:
    return "'" + text if text.startswith(FORMULA) else text
