"""Exit 0: hashing, and what a model with it says."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tiny import PAD, pad, random_rows, tiny_classifier, tiny_config, tiny_model
from transformers_badge import BadgeForSequenceClassification
from transformers_badge.model.ngrams_badge import MULTIPLIERS, PRIME, ngram_buckets


SEPARATOR = 3
LENGTHS = [9, 30, 4, 17, 1, 12, 25]


def buckets_in_plain_python(ids, ignored, ngrams, buckets):
    """The buckets of one row, as the module's formula has them."""
    runs, current = [], []
    for token in [*ids, None]:
        if token is None or token in ignored:
            if current:
                runs.append(current)
            current = []
        else:
            current.append(token)
    found = []
    for segment, run in enumerate(runs):
        for n in range(1, ngrams + 1):
            for start in range(len(run) - n + 1):
                total = n * MULTIPLIERS[0] + segment * MULTIPLIERS[1]
                total += sum(token * MULTIPLIERS[2 + i] for i, token in enumerate(run[start : start + n]))
                found.append(1 + total % PRIME % (buckets - 1))
    return sorted(found)


def rows_with_separators(seed=0, count=40):
    generator = np.random.default_rng(seed)
    rows = [generator.integers(4, 30_000, generator.integers(1, 40)) for _ in range(count)]
    return [torch.from_numpy(np.where(generator.random(len(row)) < 0.15, SEPARATOR, row)) for row in rows]


def found_in(buckets):
    return [sorted(int(bucket) for bucket in row if bucket) for row in buckets]


@pytest.mark.parametrize("ngrams", [1, 2, 3, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hashing_equals_plain_python(ngrams, side):
    rows = rows_with_separators()
    batch = pad(rows, side, extra=3)
    buckets = ngram_buckets(
        batch["input_ids"].numpy(), batch["attention_mask"].numpy(), [SEPARATOR, PAD], ngrams, 2**18
    )
    expected = [buckets_in_plain_python(row.tolist(), {SEPARATOR, PAD}, ngrams, 2**18) for row in rows]
    assert found_in(buckets) == expected
    # Negative control: other n-grams are something else.
    assert found_in(buckets) != [
        buckets_in_plain_python(row.tolist(), {SEPARATOR}, ngrams % 4 + 1, 2**18) for row in rows
    ]


def test_hashing_is_what_it_was():
    """Checkpoints rest on it: it may never change."""
    ids = np.array([[2, 2054, 1037, 3185, 3, 2307, 3]])
    buckets = ngram_buckets(ids, None, [2, 3], 2, 2**18)
    plain = buckets_in_plain_python(ids[0].tolist(), {2, 3}, 2, 2**18)
    assert found_in(buckets) == [plain]
    assert plain == GOLDEN


GOLDEN = [23569, 27322, 63468, 95800, 102060, 168876]


def test_hashing_is_the_same_in_another_process():
    ids = rows_with_separators(count=1)[0]
    code = (
        "import sys, numpy as np; from transformers_badge.model.ngrams_badge import ngram_buckets; "
        "ids = np.array([[int(i) for i in sys.argv[1].split()]]); "
        "print(ngram_buckets(ids, None, [3], 2, 2**18).flatten().tolist())"
    )
    command = [sys.executable, "-c", code, " ".join(map(str, ids.tolist()))]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "123"}, check=True
    )
    assert done.stdout.strip() == str(ngram_buckets(ids[None].numpy(), None, [3], 2, 2**18).flatten().tolist())


def test_padding_and_special_tokens_are_in_no_ngram():
    row = np.array([7, 8, 9])
    framed = np.array([[2, 7, 8, 9, SEPARATOR, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1, 0, 0]])
    assert found_in(ngram_buckets(framed, mask, [2, SEPARATOR], 2, 1000)) == found_in(
        ngram_buckets(row[None], None, [], 2, 1000)
    )


def test_texts_of_a_pair_are_told_apart():
    pair, swapped = np.array([[7, SEPARATOR, 8]]), np.array([[8, SEPARATOR, 7]])
    doubled = np.array([[7, SEPARATOR, SEPARATOR, 8]])  # as in roberta
    buckets = [found_in(ngram_buckets(ids, None, [SEPARATOR], 2, 2**18)) for ids in (pair, swapped, doubled)]
    assert buckets[0] != buckets[1]
    assert buckets[0] == buckets[2]
    assert len(buckets[0][0]) == 2, "no n-gram reaches from one text into the other"


