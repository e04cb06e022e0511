"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.errors import WhetError


def plot_loss(steps: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Training loss (nats a token) against the optimizer step, with its running mean, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise WhetError("plots need matplotlib", where=str(path), fix='pip install "whet[plots]"') from None

    x, loss = [line["step"] for line in steps], [line["loss"] for line in steps]
    window = max(1, len(loss) // 20)
    mean = [
        sum(loss[max(0, i - window + 1) : i + 1]) / len(loss[max(0, i - window + 1) : i + 1]) for i in range(len(loss))
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, loss, color="#b9c7d8", linewidth=1, label="each step")
    axes.plot(x, mean, color="#1f4e79", linewidth=2, label=f"mean of {window} steps")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
