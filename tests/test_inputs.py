"""Bad inputs: one plain sentence each, from `forward` and from `early_exit_predict` alike."""

import pytest
import torch

from tiny import pad, random_rows, tiny_model


GOOD = pad(random_rows([5, 3]))
IDS, MASK = GOOD["input_ids"], GOOD["attention_mask"]


@pytest.mark.parametrize("method", ["forward", "early_exit_predict"])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 32)}, ValueError, "and not both"),
        (
            {"input_ids": IDS.tolist()},
            TypeError,
            "input_ids must be a tensor, got list; tokenize with return_tensors='pt'",
        ),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must have the shape \(rows, tokens\), got \(5,\)"),
        ({"input_ids": IDS[:0]}, ValueError, "The batch is empty"),
        ({"input_ids": IDS[:, :0]}, ValueError, "The rows have no tokens"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be whole numbers, got torch.float32"),
        ({"input_ids": IDS + 100}, ValueError, r"input_ids must be in \[0, 100\), the encoder's vocabulary, got"),
        ({"input_ids": IDS - 100}, ValueError, r"input_ids must be in \[0, 100\), the encoder's vocabulary, got -"),
        ({"input_ids": IDS, "attention_mask": MASK * 0}, ValueError, "attention_mask is all zero in row 0"),
        ({"input_ids": IDS, "attention_mask": MASK * torch.tensor([[1], [0]])}, ValueError, "all zero in row 1"),
        ({"input_ids": IDS, "attention_mask": MASK * 2}, ValueError, "only 0 .* and 1"),
        ({"input_ids": IDS, "attention_mask": MASK * 0.5}, ValueError, "only 0 .* and 1"),
        ({"input_ids": IDS, "attention_mask": MASK.bfloat16()}, TypeError, "whole numbers or booleans, got .*bfloat16"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :-1]},
            ValueError,
            r"the shape \(2, 5\) of input_ids, got \(2, 4\)",
        ),
        ({"input_ids": IDS, "attention_mask": MASK.tolist()}, TypeError, "attention_mask must be a tensor"),
        (
            {"inputs_embeds": torch.zeros(2, 5)},
            ValueError,
            r"inputs_embeds must have the shape \(rows, tokens, hidden\)",
        ),
    ],
)
def test_bad_inputs(bert, method, inputs, error, message):
    with pytest.raises(error, match=message):
        getattr(bert, method)(**inputs)


def test_text_beyond_the_position_limit(model):
    limit = model.adapter.max_tokens(model.config.encoder_config)
    row = torch.full((1, limit), 5)
    assert model(input_ids=row).logits.shape == (1, 3)
    with pytest.raises(
        ValueError, match=f"{limit + 1} tokens, but this encoder takes at most {limit}: tokenize with truncation"
    ):
        model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("problem_type", "labels", "error", "message"),
    [
        (None, torch.tensor([0, 3]), ValueError, r"labels must be in \[0, 3\), got 3"),
        (None, torch.tensor([-100, 1]), ValueError, r"labels must be in \[0, 3\), got -100"),
        (None, torch.tensor([0, 1, 2]), ValueError, r"labels must have the shape \(2,\)"),
        (None, [0, 1], TypeError, "labels must be a tensor, got list"),
        (
            "single_label_classification",
            torch.tensor([0.0, 1.0]),
            TypeError,
            "must be whole numbers, got torch.float32",
        ),
        (
            "multi_label_classification",
            torch.tensor([[0, 1, 1], [0, 0, 1]]),
            TypeError,
            "must be floats .* or booleans",
        ),
        ("multi_label_classification", torch.tensor([0.0, 1.0]), ValueError, r"must have the shape \(2, 3\)"),
        ("multi_label_classification", torch.full((2, 3), 2.0), ValueError, r"must be in \[0, 1\]"),
        ("regression", torch.full((2, 3), float("nan")), ValueError, "labels must be finite"),
        ("regression", torch.zeros(2, 2), ValueError, r"must have the shape \(2, 3\), got \(2, 2\)"),
    ],
)
def test_bad_labels(problem_type, labels, error, message):
    model = tiny_model("bert", problem_type=problem_type)
    with pytest.raises(error, match=message):
        model(**GOOD, labels=labels)
    assert model.config.problem_type == problem_type  # a failed call settles nothing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"criterion": "vibes", "threshold": 1}, "criterion must be one of"),
        ({"threshold": float("nan")}, "threshold must be a number >= 0"),
        ({"threshold": [0.1, 0.2, 0.3]}, "lists 3 numbers, but the model has 4 exits: give one per exit"),
        ({"treshold": 0.1}, "does not know 'treshold'"),
        ({"policy": "fast"}, "must be an ExitPolicy or a dict, got 'fast'"),
    ],
)
def test_bad_policies_for_one_call(bert, overrides, message):
    with pytest.raises(ValueError, match=message):
        bert.early_exit_predict(**GOOD, **overrides)
