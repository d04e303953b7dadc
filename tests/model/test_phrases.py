"""The phrases of exit 0: filters over the vectors of tokens in a row."""

import copy
import json

import numpy as np
import pytest
import torch

from tiny import PAD, VOCABULARY, pad, random_rows, tiny_config, tiny_model, tiny_tokenizer
from transformers_badge import BadgeForSequenceClassification
from transformers_badge.inference.explain import explain_lexical_exit
from transformers_badge.inference.named_stages import LexicalWeights


SPECIAL = [2, 3]
LENGTHS = [9, 30, 4, 17, 1, 12, 25]


@pytest.fixture
def model():
    return tiny_model("bert", lexical_exit=True, lexical_ignored_ids=[PAD, *SPECIAL])


def phrases_in_plain_python(phrases, ids, special):
    """What the phrases say of one row, as the formula in `phrases_badge` has it."""
    vectors, filters, weight = (array.double().numpy() for array in (phrases.vectors, phrases.filters, phrases.weight))
    nothing = [np.zeros(vectors.shape[1])] * 6
    around = [*nothing, *(nothing[0] if token in special else vectors[token] for token in ids), *nothing]
    found = []
    for place in range(len(around) - 6):
        window = np.concatenate(around[place : place + 7])
        found.append([max(0.0, float(window @ filters[:, f])) for f in range(filters.shape[1])])
    words = sum(token not in special for token in ids)
    largest = np.array([max(column) for column in zip(*found, strict=True)])
    summed = np.array([sum(column) for column in zip(*found, strict=True)]) / np.sqrt(max(words, 1))
    return np.concatenate([largest, summed]) @ weight


def said(model, batch):
    """What phrases say, by torch, and by numpy as the engines have it."""
    with torch.no_grad():
        by_torch = model.exits[0](**batch).numpy()
    ids, mask = (batch[name].numpy() for name in ("input_ids", "attention_mask"))
    return by_torch[:, 3:], LexicalWeights.of(model).logits(ids, mask)[:, 3:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_torch_and_numpy_say_what_the_formula_says_however_rows_are_padded(model, side):
    rows = random_rows(LENGTHS)
    rows[3][5] = rows[1][-1] = SPECIAL[1]
    batch = pad(rows, side, extra=3)
    batch["input_ids"][batch["attention_mask"] == 0] = 50  # padding is what the mask says
    expected = [phrases_in_plain_python(model.exits[0].phrases, row.tolist(), SPECIAL) for row in rows]
    for found in said(model, batch):
        assert np.allclose(found, expected, atol=1e-5)
    # Negative control: other words, or the same in another order, say something else.
    for others in (random_rows(LENGTHS, seed=9), [row.flip(0) for row in rows]):
        for found in said(model, pad(others, side)):
            assert (np.abs(found - expected).max(axis=1) > 1e-2)[np.array(LENGTHS) > 3].all()


def test_where_there_are_no_words_nothing_is_said(model):
    for found in said(model, pad([torch.tensor(SPECIAL)], extra=2)):
        assert np.array_equal(found, np.zeros((1, 3)))


def test_what_they_say_enters_every_exit_but_the_last(model):
    batch = pad(random_rows(LENGTHS))
    silent = copy.deepcopy(model)
    silent.exits[0].phrases.weight.zero_()
    with torch.no_grad():
        speaking, without = model(**batch).exit_logits, silent(**batch).exit_logits
        left = model.early_exit_predict(**batch, threshold=float("inf"))
    gates = [1.0, *(exit_.lexical_gate.weight.item() for exit_ in model.exits[1:-1]), 0.0]
    expected = np.array(gates)[:, None] * said(model, batch)[0][:, None]
    assert np.allclose((speaking - without).numpy(), expected, atol=1e-5)
    assert torch.equal(speaking[:, -1], without[:, -1])
    assert (left.exit_layer == 0).all()
    assert torch.allclose(left.logits, speaking[:, 0], atol=1e-6)


def test_fresh_ones_say_nothing_and_none_is_a_choice():
    fresh = BadgeForSequenceClassification(tiny_config("bert", lexical_exit=True)).eval()
    none = BadgeForSequenceClassification(tiny_config("bert", lexical_exit=True, lexical_filters=0)).eval()
    assert not any(buffer.any() for buffer in fresh.exits[0].phrases.buffers())
    assert none.exits[0].phrases is None
    batch = pad(random_rows(LENGTHS))
    for found in said(fresh, batch):
        assert not found.any()
    assert fresh.exits[0](**batch).shape == (len(LENGTHS), 6)
    assert none.exits[0](**batch).shape == (len(LENGTHS), 3)
    assert not any("phrases" in name for name in none.state_dict())


def test_they_are_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = BadgeForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = pad(random_rows(LENGTHS))
    assert loaded.config.lexical_filters == 8
    assert np.array_equal(said(loaded, batch)[0], said(model, batch)[0])


def test_a_checkpoint_from_before_there_were_any_loads_without(tmp_path):
    tiny_model("bert", lexical_exit=True, lexical_filters=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("lexical_filters") == 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert BadgeForSequenceClassification.from_pretrained(tmp_path).exits[0].phrases is None


@pytest.mark.parametrize("size", [VOCABULARY + 6, VOCABULARY - 20])
def test_they_follow_the_vocabulary(model, tmp_path, size):
    rows = [row.clamp(max=VOCABULARY - 21) for row in random_rows(LENGTHS)]
    before = said(model, pad(rows))[0]
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    loaded = BadgeForSequenceClassification.from_pretrained(tmp_path).eval()
    assert np.allclose(said(loaded, pad(rows))[0], before, atol=1e-6)
    if size > VOCABULARY:  # tokens that are added say nothing
        for found in said(loaded, pad([torch.tensor([size - 1])])):
            assert np.array_equal(found, np.zeros((1, 3)))


def test_of_embeddings_there_is_nothing_to_read(model):
    batch = pad(random_rows(LENGTHS))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    lexical_logits = torch.randn(len(LENGTHS), 6)
    with torch.no_grad():
        given = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], lexical_logits=lexical_logits)
    assert torch.equal(given.exit_logits[:, 0], lexical_logits[:, :3] + lexical_logits[:, 3:])


