"""GLiNER folders: a model of some thousand weights, made and trained here, and folders that would go to the network."""

from __future__ import annotations

import json
import random
import sys
import warnings

import pytest
import torch

from whet.data.redact.find import Finder
from whet.data.redact.recognizers_gliner import PACKAGE
from whet.data.redact.recognizers_ner import name_model
from whet.errors import WhetError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ruth", "quenby", "met", "ortiz", "in", "ulm", ".", "person", "location"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A one-layer BERT under GLiNER's heads that has learned "ruth quenby" and "ulm" by heart."""
    pytest.importorskip("gliner", reason=f'GLiNER folders are NOT TESTED: pip install "{PACKAGE}"')
    from gliner.config import UniEncoderSpanConfig
    from gliner.model import UniEncoderSpanGLiNER
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    base, folder = tmp_path_factory.mktemp("encoder"), tmp_path_factory.mktemp("gliner")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    fast.add_tokens(["<<ENT>>", "<<SEP>>"], special_tokens=True)
    fast.save_pretrained(base)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(fast), max_position_embeddings=64, **sizes)).save_pretrained(base)
    torch.manual_seed(0)
    random.seed(0)  # the package shuffles labels
    options = {"max_width": 3, "max_len": 24, "dropout": 0.0, "num_rnn_layers": 0, "embed_ent_token": False}
    model = UniEncoderSpanGLiNER(UniEncoderSpanConfig(model_name=str(base), hidden_size=16, **options))
    model.resize_embeddings()
    learn(model)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def learn(model):
    sentences = [
        (["met", "Ruth", "Quenby", "in", "Ulm", "."], [[1, 2, "person"], [4, 4, "location"]]),
        (["Ruth", "Quenby", ".", "Ulm"], [[0, 1, "person"], [3, 3, "location"]]),
        (["in", "Ulm", "met", "met", "Ruth", "Quenby"], [[1, 1, "location"], [4, 5, "person"]]),
        (["met", ".", "met", ".", "met", "Ulm", "Ruth", "Quenby"], [[5, 5, "location"], [6, 7, "person"]]),
        (["met", "."] * 8 + ["Ruth", "Quenby", "in", "Ulm", "."], [[16, 17, "person"], [19, 19, "location"]]),
    ]
    rows = [{"tokenized_text": words, "ner": spans} for words, spans in sentences]
    collate = model.data_collator_class(model.config, data_processor=model.data_processor, prepare_labels=True)
    places = model.model.token_rep_layer.bert_layer.model.embeddings.position_embeddings.weight.requires_grad_(False)
    places.zero_()  # what it learns at one place it knows at all
    optimizer = torch.optim.Adam(model.model.parameters(), lr=1e-2)
    model.model.train()
    for _ in range(200):
        loss = model.model(**collate(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def found(finder, text):
    return [(span.entity, text[span.start : span.end]) for span in finder.find([text])[0]]


def test_a_gliner_folder_finds_names_and_places(folder):
    finder = Finder(["PERSON", "LOCATION"], ner=folder)
    assert finder.not_covered == {}
    assert found(finder, "met  Ruth Quenby\tin Ulm .") == [("PERSON", "Ruth Quenby"), ("LOCATION", "Ulm")]
    assert finder.find(["", " \n", "in Ulm met met"])[:2] == [[], []]


def test_a_name_past_the_models_length_is_found_and_nothing_is_cut(folder):
    """Catches truncation: the model reads 24 words here, and the rest of the text would go out as it is."""
    finder = Finder(["PERSON", "LOCATION"], ner=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for words in (17, 22, 23, 60, 200):
            assert ("PERSON", "Ruth Quenby") in found(finder, "met . " * words + "met Ruth Quenby in Ulm ."), words


def copied(folder, tmp_path, without=(), **changes):
    for file in folder.iterdir():
        if file.name not in without:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "gliner_config.json").read_text())
    (tmp_path / "gliner_config.json").write_text(json.dumps(config | changes))
    return tmp_path


@pytest.fixture
def described(tmp_path):
    """What a complete folder has, as far as it is looked at before the package is."""
    made = tmp_path / "model"
    made.mkdir()
    config = {"encoder_config": {"model_type": "bert"}, "model_name": "bert-base-cased"}
    (made / "gliner_config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "model.safetensors"):
        (made / name).write_text("{}")
    return made


@pytest.mark.parametrize(
    ("without", "changes", "what"),
    [
        ("tokenizer_config.json", {}, "the tokenizer is not in this folder"),
        ("", {"encoder_config": None}, "the configuration of the encoder"),
        ("model.safetensors", {}, "model.safetensors is not"),
        ("", {"labels_encoder": "BAAI/bge-small"}, "needs labels_encoder"),
        ("", {"encoder_config": {"auto_map": {"AutoModel": "x--y.z"}}}, "code of its own"),
        ("", {"words_splitter_type": "stanza"}, "another splitter"),
    ],
)
def test_folders_that_would_fetch_run_or_unpickle_are_refused(described, tmp_path, without, changes, what):
    """Catches the package's own ways: it asks the hub for what is missing, and reads pytorch_model.bin."""
    (tmp_path / "copy").mkdir()
    model = name_model(copied(described, tmp_path / "copy", {without}, **changes))
    with pytest.raises(WhetError, match=what):
        model.load()


def test_a_missing_package_is_named_with_its_version(described, monkeypatch):
    """Catches "pip install gliner", whose newest version takes transformers back behind what whet needs."""
    monkeypatch.setitem(sys.modules, "gliner", None)
    with pytest.raises(WhetError) as raised:
        Finder(["PERSON"], ner=described).find(["Ruth"])
    assert PACKAGE in str(raised.value.fix)
