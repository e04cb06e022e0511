"""LoRA adapters on one shared base: several in one batch, loaded while others run, and names that are no paths."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serve.engines import ask, greedy, pieces, save, text, with_engine
from whet.errors import WhetError
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.interface import Refused, UnknownModel

PROMPTS = [[5, 6, 7], list(range(40, 70)), [9]]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 4, "use_dora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 24}},
    "with-head": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return save(folder, tiny_llama, "qwen2", tie_word_embeddings=False)  # q, k and v have biases, which DoRA must leave


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(root / name, base, i, **kind) for i, (name, kind) in enumerate(KINDS.items())}


def save_adapter(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter that changes answers: B random in place of zero."""
    everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(**{"target_modules": everywhere, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
            elif "magnitude" in name:
                weight.mul_(torch.rand_like(weight) + 0.5)
    model.save_pretrained(folder)
    return folder


def expected(base: Path, adapter: Path | None) -> list[str]:
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer.decode(greedy(model, prompt, 12), skip_special_tokens=True) for prompt in PROMPTS]


def test_adapters_in_one_batch_answer_as_each_does_alone(base: Path, adapters: dict[str, Path]) -> None:
    """Catches an adapter at a wrong scale or rank, and one that changes another's tokens, or the base's."""
    models = ["base", *adapters]

    async def use(engine: InProcessEngine) -> dict[str, list[str]]:
        asked = [text(engine, ask(prompt, model, 12)) for prompt in PROMPTS for model in models]
        answers = await asyncio.gather(*asked)
        return {model: list(answers[i :: len(models)]) for i, model in enumerate(models)}

    found = with_engine(base, use, adapters=adapters, settings={"max_running": 32, "step_tokens": 50})
    assert found == {"base": expected(base, None)} | {name: expected(base, path) for name, path in adapters.items()}
    assert len({tuple(answers) for answers in found.values()}) == len(models), "an adapter that changes nothing"


def test_an_adapter_is_loaded_and_let_go_while_others_run(base: Path, adapters: dict[str, Path]) -> None:
    """Catches a running answer that changes when an adapter comes or goes, its own included."""

    async def use(engine: InProcessEngine) -> tuple[str, str, list[str]]:
        await engine.load_adapter("first", adapters["plain"])
        own = asyncio.create_task(text(engine, ask(PROMPTS[0], "first", 12)))
        others = asyncio.create_task(text(engine, ask(PROMPTS[0], "base", 12)))
        while not engine.load()["completion_tokens"]:
            await asyncio.sleep(0)
        await engine.load_adapter("second", adapters["dora"])
        await engine.unload_adapter("first")
        with pytest.raises(UnknownModel):
            await text(engine, ask(PROMPTS[0], "first"))
        return await own, await others, [model.name for model in engine.models()]

    own, others, names = with_engine(base, use)
    assert own == expected(base, adapters["plain"])[0]
    assert others == expected(base, None)[0]
    assert names == ["base", "second"]


def test_an_adapter_in_the_folder_is_loaded_when_it_is_asked_for(base: Path, adapters: dict[str, Path]) -> None:
    root = adapters["plain"].parent

    async def use(engine: InProcessEngine) -> tuple[list[tuple[str, str | None]], str]:
        served = [(model.name, model.parent) for model in engine.models()]
        return served, await text(engine, ask(PROMPTS[1], "rslora", 12))

    served, answer = with_engine(base, use, adapters_folder=root)
    assert served == [("base", None), *((name, "base") for name in sorted(KINDS))]
    assert answer == expected(base, adapters["rslora"])[1]


NAMES = [
    "../outside",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "/etc",
    "plain/",
    "plain\0",
    "linked",
    ".hidden",
    "x" * 200,
    "plain\n",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_reaches_nothing_outside_the_folder(
    base: Path, adapters: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Catches a path read from a name, and a link out of the folder."""
    root = tmp_path / "root"
    root.mkdir()
    for made in (tmp_path / "outside", root / ".hidden", root / ("x" * 200)):
        made.symlink_to(adapters["plain"]) if made.name == "outside" else copy(adapters["plain"], made)
    (root / "linked").symlink_to(adapters["plain"])
    copy(adapters["plain"], root / "plain")
    with pytest.raises(UnknownModel):
        with_engine(base, lambda engine: text(engine, ask(PROMPTS[0], name)), adapters_folder=root)


def copy(source: Path, to: Path) -> None:
    to.mkdir()
    for file in source.iterdir():
        (to / file.name).write_bytes(file.read_bytes())


def broken(adapters: dict[str, Path], folder: Path, **config: Any) -> Path:
    """The plain adapter with other settings."""
    copy(adapters["plain"], folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    "config",
    [{"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [1]}],
    ids=lambda config: next(iter(config)),
)
def test_what_is_more_than_a_lora_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    """Catches an adapter that is served without a part of it."""
    folder = broken(adapters, tmp_path / "adapter", **config)
    with pytest.raises(WhetError, match=r"LoRA|shared base"):
        with_engine(base, lambda engine: engine.load_adapter("broken", folder))


@pytest.mark.parametrize("fault", ["shape", "layer", "part", "torn", "lost"])
def test_an_adapter_of_another_base_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    """Catches weights put on layers that they were not trained for, and a path in what the client is told."""
    folder = broken(adapters, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if "lora_A" in key)
    if fault == "shape":
        weights[key] = torch.zeros(4, 32)
    elif fault == "layer":
        weights[key.replace("layers.0", "layers.7")] = weights.pop(key)
    elif fault == "part":
        del weights[key]
    save_file(weights, file)
    if fault == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "lost":
        file.unlink()

    async def use(engine: InProcessEngine) -> str:
        with pytest.raises(Refused) as refused:
            await pieces(engine, ask(PROMPTS[0], "adapter"))
        assert str(tmp_path) not in str(refused.value)
        return await text(engine, ask(PROMPTS[0], max_tokens=12))

    assert with_engine(base, use, adapters_folder=tmp_path) == expected(base, None)[0]
