"""Models for names: a transformers token classifier and a spaCy pipeline, made here; and folders that are neither."""

from __future__ import annotations

import json

import pytest
import torch

from whet.data.redact.find import Finder
from whet.data.redact.recognizers_ner import entity_of, name_model
from whet.errors import WhetError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ruth", "quenby", "met", "ortiz", "in", "ulm", "."]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A one-layer BERT that reads "ruth quenby" as a person and "ulm" as a place: its head looks at embeddings."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    torch.manual_seed(0)
    labels = ["O", "B-PER", "I-PER", "B-LOC"]
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=34,
        id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
    )  # fmt: skip
    model = BertForTokenClassification(config)
    wanted = {"ruth": 1, "quenby": 2, "ulm": 3}
    with torch.no_grad():
        for module in model.bert.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.zero_()
                module.bias.zero_()
        model.bert.embeddings.position_embeddings.weight.zero_()
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        words = model.bert.embeddings.word_embeddings.weight
        words.zero_()
        words[:, 4] = 1.0
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        for word, label in wanted.items():
            words[WORDS.index(word)] = torch.nn.functional.one_hot(torch.tensor(label), 16) * 4.0
            model.classifier.weight[label, label] = 9.0
        model.classifier.weight[0, 4] = 9.0
    model.save_pretrained(folder)
    return folder


def found(finder, text):
    return [(span.entity, text[span.start : span.end]) for span in finder.find([text])[0]]


def test_a_transformers_folder_finds_names_and_places(classifier):
    finder = Finder(["PERSON", "LOCATION", "EMAIL"], ner=classifier)
    assert found(finder, "İ Ruth Quenby met Ortiz in Ulm .") == [("PERSON", "Ruth Quenby"), ("LOCATION", "Ulm")]
    assert finder.not_covered == {}
    assert finder.covered == {"PERSON", "LOCATION", "EMAIL"}


def test_a_name_past_the_models_length_is_found(classifier):
    """Catches truncation: a transformer reads 32 tokens here, and the rest of the text would go out as it is."""
    text = "met . " * 60 + "Ruth Quenby"
    assert found(Finder(["PERSON"], ner=classifier), text) == [("PERSON", "Ruth Quenby")]


def test_empty_texts_keep_their_places(classifier):
    spans = Finder(["PERSON"], ner=classifier).find(["", "  ", "Ruth Quenby", ""])
    assert [len(some) for some in spans] == [0, 0, 1, 0]


def test_the_model_is_not_asked_for_other_classes(tmp_path):
    """Catches a model that is loaded for nothing; the folder here could not be."""
    assert Finder(["EMAIL"], ner=tmp_path).not_covered == {}


def test_a_spacy_folder(tmp_path):
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns(
        [
            {"label": "PERSON", "pattern": "Ruth Quenby"},
            {"label": "GPE", "pattern": "Ulm"},
            {"label": "ORG", "pattern": "Acme"},
        ]
    )
    nlp.to_disk(tmp_path / "model")
    finder = Finder(["PERSON", "LOCATION"], ner=tmp_path / "model")
    assert finder.not_covered == {}
    assert found(finder, "Ruth Quenby of Acme in Ulm") == [("PERSON", "Ruth Quenby"), ("LOCATION", "Ulm")]
    assert finder.find(["", "Ulm"])[0] == []


def test_what_a_model_covers_is_told_without_its_weights(classifier, tmp_path):
    """Catches a model of gigabytes that is read in the parent process for one sentence of the data card."""
    for file in classifier.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    finder = Finder(["PERSON", "LOCATION"], ner=tmp_path)
    assert finder.not_covered == {}
    with pytest.raises(WhetError, match="cannot be read"):
        finder.find(["Ruth"])


@pytest.mark.parametrize(("label", "left"), [("B-PER", "LOCATION"), ("GPE", "PERSON")])
def test_a_class_that_the_model_has_no_label_for_is_not_covered(label, left, tmp_path):
    """Catches the card's "every class is covered" beside a model that knows people alone."""
    config = {"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": label}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    finder = Finder(["PERSON", "LOCATION", "EMAIL"], ner=tmp_path)
    assert list(finder.not_covered) == [left]
    assert "the NER model has no label for it" in finder.not_covered[left]
    assert finder.covered == {"PERSON", "LOCATION", "EMAIL"} - {left}


def test_a_model_that_knows_neither_is_refused_with_its_labels(tmp_path):
    """Catches labels that were never named: LABEL_1 would find nothing, in silence."""
    config = {"architectures": ["BertForTokenClassification"], "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WhetError, match="neither people nor places: LABEL_0, LABEL_1"):
        Finder(["PERSON"], ner=tmp_path)


def test_a_spacy_folder_of_another_component_covers_nothing(tmp_path):
    """Catches labels of a tagger or a classifier taken for those of entities."""
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    nlp.add_pipe("textcat_multilabel").add_label("PERSON")
    nlp.initialize()
    nlp.to_disk(tmp_path)
    with pytest.raises(WhetError, match="neither people nor places: none"):
        name_model(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(WhetError, match="does not exist"):
        name_model(tmp_path / "none")
    with pytest.raises(WhetError, match="no model for names"):
        name_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(WhetError, match="no model for names"):
        name_model(tmp_path)


def test_pickled_weights_are_refused(classifier, tmp_path):
    """Catches a fall-back to pytorch_model.bin, which runs code as it is read."""
    for file in classifier.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WhetError, match="cannot be read"):
        name_model(tmp_path).load()


@pytest.mark.parametrize(
    ("label", "entity"),
    [("B-PER", "PERSON"), ("I-LOC", "LOCATION"), ("GPE", "LOCATION"), ("person", "PERSON"), ("ORG", None), ("O", None)],
)
def test_labels_of_models(label, entity):
    assert entity_of(label) == entity
