"""Training on kept states is training through the encoder."""

import copy

import numpy as np
import pytest
import torch

from tiny import pad, random_rows, tiny_classifier
from transformers_badge import BadgeForSequenceClassification
from transformers_badge.training import kept_states
from transformers_badge.training.convert import convert_classifier
from transformers_badge.training.kept_states import KeptStates, can_keep, keep_states
from transformers_badge.training.recipes import distillation_losses


BATCHES = [pad(random_rows([9, 30, 4], seed=1)), pad(random_rows([5, 7], seed=2))]


def converted(folder, family="bert", **fields):
    tiny_classifier(family).save_pretrained(folder)
    torch.manual_seed(0)
    model = BadgeForSequenceClassification.from_classifier(folder, **{"pooling": "mean", **fields})
    for bypass in model.bypasses:
        torch.nn.init.normal_(bypass.up.weight, std=0.3)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pooling": "cls"},
        {"bypass_size": 0, "exit_layers": [2, 4]},
        {"bypass_size": 0, "bypass_reads": "block_input"},
        {"lexical_exit": True, "exit_layers": [0, 2, 4]},
        {"lexical_exit": True, "lexical_filters": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2", "albert"])
def test_logits_and_gradients_are_those_of_the_encoder(tmp_path, kind, fields):
    model = converted(tmp_path, kind, **fields)
    assert can_keep(model)
    batches = BATCHES
    if model.config.lexical_exit:
        columns = model.config.lexical_columns
        batches = [{**batch, "lexical_logits": torch.randn(len(batch["input_ids"]), columns)} for batch in BATCHES]
    rows = keep_states(model, batches, 5, tmp_path / "states.npy")
    assert rows.states.shape == (5, len(model.exit_layers), 32)
    assert [path.name for path in tmp_path.glob("states*")] == ["states.npy"]

    stand_in = copy.deepcopy(model)
    stand_in.adapter = KeptStates(model.exit_layers, model.num_labels)
    kept = stand_in(**{name: torch.stack([rows[i][name] for i in range(5)]) for name in rows[0]}).exit_logits
    through = torch.cat([model(**batch).exit_logits for batch in batches])
    assert torch.allclose(kept, through, atol=1e-6)
    for one, logits in ((stand_in, kept), (model, through)):
        distillation_losses(logits, "single_label_classification", 1.0).sum().backward()
        assert any(parameter.grad is not None for parameter in one.parameters())
    for (name, one), (_, other) in zip(stand_in.named_parameters(), model.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-6), name


def test_kept_states_of_other_rows_are_noticed(tmp_path):
    """Negative control of the test above."""
    model = converted(tmp_path)
    keep_states(model, BATCHES, 5, tmp_path / "states.npy")
    states = np.load(tmp_path / "states.npy")
    model.adapter = KeptStates(model.exit_layers, model.num_labels)
    right = model(inputs_embeds=torch.from_numpy(states)).exit_logits
    states[:, 1] = np.roll(states[:, 1], 1, axis=0)
    assert not torch.allclose(model(inputs_embeds=torch.from_numpy(states)).exit_logits, right, atol=1e-3)


def test_exits_that_read_every_token_cannot_be_trained_on_kept_states(tmp_path):
    assert not can_keep(converted(tmp_path / "a", pooling="attention"))
    assert not can_keep(converted(tmp_path / "b", bypass_reads="block_output"))
    assert not can_keep(converted(tmp_path / "c", exit_gradient=1.0))
    assert not can_keep(converted(tmp_path / "d", "modernbert"))


def test_an_interrupted_pass_leaves_no_file(tmp_path):
    def stopping():
        yield BATCHES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_states(converted(tmp_path), stopping(), 5, tmp_path / "states.npy")
    assert not (tmp_path / "states.npy").exists()


def test_a_conversion_uses_them_where_it_can(tmp_path, minilm, monkeypatch):
    from transformers import AutoTokenizer

    tiny_classifier("bert", vocab_size=30522, pad_token_id=0).save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "source")
    texts, passes, keep = [f"text number {i}" for i in range(80)], [], kept_states.keep_states
    monkeypatch.setattr(kept_states, "keep_states", lambda *given: passes.append(1) or keep(*given))
    report = convert_classifier(tmp_path / "source", texts, tmp_path / "kept", pooling="mean", epochs=1, fill_up_to=100)
    assert passes == [1]
    assert report["exit_agreement"][-1] == 1.0
    convert_classifier(tmp_path / "source", texts, tmp_path / "not", epochs=1, fill_up_to=0)
    convert_classifier(tmp_path / "source", texts, tmp_path / "labelled", epochs=1, pooling="mean", labels=[0] * 80)
    assert passes == [1]
    loaded = BadgeForSequenceClassification.from_pretrained(tmp_path / "kept")
    source = tiny_classifier("bert", vocab_size=30522, pad_token_id=0)
    with torch.no_grad():
        assert torch.allclose(loaded(**BATCHES[0]).logits, source(**BATCHES[0]).logits, atol=1e-6)
