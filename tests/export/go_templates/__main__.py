"""Makes rendered.json: the Go templates of every chat format, and what Go itself makes of conversations with them.

    python -m tests.export.go_templates

Needs Go's command `go`. The tests read the file, and need none.
"""

from __future__ import annotations

import json
import subprocess

from tests.export.go_templates.cases import FOLDER, RENDERED, cases


def main() -> None:
    made = cases()
    asked = [
        {
            "Template": case["template"],
            "Messages": [{"Role": m["role"], "Content": m["content"]} for m in case["messages"]],
        }
        for case in made
    ]
    command = ["go", "run", str(FOLDER / "render.go")]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    texts = json.loads(done.stdout)
    kept = [{**case, "text": text} for case, text in zip(made, texts, strict=True)]
    RENDERED.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
