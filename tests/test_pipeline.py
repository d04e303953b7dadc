"""pipeline("text-classification") over early exit, on the real encoder."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TextClassificationPipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from transformers_badge import BadgeForSequenceClassification, BadgeTextClassificationPipeline


TEXTS = [
    "A lovely film.",
    "Two hours of my life that I will not get back, and the popcorn was stale.",
    "So so.",
    "Go see it!",
]


@pytest.fixture(scope="module")
def checkpoint(minilm, tmp_path_factory):
    """A checkpoint with random exits, whose policy lets texts leave at different layers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    model = BadgeForSequenceClassification.from_encoder(minilm, id2label={0: "bad", 1: "good"})
    with torch.no_grad():
        for exit_ in model.exits:
            exit_.classifier.weight.mul_(10)
    model.config.exit_policy = {"criterion": "entropy", "threshold": [0.5, 0.45, None, None, None, None]}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classify(checkpoint):
    return pipeline("text-classification", model=str(checkpoint), trust_remote_code=True)


def test_label_score_and_exit_layer(checkpoint, classify):
    model = BadgeForSequenceClassification.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    answers = classify(TEXTS)
    assert len({answer["exit_layer"] for answer in answers}) > 1
    for text, answer in zip(TEXTS, answers, strict=True):
        output = model.early_exit_predict(**tokenizer(text, return_tensors="pt"))
        score, label = output.logits.softmax(-1)[0].max(dim=0)
        assert answer.keys() == {"label", "score", "exit_layer"}
        assert answer["label"] == model.config.id2label[int(label)]
        assert answer["score"] == pytest.approx(float(score), abs=1e-5)
        assert answer["exit_layer"] == int(output.exit_layer)


def test_batches_give_the_same_answers(classify):
    alone = [classify(text)[0] for text in TEXTS]
    for batch_size in (2, 4):
        together = classify(TEXTS, batch_size=batch_size)
        assert [a["exit_layer"] for a in together] == [a["exit_layer"] for a in alone]
        assert [a["score"] for a in together] == pytest.approx([a["score"] for a in alone], abs=1e-5)


def test_the_rows_of_a_list_are_regrouped_and_those_of_a_generator_are_not(classify, reviews, monkeypatch):
    texts = reviews[0][:200]
    runs = []
    run_block = type(classify.model).run_block
    monkeypatch.setattr(
        type(classify.model), "run_block", lambda *given: runs.append(len(given[2].hidden_states)) or run_block(*given)
    )

    def answer(given):
        runs.clear()
        answers = list(classify(given, batch_size=4, threshold=0.6))
        return [a["exit_layer"] for a in answers], [a["score"] for a in answers], len(runs), sum(runs)

    layers, scores, regrouped, rows = answer(texts)
    layers_one_by_one, scores_one_by_one, shrinking, rows_one_by_one = answer(text for text in texts)
    assert layers == layers_one_by_one
    assert scores == pytest.approx(scores_one_by_one, abs=1e-5)
    assert rows == rows_one_by_one == sum(layers)
    assert regrouped < 0.75 * shrinking


def test_a_generator_is_read_a_batch_at_a_time(classify):
    read = []
    answers = iter(classify((read.append(text) or text for text in TEXTS * 8), batch_size=4))
    next(answers)
    assert len(read) <= 2 * 4


def test_columns_and_data_sets_are_taken(classify):
    dataset = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]})
    expected = classify(TEXTS)
    assert classify(dataset["text"]) == expected
    assert classify(tuple(TEXTS)) == expected
    assert classify([dict(row) for row in dataset]) == expected
    answers = classify(KeyDataset(dataset, "text"), batch_size=2)
    assert len(answers) == 4
    for _ in range(2):
        assert [answer["exit_layer"] for answer in answers] == [answer["exit_layer"] for answer in expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a film", None], "Text 1 must be a string or, for a pair, .* got NoneType"),
        ([{"text_pair": "a film"}], "Text 0 must be a string or, for a pair, .* got dict"),
        ([["a film", "a play"]], "Text 0 must be a string or, for a pair, .* got list"),
        (3, "Text must be a string or, for a pair, .* got int"),
    ],
)
def test_what_is_no_text_is_named(classify, given, message):
    with pytest.raises(TypeError, match=message):
        classify(given)


def test_no_texts_have_no_answers(classify):
    assert classify([]) == []
    assert classify(()) == []
    assert len(classify("")) == 1  # of which the special tokens are left


def test_the_policy_can_be_set_per_call_and_on_creation(checkpoint, classify):
    assert {a["exit_layer"] for a in classify(TEXTS, threshold=float("inf"))} == {1}
    assert {a["exit_layer"] for a in classify(TEXTS, criterion="patience", patience=2, threshold=0)} <= {3, 4, 5, 6}
    assert len({a["exit_layer"] for a in classify(TEXTS)}) > 1  # a call leaves nothing behind
    never = pipeline("text-classification", model=str(checkpoint), trust_remote_code=True, threshold=0.0)
    assert {a["exit_layer"] for a in never(TEXTS)} == {6}
    with pytest.raises(ValueError, match="threshold must be"):
        classify(TEXTS, threshold=-1)


def test_top_k(classify):
    best = classify(TEXTS, top_k=1)
    every = classify(TEXTS, top_k=None)
    assert [len(answer) for answer in best] == [1] * 4
    assert [len(answer) for answer in every] == [2] * 4
    for one, all_ in zip(best, every, strict=True):
        assert one[0] == all_[0]
        assert sum(entry["score"] for entry in all_) == pytest.approx(1)
        assert len({entry["exit_layer"] for entry in all_}) == 1


def test_pairs(classify):
    pair, alone = classify({"text": "A lovely film.", "text_pair": "Go see it!"}), classify("A lovely film.")[0]
    assert pair.keys() == {"label", "score", "exit_layer"}
    assert pair["score"] != alone["score"]
    mixed = classify([{"text": "A lovely film.", "text_pair": "Go see it!"}, "A lovely film."], batch_size=2)
    assert [answer["score"] for answer in mixed] == pytest.approx([pair["score"], alone["score"]], abs=1e-5)


def test_an_instance_and_the_old_name_work_at_full_depth(checkpoint):
    model = BadgeForSequenceClassification.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for plain in (
        pipeline("text-classification", model=model, tokenizer=tokenizer),
        pipeline("sentiment-analysis", model=str(checkpoint), trust_remote_code=True),
    ):
        assert type(plain) is TextClassificationPipeline
        answers = plain(TEXTS, batch_size=4)
        with torch.no_grad():
            logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        assert [a["score"] for a in answers] == pytest.approx(logits.softmax(-1).amax(-1).tolist(), abs=1e-5)


def test_our_pipeline_takes_an_instance_when_named(checkpoint):
    model = BadgeForSequenceClassification.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    classify = BadgeTextClassificationPipeline(model=model, tokenizer=tokenizer)
    assert classify(TEXTS[0], threshold=float("inf"))[0]["exit_layer"] == 1
