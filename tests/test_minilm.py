"""A real encoder and real reviews: fine-tuning that learns, then save, load, predict and pipeline."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline, set_seed

from transformers_badge import BadgeForSequenceClassification, ExitTable, calibrate, make_exit_table
from transformers_badge.calibration.replay import replay
from transformers_badge.inference.predict import predict_texts
from transformers_badge.training.fine_tune import make_trainer, tokenize


TRAIN, HELD_OUT = slice(0, 640), slice(640, 940)
MAX_TOKENS = 32


@pytest.fixture(scope="module")
def trained(minilm, reviews, tmp_path_factory):
    """A model trained on some hundred reviews, with what Trainer logged and predicted."""
    set_seed(0)
    texts, labels = reviews
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = BadgeForSequenceClassification.from_encoder(minilm, id2label={0: "negative", 1: "positive"})
    train = tokenize(tokenizer, [texts[TRAIN]], labels[TRAIN].tolist(), MAX_TOKENS)
    held_out = tokenize(tokenizer, [texts[HELD_OUT]], labels[HELD_OUT].tolist(), MAX_TOKENS)
    folder = tmp_path_factory.mktemp("minilm")
    trainer = make_trainer(
        model, tokenizer, train, held_out, folder / "run", epochs=2, learning_rate=2e-4, new_learning_rate=2e-3
    )
    trainer.train()
    prediction = trainer.predict(held_out)
    model.eval()
    table = make_exit_table(model, tokenizer, [texts[HELD_OUT]], labels[HELD_OUT], max_tokens=MAX_TOKENS)
    model.config.exit_policy = calibrate(table, max_risk=0.03)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model, folder / "model", trainer.state.log_history, prediction


def test_fine_tuning_learns(trained, reviews):
    _, _, history, prediction = trained
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    majority = max(reviews[1][HELD_OUT].mean(), 1 - reviews[1][HELD_OUT].mean())
    assert losses[-1] < 0.85 * losses[0]
    assert prediction.metrics["test_accuracy"] > majority + 0.15
    assert prediction.metrics["test_accuracy_exit_1"] > majority + 0.05


def test_a_loaded_checkpoint_answers_as_the_trained_model(trained, reviews):
    model, folder, _, _ = trained
    texts = reviews[0][HELD_OUT][:64]
    loaded, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        exit_logits = loaded(**batch).exit_logits
        assert torch.equal(exit_logits, model(**batch).exit_logits)
    assert model.config.exit_policy.threshold is not None
    table = ExitTable(exit_logits=exit_logits.numpy(), exit_layers=tuple(model.exit_layers))
    taken = replay(table, model.config.exit_policy)
    assert len(set(taken)) > 1
    assert loaded.early_exit_predict(**batch).exit_layer.tolist() == (taken + 1).tolist()


def test_pipeline_and_predict_give_the_same_answers(trained, reviews):
    _, folder, _, _ = trained
    texts = reviews[0][HELD_OUT][:40]
    classify = pipeline("text-classification", model=str(folder), trust_remote_code=True)
    by_pipeline = classify(texts, batch_size=8)
    model, tokenizer = BadgeForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    by_predict = predict_texts(model, tokenizer, texts, batch_size=16)
    for one, other in zip(by_pipeline, by_predict, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["exit_layer"] == other["exit_layer"]
    assert np.mean([answer["exit_layer"] for answer in by_predict]) < 6