def test_a_row_of_special_tokens_alone_gets_the_constant():
    model = tiny_model("bert", lexical_exit=True, lexical_ignored_ids=[2, SEPARATOR])
    model.exits[0].bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    ids = torch.tensor([[2, SEPARATOR]])
    assert torch.equal(model(input_ids=ids).exit_logits[:, 0], model.exits[0].bias[None])


def test_exit_0_comes_first_and_every_later_exit_adds_it_through_its_gate():
    model = tiny_model("bert", lexical_exit=True, lexical_filters=0)
    assert model.exit_layers == [0, 1, 2, 3, 4]
    batch = pad(random_rows(LENGTHS))
    with torch.no_grad():
        said = model(**batch).exit_logits
        weight, bias = model.exits[0].weight, model.exits[0].bias
        buckets = model.exits[0].buckets(**batch)
        by_hand = torch.stack([bias + weight[row[row > 0]].sum(0) / np.sqrt((row > 0).sum()) for row in buckets])
        assert torch.allclose(said[:, 0], by_hand, atol=1e-5)
        without = model(**batch, lexical_logits=torch.zeros(len(LENGTHS), 3)).exit_logits
        for index, gate in enumerate([1.0, 0.5, -2.0, 0.0], start=1):
            model.exits[index].lexical_gate.weight.fill_(gate)
        gated = model(**batch).exit_logits
    assert torch.allclose(said[:, 1:] - without[:, 1:], by_hand[:, None].expand(-1, 4, -1), atol=1e-5)
    for index, gate in enumerate([1.0, 0.5, -2.0, 0.0], start=1):
        assert torch.allclose(gated[:, index] - without[:, index], gate * by_hand, atol=1e-5)


def test_a_fresh_exit_0_changes_nothing():
    fresh = BadgeForSequenceClassification(tiny_config("bert", lexical_exit=True)).eval()
    plain = BadgeForSequenceClassification(tiny_config("bert")).eval()
    weights = {name: value for name, value in fresh.state_dict().items() if "lexical_gate" not in name}
    moved = {
        f"exits.{int(name.split('.')[1]) - 1}.{name.split('.', 2)[2]}" if name.startswith("exits.") else name: value
        for name, value in weights.items()
        if not name.startswith("exits.0.")
    }
    plain.load_state_dict(moved)
    batch = pad(random_rows(LENGTHS))
    with torch.no_grad():
        assert torch.equal(fresh(**batch).exit_logits[:, 1:], plain(**batch).exit_logits)


def test_the_last_exit_of_a_converted_classifier_says_what_the_source_says(tmp_path):
    source = tiny_classifier("bert")
    source.save_pretrained(tmp_path)
    model = BadgeForSequenceClassification.from_classifier(tmp_path, lexical_exit=True)
    model.exits[0].weight.normal_()
    batch = pad(random_rows(LENGTHS))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, source(**batch).logits)
    assert not [name for name, _ in model.named_parameters() if name.startswith("exits.4.lexical")]


def test_it_survives_saving_and_is_not_trained(tmp_path):
    model = tiny_model("bert", lexical_exit=True, lexical_buckets=500)
    assert not [name for name, _ in model.named_parameters() if name.startswith("exits.0.")]
    model.save_pretrained(tmp_path)
    again = BadgeForSequenceClassification.from_pretrained(tmp_path)
    batch = pad(random_rows(LENGTHS))
    with torch.no_grad():
        assert torch.equal(again(**batch).exit_logits, model(**batch).exit_logits)
    assert again.exits[0].weight.shape == (500, 3)


@pytest.mark.parametrize("known", [True, False])
def test_later_exits_learn_with_exit_0_where_it_is_given_and_it_stays(known):
    model = tiny_model("bert", lexical_exit=True, exit_dropout=0.0).train()
    before = copy.deepcopy(model.state_dict())
    batch = {**pad(random_rows(LENGTHS)), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0])}
    if known:
        batch["lexical_logits"] = torch.randn(len(LENGTHS), 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    loss = model(**batch).loss
    torch.manual_seed(0)
    without = model(**{**batch, "lexical_logits": torch.zeros(len(LENGTHS), 6)}).loss
    assert torch.equal(loss, without) != known
    loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) != known for name in before if "lexical_gate" in name)
    assert torch.equal(before["exits.0.weight"], after["exits.0.weight"])


