"""The quickstart's figures, out of a finished run -> a line of bench/results/quickstart.jsonl.

python bench/quickstart.py RUN MINUTES         MINUTES: what `time` said of its steps after set-up
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import ROOT, origin


def main(run: Path, minutes: float) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = next(line for line in reversed(metrics) if line["stage"] == "eval")
    answers = [json.loads(line) for line in (run / "llama_cpp.jsonl").read_text(encoding="utf-8").splitlines()]
    commonest = Counter(answer["reference"] for answer in answers).most_common(1)[0][1]
    line = {
        "kind": "quickstart",
        "base": scores["base"],
        "tuned": scores["tuned"],
        "commonest": commonest / len(answers),
        "agreement": {
            name: sum(answer[name] == answer["whet"] for answer in answers) / len(answers)
            for name in ("q8_0", "q4_k_m")
        },
        "questions": len(answers),
        "minutes": minutes,
        **origin(),
    }
    path = ROOT / "bench" / "results" / "quickstart.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