@pytest.mark.parametrize("text", ["w50 w60 w12 w70 w12", "w9", ("w40 w50", "w60 w14")])
def test_an_explanation_adds_up_to_what_the_exit_says(model, text):
    everything = explain_lexical_exit(model, tiny_tokenizer(), [text], top=1000)[0]
    texts = [text] if isinstance(text, str) else list(text)
    ids = torch.tensor([[int(word[1:]) for part in texts for word in part.split()]])
    with torch.no_grad():
        said_ = model.exits[0](ids, None)[0]
    logits = said_[:3] + said_[3:]
    assert (said_[3:].abs() > 1e-3).any(), "the filters say something"
    answer = int(logits.argmax())
    margin = logits - model.exits[0].bias
    others = (margin.sum() - margin[answer]) / 2
    # Only what speaks for the answer is listed: no less than what is left of it in the end.
    assert sum(weight for _, weight in everything) >= float(margin[answer] - others) - 1e-4


def test_an_explanation_names_what_a_filter_looks_for(model):
    phrases = model.exits[0].phrases
    for buffer in (model.exits[0].weight, phrases.filters, phrases.weight):
        buffer.zero_()
    size = phrases.vectors.shape[1]
    pattern = [phrases.vectors[token] / phrases.vectors[token].square().sum() for token in (50, 60)]
    phrases.filters[size : 2 * size, 0], phrases.filters[2 * size : 3 * size, 0] = pattern
    phrases.weight[0, 1] = 5.0  # the largest value of the first filter speaks for the second label
    found = explain_lexical_exit(model, tiny_tokenizer(), ["w9 w50 w60 w9 w8"], top=2)[0]
    assert {word for word, _ in found} == {"w50", "w60"}
    # Each is half of what the filter finds, 2, times 5, less nothing for the other labels.
    assert [weight for _, weight in found] == pytest.approx([5.0, 5.0])