@pytest.mark.parametrize("fields", [{}, {"num_labels": 1}, {"problem_type": "regression"}], ids=str)
def test_a_gate_starts_open_but_where_values_are_told(fields):
    model = BadgeForSequenceClassification(tiny_config("bert", lexical_exit=True, **fields))
    assert [exit_.lexical_gate.weight.item() for exit_ in model.exits[1:]] == [0.0 if fields else 1.0] * 4


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_pass_exit_0_go_on_as_if_alone(family, side):
    model = tiny_model(family, lexical_exit=True)
    rows = random_rows(LENGTHS)
    said = model(**pad(rows)).exit_logits[:, 0].detach()
    scores = torch.distributions.Categorical(logits=said).entropy()
    threshold = [float(scores.median()) + 1e-4, *[None] * 4]
    together = model.early_exit_predict(**pad(rows, side), criterion="entropy", threshold=threshold)
    assert set(together.exit_layer.tolist()) == {0, 4}
    for row, layer, logits in zip(rows, together.exit_layer, together.logits, strict=True):
        alone = model.early_exit_predict(**pad([row]), criterion="entropy", threshold=threshold)
        assert alone.exit_layer[0] == layer
        assert torch.allclose(alone.logits[0], logits, atol=1e-4)


def test_rows_that_leave_at_exit_0_run_no_block_and_no_embedding(monkeypatch):
    model = tiny_model("bert", lexical_exit=True)
    monkeypatch.setattr(model.adapter.__class__, "embed", lambda *_: pytest.fail("embedded"))
    output = model.early_exit_predict(**pad(random_rows(LENGTHS)), criterion="entropy", threshold=10.0)
    assert output.exit_layer.tolist() == [0] * len(LENGTHS)


def test_inputs_embeds_without_ids_are_a_plain_error():
    model = tiny_model("bert", lexical_exit=True)
    embeddings = torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="The lexical exit reads input_ids"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="The lexical exit reads input_ids"):
        model.early_exit_predict(inputs_embeds=embeddings)
    assert model(inputs_embeds=embeddings, lexical_logits=torch.zeros(2, 6)).exit_logits.shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("lexical_logits", "error", "message"),
    [
        ([[0.0]], TypeError, "must be a tensor, got list"),
        (torch.zeros(2, 2), ValueError, r"must have the shape \(7, 6\), got \(2, 2\)"),
        (torch.full((7, 6), torch.nan), ValueError, "must be finite"),
    ],
)
def test_bad_lexical_logits_are_a_plain_error(lexical_logits, error, message):
    with pytest.raises(error, match=message):
        tiny_model("bert", lexical_exit=True)(**pad(random_rows(LENGTHS)), lexical_logits=lexical_logits)


def test_lexical_logits_for_a_model_without_exit_0_are_a_plain_error():
    with pytest.raises(ValueError, match="lexical_exit=True only"):
        tiny_model("bert")(**pad(random_rows(LENGTHS)), lexical_logits=torch.zeros(7, 3))


@pytest.mark.parametrize(("dtype", "off_by"), [(torch.float16, 0.1), (torch.bfloat16, 0.1), (torch.float64, 1e-5)])
def test_other_precisions_say_nearly_the_same(dtype, off_by):
    model = tiny_model("bert", lexical_exit=True)
    batch = pad(random_rows(LENGTHS))
    exact = model(**batch).exit_logits[:, 0]
    assert torch.allclose(model.to(dtype)(**batch).exit_logits[:, 0].float(), exact, atol=off_by)


def test_what_is_no_ngram_weighs_nothing():
    """Whatever stands in bucket 0, padding does not change an answer."""
    model = tiny_model("bert", lexical_exit=True)
    row = random_rows([9])
    alone, padded = (model.exits[0](**pad(row, extra=extra)) for extra in (0, 5))
    model.exits[0].weight[0] = 100.0
    assert torch.equal(model.exits[0](**pad(row)), alone)
    assert torch.equal(model.exits[0](**pad(row, extra=5)), padded)
    model.exits[0].weight[1:] += 1.0  # the control: other weights do count
    assert not torch.allclose(model.exits[0](**pad(row)), alone)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_a_compiled_forward_hashes_alike(family):
    """torch.compile traces numpy as if it were torch, where other types have other operations."""
    model = tiny_model(family, lexical_exit=True)
    compiled = torch.compile(model, backend="eager")
    for lengths in ([9, 30, 4], [17, 1]):  # the second time with shapes that are not fixed
        batch = pad(random_rows(lengths))
        torch.testing.assert_close(compiled(**batch).exit_logits, model(**batch).exit_logits)
