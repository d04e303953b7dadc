"""Converted classifiers: at full depth they are the source, to the bit."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, BertForTokenClassification, BertModel

from tiny import EVERY_FAMILY, pad, random_rows, tiny_classifier, tiny_model
from transformers_badge import BadgeForSequenceClassification


BATCH = pad(random_rows([9, 30, 4, 17, 1]))
EAGER_ONLY = {"deberta", "deberta-v2", "megatron-bert", "mpnet"}
# Every family, every way of pooling that a family's own head has, and both kinds of attention.
CASES = [
    (family, fields, attention)
    for family in EVERY_FAMILY
    for fields in (
        [{"classifier_pooling": "cls"}, {"classifier_pooling": "mean"}] if family == "modernbert"
        else [{"classifier_pooling": way} for way in ("bos", "mean", "late")] if family == "eurobert" else [{}]
    )
    for attention in ("sdpa", "eager")
    if attention == "eager" or family not in EAGER_ONLY
]  # fmt: skip


def converted(folder, family="bert", fields=None, attention="eager", **arguments):
    """A classifier as loaded from a checkpoint, and what from_classifier makes of it."""
    tiny_classifier(family, **(fields or {})).save_pretrained(folder)
    source = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention).eval()
    model = BadgeForSequenceClassification.from_classifier(folder, attn_implementation=attention, **arguments)
    return source, model


def train_some_steps(model, steps=3):
    """Steps on labels, with dropout on, which would change anything that is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(**BATCH, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(("family", "fields", "attention"), CASES, ids=str)
def test_full_depth_is_the_source_to_the_bit_before_and_after_training(tmp_path, family, fields, attention):
    source, model = converted(tmp_path, family, fields, attention)
    assert model.encoder.config._attn_implementation == attention
    with torch.no_grad():
        for batch in (BATCH, {"input_ids": BATCH["input_ids"]}):
            expected, before = source(**batch).logits, model(**batch)
            assert expected.shape == (5, 3)
            assert torch.equal(before.logits, expected)
            assert torch.equal(before.exit_logits[:, -1], expected)
    before = model(**BATCH).exit_logits
    train_some_steps(model)
    with torch.no_grad():
        after = model(**BATCH)
        assert torch.equal(after.logits, source(**BATCH).logits)
    assert ((after.exit_logits - before).abs().amax(dim=(0, 2))[:-1] > 1e-3).all()  # the other exits did learn
    model.save_pretrained(tmp_path / "badge")
    loaded = BadgeForSequenceClassification.from_pretrained(tmp_path / "badge", attn_implementation=attention)
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).exit_logits, after.exit_logits)
    train_some_steps(loaded, steps=1)  # a loaded one is as frozen
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, after.logits)


def test_unfrozen_it_does_not_stay_the_source(tmp_path, every_family):
    """Negative control of the test above."""
    source, model = converted(tmp_path, every_family, exit_gradient=1.0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    train_some_steps(model)
    with torch.no_grad():
        assert not torch.allclose(model(**BATCH).logits, source(**BATCH).logits, atol=1e-3)


def test_labels_and_problem_type_are_the_sources(tmp_path):
    names = {0: "bad", 1: "so so", 2: "good"}
    fields = {"id2label": names, "label2id": {n: i for i, n in names.items()},
              "problem_type": "multi_label_classification"}  # fmt: skip
    _, model = converted(tmp_path, fields=fields)
    assert (model.config.id2label, model.config.num_labels) == (names, 3)
    assert model.config.label2id == fields["label2id"]
    assert model.config.problem_type == "multi_label_classification"
    for name in ("num_labels", "id2label", "problem_type", "source_head"):
        with pytest.raises(ValueError, match=f"takes the labels from the source: leave {name} out"):
            BadgeForSequenceClassification.from_classifier(tmp_path, **{name: 2})


def test_only_bypasses_and_inner_exits_are_trainable_and_only_they_have_dropout(tmp_path, every_family):
    _, model = converted(tmp_path, every_family)
    model.train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        name for name, _ in model.named_parameters() if not name.startswith(("encoder.", "exits.3."))
    }  # fmt: skip
    model(**BATCH, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable
    assert not any(module.training for part in (model.encoder, model.exits[-1]) for module in part.modules())
    assert model.exits[0].dropout.training


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_answered_alone_as_in_any_batch(tmp_path, every_family, side):
    _, model = converted(tmp_path, every_family)
    rows = random_rows([9, 30, 4, 17, 1])
    early = model.early_exit_predict(**pad(rows, side, extra=3), threshold=[None, 1e9, None, None])
    assert early.exit_layer.tolist() == [2] * 5
    full = model.early_exit_predict(**pad(rows, side, extra=3), threshold=None)
    for i, row in enumerate(rows):
        alone = model.early_exit_predict(**pad([row]), threshold=None)
        assert torch.allclose(full.logits[i], alone.logits[0], atol=1e-5)


def test_exits_can_stand_at_some_depths_only(tmp_path):
    source, model = converted(tmp_path, exit_layers=[2, 4], bypass_size=0)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, source(**BATCH).logits)
    assert model(**BATCH).exit_logits.shape == (5, 2, 3)
    with pytest.raises(ValueError, match="must be ascending depths from 1 to 4"):
        BadgeForSequenceClassification.from_classifier(tmp_path, exit_layers=[2, 3])


