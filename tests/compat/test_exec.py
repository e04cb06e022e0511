"""`run_script`: what a script sees, what the libraries see, and what is left when it is over."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl

import whet
from tests import warm
from whet.compat.exec import TRL_NAMES, run_script
from whet.errors import WhetError

REAL_TRL_SFT, REAL_ARGUMENTS = trl.SFTTrainer, transformers.TrainingArguments


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """run(source, *argv): the script's global `seen`, a dict it fills."""

    def run(source: str, *argv: str) -> dict[str, Any]:
        script = tmp_path / "script.py"
        script.write_text(
            f"import sys\nseen = sys.modules.setdefault('seen_by_test', {{}})\n{source}", encoding="utf-8"
        )
        seen: dict[str, Any] = {}
        sys.modules["seen_by_test"] = seen  # type: ignore[assignment]
        try:
            run_script(script, argv)
        finally:
            del sys.modules["seen_by_test"]
        return seen

    return run


def test_names_come_from_whet_however_they_are_imported(run: Callable[..., Any]) -> None:
    seen = run(
        "import transformers, trl, transformers as t\n"
        "from transformers import TrainingArguments\n"
        "from trl import SFTTrainer, ORPOConfig, GRPOConfig as G\n"
        "seen |= dict(a=TrainingArguments, b=transformers.TrainingArguments, c=t.TrainingArguments, d=SFTTrainer,\n"
        "  e=trl.SFTTrainer, f=ORPOConfig, g=G, star={})\n"
        "exec('from trl import *', seen['star'])\n"
    )
    assert seen["a"] is seen["b"] is seen["c"] is whet.TrainingArguments
    assert seen["d"] is seen["e"] is whet.SFTTrainer
    assert (seen["f"], seen["g"]) == (whet.ORPOConfig, whet.GRPOConfig)


def test_all_six_trainers_and_their_configs_are_adapted(run: Callable[..., Any]) -> None:
    seen = run(f"import trl\nseen |= {{name: getattr(trl, name) for name in {sorted(TRL_NAMES)}}}")
    assert len(seen) == 12
    assert all(value is getattr(whet, name) for name, value in seen.items())


def test_everything_else_is_the_library_s(run: Callable[..., Any]) -> None:
    seen = run(
        "import transformers, trl, transformers.models.mistral.modeling_mistral\n"
        "from transformers import AutoTokenizer, set_seed\n"
        "from transformers.training_args import TrainingArguments as Inner\n"
        "from transformers.models.llama import LlamaConfig\n"
        "from trl.trainer.sft_trainer import SFTTrainer as InnerTrainer\n"
        "import trl.experimental.orpo as orpo\n"
        "seen |= dict(tok=AutoTokenizer, inner=Inner, llama=LlamaConfig, trainer=InnerTrainer, orpo=orpo,\n"
        "  mistral=transformers.models.mistral.modeling_mistral, version=transformers.__version__,\n"
        "  pack=trl.pack_dataset)\n"
    )
    assert seen["tok"] is transformers.AutoTokenizer
    assert seen["inner"] is REAL_ARGUMENTS
    assert seen["llama"] is transformers.LlamaConfig
    assert seen["trainer"] is REAL_TRL_SFT
    assert seen["mistral"] is sys.modules["transformers.models.mistral.modeling_mistral"]
    assert seen["version"] == transformers.__version__
    assert seen["pack"] is trl.pack_dataset
    assert seen["orpo"].ORPOTrainer in whet.ORPOTrainer.__mro__


LATE = """
import sys
late = "trl.experimental.cpo.cpo_config", "trl.experimental.sdft.sdft_config", "peft.tuners.adamss.asa_callback"
assert not set(late) & set(sys.modules), "imported before: the test would show nothing"
from trl.experimental.cpo import CPOConfig
from trl.experimental.sdft import sdft_config
from peft.tuners.adamss import asa_callback
import transformers
real = transformers.training_args.TrainingArguments
assert sdft_config.TrainingArguments is real
assert asa_callback.TrainingArguments is real
assert transformers.TrainingArguments is not real
assert transformers.TrainingArguments not in CPOConfig.__mro__
print("as it should")
"""


def test_libraries_that_import_late_see_their_own_names(tmp_path: Path) -> None:
    """Catches a TRL config, imported for the first time by the script, being built on whet's TrainingArguments."""
    (tmp_path / "script.py").write_text(LATE, encoding="utf-8")
    done = warm.run(run_script, "script.py", cwd=tmp_path)
    assert done.stdout == "as it should\n", done.stderr


