"""Converting a classifier, on a tiny one that has learnt something from real words."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from tiny import tiny_classifier
from transformers_badge import BadgeForSequenceClassification
from transformers_badge.inference.predict import predict_texts
from transformers_badge.training import fine_tune
from transformers_badge.training.convert import convert_classifier


WORDS = ["film", "plot", "actor", "music", "scene", "ending", "book", "play"]
TEXTS = [f"a {kind} {word} number {i}" for i in range(20) for word in WORDS for kind in ("good", "bad", "dull")]


def teach(classifier, tokenizer):
    """Teach a classifier what the words say, so that its answers are worth learning."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(TEXTS), 16):
        texts = [TEXTS[i] for i in order[start : start + 16]]
        labels = torch.tensor([0 if " good " in text else 1 if " bad " in text else 2 for text in texts])
        classifier(**tokenizer(texts, padding=True, return_tensors="pt"), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return classifier.eval()


@pytest.fixture(scope="module")
def source(minilm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    names = {0: "good", 1: "bad", 2: "dull"}
    fields = {"vocab_size": tokenizer.vocab_size, "pad_token_id": 0, "initializer_range": 0.05, "id2label": names,
              "label2id": {name: i for i, name in names.items()}}  # fmt: skip
    classifier = teach(tiny_classifier("bert", **fields), tokenizer)
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "badge"
    report = convert_classifier(
        source, TEXTS, folder, max_disagreement=0.05, epochs=4, learning_rate=1e-2, lexical_exit=True, fill_up_to=400
    )
    return folder, report


def weights(folder):
    return BadgeForSequenceClassification.from_pretrained(folder).state_dict()


def test_at_full_depth_the_converted_model_is_the_source(source, converted):
    model = BadgeForSequenceClassification.from_pretrained(converted[0])
    plain = AutoModelForSequenceClassification.from_pretrained(source).eval()
    batch = AutoTokenizer.from_pretrained(converted[0])(TEXTS[:40], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert model.config.id2label == {0: "good", 1: "bad", 2: "dull"}


def test_the_exits_learn_and_the_report_is_what_the_model_does(converted):
    folder, report = converted
    assert report == json.loads((folder / "conversion.json").read_text())
    assert report["rows"] == {"taught": 336, "made_up": 64, "chosen": 96, "reported": 48}
    assert report["exit_agreement"][-1] == 1.0
    assert min(report["exit_agreement"]) > 0.9
    # From texts that the encoder has not seen gates can learn.
    gates = [value.item() for name, value in weights(folder).items() if "lexical_gate" in name]
    assert len(gates) == report["exit_layers"][-1] - 1
    assert all(gate != 1 for gate in gates)
    assert report["layer_speedup"] > 1.5
    model, tokenizer = BadgeForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.exit_policy.to_dict() == report["policy"]
    order = np.random.default_rng(0).permutation(len(TEXTS))
    reported = [TEXTS[i] for i in order[96 : 96 + 48]]
    early, full = predict_texts(model, tokenizer, reported), predict_texts(model, tokenizer, reported, threshold=None)
    differ = np.mean([one["label"] != other["label"] for one, other in zip(early, full, strict=True)])
    assert differ == pytest.approx(report["disagreement"])
    assert np.mean([answer["exit_layer"] for answer in early]) == pytest.approx(report["mean_exit_layer"])


def test_only_a_whole_checkpoint_is_left(converted):
    folder, _ = converted
    assert [path.name for path in folder.parent.iterdir()] == ["badge"]
    with pytest.raises(OSError, match="exists and is not an empty folder"):
        convert_classifier("anything", TEXTS, folder)


def test_exit_0_alone_needs_no_training(source, tmp_path):
    report = convert_classifier(
        source, TEXTS, tmp_path / "badge", max_disagreement=0.05, exit_layers=[4], lexical_exit=True, fill_up_to=0
    )
    assert report["exit_layers"] == [0, 4]
    assert report["exit_agreement"][0] > 0.9
    assert report["layer_speedup"] > 2


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_an_interrupted_conversion_goes_on_where_it_was(source, tmp_path, monkeypatch):
    make_trainer, started = fine_tune.make_trainer, []

    def interrupted(*arguments, **settings):
        trainer = make_trainer(*arguments, **settings)
        trainer.add_callback(Interrupt())
        return trainer

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            started.append(state.global_step)

    def counted(*arguments, **settings):
        trainer = make_trainer(*arguments, **settings)
        trainer.add_callback(Count())
        return trainer

    texts = TEXTS[:240]
    whole = tmp_path / "whole"
    convert_classifier(source, texts, whole, epochs=2, lexical_exit=True, fill_up_to=200)
    monkeypatch.setattr(fine_tune, "make_trainer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_classifier(source, texts, tmp_path / "badge", epochs=2, lexical_exit=True, fill_up_to=200)
    assert not (tmp_path / "badge").exists()

    monkeypatch.setattr(fine_tune, "make_trainer", counted)
    with pytest.raises(ValueError, match="unfinished conversion with other settings or texts"):
        convert_classifier(source, texts, tmp_path / "badge", epochs=3)
    # a checkpoint that was cut short while it was written is passed over
    trainer = tmp_path / "badge.unfinished" / "trainer"
    (last,) = trainer.glob("checkpoint-*")
    shutil.copytree(last, trainer / "checkpoint-99")
    (trainer / "checkpoint-99" / "trainer_state.json").write_text("{")
    convert_classifier(source, texts, tmp_path / "badge", epochs=2, lexical_exit=True, fill_up_to=200)
    assert started[0] == int(last.name.split("-")[1]) > 0
    resumed, expected = weights(tmp_path / "badge"), weights(whole)
    assert all(torch.allclose(resumed[name], weight, atol=1e-6) for name, weight in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["badge", "whole"]


def test_labels_are_learnt_beside_the_answers(source, tmp_path):
    """Labels that contradict the source pull the exits away from it."""
    wrong = [(0 if " good " in text else 1 if " bad " in text else 2) for text in TEXTS]
    wrong = [(label + 1) % 3 for label in wrong]
    report = convert_classifier(
        source, TEXTS, tmp_path / "badge", labels=wrong, epochs=4, learning_rate=1e-2, lexical_exit=True
    )
    assert report["exit_agreement"][0] < 0.9


def test_pairs_fields_and_an_empty_folder_are_taken(source, tmp_path):
    (tmp_path / "badge").mkdir()
    pairs = list(zip(TEXTS[:80], TEXTS[80:160], strict=True))
    report = convert_classifier(
        source, pairs, tmp_path / "badge", epochs=1, exit_layers=[2, 4], bypass_size=0,
        pooling="mean", criterion="patience", max_tokens=8, fill_up_to=100,
    )  # fmt: skip
    assert report["exit_layers"] == [2, 4]
    config = BadgeForSequenceClassification.from_pretrained(tmp_path / "badge").config
    assert (config.bypass_size, config.pooling, config.exit_policy.criterion) == (0, "mean", "patience")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": TEXTS[:20]}, "There are 20 texts, of which 14 are trained on: fewer than one batch of 32"),
        ({"texts": []}, "There are 0 texts"),
        ({"labels": [0, 1]}, "There are 2 labels for 480 texts"),
        ({"labels": [3] * len(TEXTS)}, r"labels must be class indices in \[0, 3\)"),
        ({"max_disagreement": 1.0}, "max_disagreement must be a share above 0 .* and below 1, such as 0.01, got 1.0"),
        ({"max_disagreement": 0}, "max_disagreement must be a share above 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"epochs": -1}, "epochs must be above 0"),
        ({"fill_up_to": -1}, "fill_up_to must be a number of rows, or 0 to make none up, got -1"),
        ({"fill_up_to": 900, "labels": [0] * len(TEXTS)}, "Rows that are made up have no labels: give none, or leave"),
        ({"criterion": "vibes"}, "criterion must be one of"),
        ({"exit_layers": [4]}, "leaves no exit to train"),
        ({"exit_layer": [2, 4]}, "does not know 'exit_layer'"),
        ({"bypass_size": -1}, "bypass_size must be 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_calls_are_named_and_nothing_is_written(source, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert_classifier(source, change.pop("texts", TEXTS), tmp_path / "badge", **change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "must be a list of texts, got a single one"),
        (["a text", 7], "all be texts"),
        (["a text", ("a", "pair")], "got \\('a', 'pair'\\) at 1"),
        ([("one", "two", "three")], "all pairs of texts"),
    ],
)
def test_what_are_no_texts_is_named(source, tmp_path, texts, message):
    with pytest.raises(TypeError, match=message):
        convert_classifier(source, texts, tmp_path / "badge")
    assert list(tmp_path.iterdir()) == []


def test_a_regression_model_is_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    tiny_classifier("bert", num_labels=1, vocab_size=30522).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="predicts values, not classes"):
        convert_classifier(tmp_path / "source", TEXTS, tmp_path / "badge")


def test_multi_label_models_are_converted(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "source")
    report = convert_classifier(
        tmp_path / "source", TEXTS, tmp_path / "badge", epochs=4, learning_rate=1e-2, fill_up_to=0
    )
    assert min(report["exit_agreement"]) > 0.8
    with pytest.raises(ValueError, match="Labels are of use for problem_type='single_label_classification' only"):
        convert_classifier(tmp_path / "source", TEXTS, tmp_path / "other", labels=[0] * len(TEXTS))