def test_half_precision_stays_half(tmp_path):
    tiny_classifier("bert").to(torch.bfloat16).save_pretrained(tmp_path)
    model = BadgeForSequenceClassification.from_classifier(tmp_path, dtype=torch.bfloat16)
    source = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, source(**BATCH).logits)


def save_as(folder, model):
    model.save_pretrained(folder)
    return folder


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_no_classifier_is_named(tmp_path):
    config = tiny_classifier("bert").config
    for name, kind in (("lm", BertForMaskedLM), ("tokens", BertForTokenClassification), ("bare", BertModel)):
        folder = save_as(tmp_path / name, kind(copy.deepcopy(config)))
        with pytest.raises(ValueError, match=f"holds a {kind.__name__}, where a BertForSequenceClassification is need"):
            BadgeForSequenceClassification.from_classifier(folder)
    tiny_model("bert").save_pretrained(tmp_path / "badge")
    with pytest.raises(ValueError, match="BADGE checkpoint already: load it with from_pretrained"):
        BadgeForSequenceClassification.from_classifier(tmp_path / "badge")
    with pytest.raises(OSError, match="nowhere could not be loaded, as a folder or as a name on the hub"):
        BadgeForSequenceClassification.from_classifier(tmp_path / "nowhere")


def test_an_unsupported_family_is_named_with_those_that_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match=r"'gpt2' is supported; supported are albert, .*docs/encoders\.md"):
        BadgeForSequenceClassification.from_classifier(tmp_path)


def test_a_head_that_is_not_transformers_own_is_named(tmp_path):
    folder = save_as(tmp_path / "other", tiny_classifier("bert"))
    change_weights(folder, lambda weights: weights.update({"extra_layer.weight": torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=r"has extra_layer\.weight, which is unknown.*transformers' own head"):
        BadgeForSequenceClassification.from_classifier(folder)
    change_weights(folder, lambda weights: (weights.pop("extra_layer.weight"), weights.pop("classifier.bias")))
    with pytest.raises(ValueError, match=r"it lacks classifier\.bias"):
        BadgeForSequenceClassification.from_classifier(folder)
    change_weights(folder, lambda weights: weights.update({"classifier.bias": torch.zeros(7)}))
    with pytest.raises(ValueError, match="do not fit its config"):
        BadgeForSequenceClassification.from_classifier(folder)


def test_a_pooler_that_the_classifier_does_not_have_is_no_obstacle(tmp_path):
    """Many RoBERTa classifiers were saved with one."""
    folder = save_as(tmp_path / "roberta", tiny_classifier("roberta"))
    change_weights(folder, lambda weights: weights.update({"roberta.pooler.dense.weight": torch.zeros(32, 32)}))
    assert BadgeForSequenceClassification.from_classifier(folder).config.source_head


def test_a_half_downloaded_checkpoint_is_a_plain_error(tmp_path):
    folder = save_as(tmp_path / "half", tiny_classifier("bert"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(OSError, match="half could not be loaded"):
        BadgeForSequenceClassification.from_classifier(folder)
    weights.unlink()
    with pytest.raises(OSError, match="half could not be loaded"):
        BadgeForSequenceClassification.from_classifier(folder)