def test_the_real_modules_are_not_touched_and_come_back(run: Callable[..., Any]) -> None:
    before = {name: dict(vars(module)) for name, module in (("trl", trl), ("transformers", transformers))}
    path, argv = list(sys.path), list(sys.argv)
    run("import unsloth, trl, transformers\nfrom trl import SFTTrainer\nfrom transformers import TrainingArguments")
    assert sys.modules["trl"] is trl
    assert sys.modules["transformers"] is transformers
    assert "unsloth" not in sys.modules
    assert "unsloth.chat_templates" not in sys.modules
    assert (sys.path, sys.argv) == (path, argv)
    assert trl.SFTTrainer is REAL_TRL_SFT
    assert transformers.TrainingArguments is REAL_ARGUMENTS
    for name, module in (("trl", trl), ("transformers", transformers)):
        assert all(vars(module)[key] is value for key, value in before[name].items())


def test_modules_come_back_after_a_failure(run: Callable[..., Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        run("1 / 0")
    assert sys.modules["trl"] is trl
    assert "unsloth" not in sys.modules


@pytest.mark.parametrize("code", [0, 3, "a message"])
def test_the_script_s_exit_passes_through(code: Any, run: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit) as raised:
        run(f"sys.exit({code!r})")
    assert raised.value.code == code


def test_the_script_is_the_main_program(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("from unsloth import FastLanguageModel\nvalue = 7\n", encoding="utf-8")
    seen = run(
        "import beside_it\nif __name__ == '__main__': seen |= dict(argv=sys.argv, value=beside_it.value)",
        "--lr",
        "1",
    )
    assert seen == {"argv": [str(tmp_path / "script.py"), "--lr", "1"], "value": 7}


def test_a_missing_script(tmp_path: Path) -> None:
    with pytest.raises(WhetError, match=r"missing\.py: there is no script here"):
        run_script(tmp_path / "missing.py")


def test_what_was_adapted_is_said_once(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run("from trl import SFTTrainer\nimport unsloth")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("whet exec:") == 1
    assert "trl.SFTTrainer" in said.err


# ---------------------------------------------------------------- unsloth


def test_unsloth_is_whet(run: Callable[..., Any]) -> None:
    seen = run(
        "from unsloth import FastLanguageModel, FastModel, is_bfloat16_supported\n"
        "from unsloth.chat_templates import (get_chat_template, train_on_responses_only, standardize_sharegpt,\n"
        "  standardize_data_formats, to_sharegpt)\n"
        "import unsloth\n"
        "seen |= dict(model=FastLanguageModel, bf16=is_bfloat16_supported(), template=get_chat_template,\n"
        "  responses=train_on_responses_only, same=unsloth.chat_templates.to_sharegpt is to_sharegpt)\n"
    )
    assert seen["model"] is whet.FastLanguageModel
    assert isinstance(seen["bf16"], bool)
    assert seen["template"] is whet.get_chat_template
    assert seen["responses"] is whet.train_on_responses_only
    assert seen["same"]


@pytest.mark.parametrize(
    "statement", ["from unsloth import FastVisionModel", "import unsloth; unsloth.FastVisionModel"]
)
def test_what_whet_does_not_have_is_an_import_error_that_says_so(statement: str, run: Callable[..., Any]) -> None:
    with pytest.raises(ImportError, match="whet has no 'FastVisionModel' for 'unsloth'; it has FastLanguageModel"):
        run(statement)


def test_a_submodule_that_whet_does_not_have(run: Callable[..., Any]) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"unsloth\.kernels"):
        run("import unsloth.kernels")


def test_a_learning_rate_for_embeddings_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(WhetError, match="embedding_learning_rate"):
        run("from unsloth import UnslothTrainingArguments\nUnslothTrainingArguments(embedding_learning_rate=1e-5)")


def test_unsloth_s_arguments_are_a_config(run: Callable[..., Any]) -> None:
    seen = run(
        "from unsloth import UnslothTrainer, UnslothTrainingArguments as Arguments\n"
        "seen |= dict(trainer=UnslothTrainer, args=Arguments(output_dir='x', warmup_ratio=0.1))"
    )
    assert seen["trainer"] is whet.SFTTrainer
    assert isinstance(seen["args"], whet.SFTConfig)
    assert seen["args"].warmup_steps == 0.1


def test_functions_of_the_script_can_be_mapped_over_a_data_set(run: Callable[..., Any]) -> None:
    """Catches an adapter in a function's globals that datasets cannot fingerprint."""
    seen = run(
        "import transformers, trl, unsloth\nfrom datasets import Dataset\n"
        "def add(row):\n"
        "  return {'b': row['a'] + len(transformers.__name__) + len(trl.__name__) + len(unsloth.__name__)}\n"
        "from datasets.fingerprint import Hasher\n"
        "seen['hash'] = Hasher.hash(add)\n"
        "seen['rows'] = Dataset.from_dict({'a': [1]}).map(add, num_proc=1)['b'][0]\n"
    )
    assert seen["rows"] == 1 + len("transformers") + len("trl") + len("unsloth")
    assert seen["hash"]
