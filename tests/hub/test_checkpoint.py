"""What is written beside the weights: policy, model card, digests of the training rows."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny import tiny_model
from transformers_badge import BadgeForSequenceClassification, ExitPolicy, ExitTable
from transformers_badge.exit_table import digest_rows
from transformers_badge.hub import checkpoint as module
from transformers_badge.hub.card import END, START
from transformers_badge.hub.checkpoint import check_checkpoint_folder, write_policy
from transformers_badge.hub.training_rows import save_training_rows, share_trained_on
from transformers_badge.inference.exit_logits import digest_model


CERTIFICATE = {"summary": "With 95% confidence, all is well.", "date": "2026-11-23", "data": "abc"}


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def table_of(texts):
    return ExitTable(exit_logits=np.zeros((len(texts), 2, 2)), exit_layers=(1, 2), row_digests=digest_rows([texts]))


def test_a_policy_is_written_and_nothing_else_of_the_config_changes(folder):
    before = json.loads((folder / "config.json").read_text())
    rule = [[0.1] * 7] * 3
    write_policy(folder, ExitPolicy(criterion="learned", rule=rule, threshold=0.2, certificate=CERTIFICATE))
    after = json.loads((folder / "config.json").read_text())
    assert {name for name in after if after[name] != before.get(name)} == {"exit_policy"}
    policy = BadgeForSequenceClassification.from_pretrained(folder).config.exit_policy
    assert (policy.criterion, policy.threshold, policy.rule) == ("learned", 0.2, tuple(map(tuple, rule)))
    assert policy.certificate == CERTIFICATE


def test_a_certificate_does_not_outlive_the_weights_that_it_was_shown_of(folder, tmp_path, caplog):
    model = BadgeForSequenceClassification.from_pretrained(folder)
    shown = ExitPolicy(threshold=0.25, certificate={**CERTIFICATE, "model": digest_model(model)})
    model.config.exit_policy = shown
    model.save_pretrained(tmp_path / "same")
    same = BadgeForSequenceClassification.from_pretrained(tmp_path / "same")
    assert same.config.exit_policy == shown
    assert "without its certificate" not in caplog.text

    with torch.no_grad():
        same.exits[1].classifier.bias[0] += 1e-3
    same.save_pretrained(tmp_path / "trained on")
    after = BadgeForSequenceClassification.from_pretrained(tmp_path / "trained on").config.exit_policy
    assert after == replace(shown, certificate=None)
    assert "saved without its certificate" in caplog.text


def test_code_that_is_older_than_the_policy_is_renewed(folder):
    (folder / "criteria_badge.py").write_text("# knows nothing of the learned criterion\n")
    write_policy(folder, ExitPolicy(criterion="entropy", threshold=0.2))
    assert "def learned(" in (folder / "criteria_badge.py").read_text()


def test_the_card_is_made_and_renewed_and_the_rest_of_it_is_kept(folder):
    write_policy(folder, ExitPolicy(criterion="entropy", threshold=0.25, certificate=CERTIFICATE))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    assert "Criterion `entropy`, threshold 0.25." in card
    assert "all is well. Calibrated on 2026-11-23, data `abc`." in card
    (folder / "README.md").write_text("# Mine\n\n" + card[card.index(START) :] + "\nAnd more \\1 of mine.\n")
    write_policy(folder, ExitPolicy(criterion="margin", threshold=[0.1, None, 0.3, None]))
    card = (folder / "README.md").read_text()
    assert card.startswith("# Mine\n")
    assert card.endswith("And more \\1 of mine.\n")
    assert "Criterion `margin`, threshold 0.1, closed, 0.3, closed." in card
    assert "Nothing has been shown about this threshold" in card
    assert card.count(START) == card.count(END) == 1
    (folder / "README.md").write_text("# A card without marks\n")
    write_policy(folder, ExitPolicy())
    assert "# A card without marks\n\n" + START in (folder / "README.md").read_text()
    assert "It runs at full depth" in (folder / "README.md").read_text()


def test_a_write_that_fails_leaves_the_config_as_it_was(folder, monkeypatch):
    before = contents(folder)

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_policy(folder, ExitPolicy(threshold=0.2))
    assert contents(folder) == before


def test_bad_checkpoints_and_policies_are_named_and_nothing_is_written(folder, tmp_path, monkeypatch):
    before = contents(folder)
    with pytest.raises(ValueError, match="threshold lists 2 numbers, but the model has 4 exits"):
        write_policy(folder, ExitPolicy(threshold=[0.1, 0.2]))
    with pytest.raises(ValueError, match="rule was fitted to a model with 3 exits, but this one has 4"):
        write_policy(folder, ExitPolicy(criterion="learned", rule=[[0.1] * 7] * 2, threshold=0.2))
    assert contents(folder) == before
    with pytest.raises(OSError, match="There is no checkpoint folder org/name"):
        check_checkpoint_folder("org/name")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(OSError, match="cannot be written to"):
            check_checkpoint_folder(folder)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a 'bert' checkpoint, not a BADGE one"):
        check_checkpoint_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_ty')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        check_checkpoint_folder(tmp_path)


@pytest.mark.parametrize("trained", [300, 5000])
def test_rows_that_were_trained_on_are_told_from_others(tmp_path, trained):
    texts, others = [f"text {i}" for i in range(trained)], [f"other {i}" for i in range(3000)]
    save_training_rows(tmp_path, [texts])
    assert (tmp_path / "training_rows.json").stat().st_size < 25_000
    assert share_trained_on(tmp_path, table_of(others)) == 0.0
    assert share_trained_on(tmp_path, table_of(texts)) == 1.0
    share = share_trained_on(tmp_path, table_of(texts[:300] + others[:900]))
    assert share == pytest.approx(0.25, abs=0 if trained == 300 else 0.08)


def test_where_nothing_is_known_of_the_training_rows_there_is_no_telling(tmp_path):
    assert share_trained_on(tmp_path, table_of(["a", "b"])) is None
    save_training_rows(tmp_path, [["a"]])
    unknown = ExitTable(exit_logits=np.zeros((1, 2, 2)), exit_layers=(1, 2))
    assert share_trained_on(tmp_path, unknown) is None
    (tmp_path / "training_rows.json").write_text("{}")
    with pytest.raises(ValueError, match=r"training_rows\.json is damaged: remove it"):
        share_trained_on(tmp_path, table_of(["a"]))
