"""`early_exit_stream`: rows regrouped across batches are answered as one row at a time, in bounded memory."""

import itertools
import re
import threading
import weakref
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tiny import PAD, in_threads, pad, random_rows, tiny_model
from transformers_badge import ExitPolicy, ExitTable
from transformers_badge.calibration.replay import score_exits
from transformers_badge.model import stream_badge
from transformers_badge.model.outputs_badge import BlockState
from transformers_badge.model.stream_badge import LEXICAL_BATCH, stream_with_policy


ORDERS = {
    "random": lambda lengths: np.random.default_rng(5).permutation(len(lengths)),
    "short to long": lambda lengths: np.argsort(lengths, kind="stable"),
    "long to short": lambda lengths: np.argsort(-lengths, kind="stable"),
    "all long first": lambda lengths: np.argsort(lengths < 30, kind="stable"),
}


class Answered:
    """Rows of one model, each answered alone, and which of them have a score too close to a threshold to compare."""

    def __init__(self, model, size, policy=None, **overrides):
        self.model = model
        self.policy = ExitPolicy.of(policy or {"criterion": "entropy", "threshold": 0.75}, **overrides)
        self.lengths = np.random.default_rng(1).integers(1, 60, size)
        self.rows = [row.tolist() for row in random_rows(self.lengths.tolist(), seed=2)]
        outputs = [
            model.early_exit_predict(torch.tensor([row]), policy=self.policy, output_exit_logits=True)
            for row in self.rows
        ]
        self.logits = torch.cat([output.logits for output in outputs])
        self.layers = torch.cat([output.exit_layer for output in outputs]).numpy()
        exit_logits = torch.cat([output.exit_logits for output in outputs]).numpy()
        problem_type = model.config.problem_type or "single_label_classification"
        table = ExitTable(exit_logits=exit_logits, exit_layers=tuple(model.exit_layers), problem_type=problem_type)
        limits = [np.inf if limit is None else limit for limit in self.policy.thresholds(len(model.exit_layers))]
        gaps = np.abs(score_exits(table, self.policy) - limits)
        self.close = (gaps <= 1e-5).any(axis=1)
        assert self.close.mean() < 0.01, "hardly any row may be excused"

    def stream(self, order, batch_size=32, **options):
        """The stream's answers to the rows in some order."""
        rows = ({"input_ids": self.rows[row]} for row in order)
        return list(self.model.early_exit_stream(rows, batch_size, policy=self.policy, **options))

    def differing(self, answers, order):
        """How many rows are answered otherwise than one at a time."""
        assert sorted(answer.index for answer in answers) == list(range(len(order)))
        wrong = 0
        for answer in answers:
            row = order[answer.index]
            same = answer.exit_layer == self.layers[row] and torch.allclose(answer.logits, self.logits[row], atol=1e-4)
            wrong += not same and not self.close[row]
        return wrong

    def wrong(self, order, batch_size=32, **options):
        """How many rows the stream answers otherwise."""
        return self.differing(self.stream(order, batch_size, **options), order)


@pytest.fixture(scope="module")
def plain():
    return tiny_model("bert")


@pytest.fixture(scope="module", params=["without exit 0", "with exit 0"])
def answered(request):
    return Answered(tiny_model("bert", lexical_exit=request.param == "with exit 0"), 5000)


@pytest.fixture
def short_sight(monkeypatch):
    """So little read ahead that a few hundred rows are a long stream."""
    monkeypatch.setattr(stream_badge, "READ_AHEAD", 3)
    monkeypatch.setattr(stream_badge, "WINDOW", 5)


def test_5000_rows_are_answered_as_one_at_a_time(answered):
    assert set(answered.layers) == set(answered.model.exit_layers), "rows must leave at all depths"
    order = np.arange(5000)
    answers = answered.stream(order)
    assert [answer.index for answer in answers] == order.tolist()
    assert answers[0].logits.shape == (3,)
    assert answers[0].logits.dtype == torch.float32
    assert isinstance(answers[0].exit_layer, int)
    assert answered.differing(answers, order) == 0


def test_as_they_finish_the_answers_are_the_same(answered):
    order = np.arange(1500)
    answers = answered.stream(order, in_order=False)
    assert [answer.index for answer in answers] != order.tolist()
    assert answered.differing(answers, order) == 0


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("batch_size", [1, 3, 32, 64])
def test_neither_batch_size_nor_order_of_arrival_matters(answered, batch_size, order, short_sight):
    chosen = ORDERS[order](answered.lengths[: 150 if batch_size < 32 else 600])
    assert answered.wrong(chosen, batch_size) == 0
    if batch_size == 3:
        assert answered.wrong(chosen, batch_size, in_order=False) == 0


def test_a_merge_that_forgets_the_padding_is_caught(answered, monkeypatch, short_sight):
    """Negative control."""
    model = answered.model
    correct = model.merge

    def wrong(states, masks):
        state, mask = correct(states, masks)
        if state.hidden_states is None:
            return state, mask
        arguments = model.adapter.block_arguments(model.encoder, state.hidden_states, None, None)
        return replace(state, attention_mask=None, block_arguments=arguments), mask

    monkeypatch.setattr(model, "merge", wrong, raising=False)
    assert answered.wrong(np.arange(300)) > 0


def test_a_merge_that_swaps_rows_is_caught(answered, monkeypatch, short_sight):
    """Negative control."""
    correct = answered.model.merge
    monkeypatch.setattr(
        answered.model, "merge", lambda states, masks: correct(states[::-1], masks[::-1]), raising=False
    )
    assert answered.wrong(np.arange(300)) > 0


@pytest.mark.parametrize(
    "family", ["deberta-v2", "distilbert", "eurobert", "megatron-bert", "modernbert", "mpnet", "nomic_bert", "roberta"]
)
def test_every_kind_of_family(family, short_sight):
    answered = Answered(tiny_model(family), 90)
    assert len(set(answered.layers)) >= 3
    assert answered.wrong(np.arange(90), 8) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"bypass_reads": "block_output"},
        {"bypass_reads": "block_input", "exit_layers": [2, 3, 4]},
        {"bypass_reads": "block_input", "exit_layers": [2, 4], "lexical_exit": True, "pooling": "mean"},
        {"bypass_size": 0, "pooling": "cls"},
        {"source_head": True, "encoder": {"num_labels": 3}},
        {"problem_type": "multi_label_classification"},
    ],
    ids=str,
)
def test_every_kind_of_exit(fields, short_sight):
    threshold = 0.55 if fields.get("problem_type") else 0.75
    answered = Answered(tiny_model("bert", **fields), 120, criterion="entropy", threshold=threshold)
    assert len(set(answered.layers)) >= 2
    assert answered.wrong(np.arange(120), 8) == 0


@pytest.mark.parametrize(
    "policy",
    [
        {"threshold": [0.5, None, 0.9, None]},
        {"threshold": [None, None, 0.8, 0.1]},
        {"threshold": None},
        {"threshold": float("inf")},
        {"criterion": "dge", "window": 3, "threshold": 0.7},
        {"criterion": "patience", "patience": 2, "threshold": 0},
    ],
    ids=str,
)
def test_every_kind_of_policy(plain, policy, short_sight):
    answered = Answered(plain, 120, policy) if policy.get("criterion") != "patience" else _without_scores(plain, policy)
    assert answered.wrong(np.arange(120), 8) == 0


def _without_scores(model, policy):
    """Scores that count exits are never close to a threshold without being equal to it."""
    answered = Answered(model, 120)
    outputs = [model.early_exit_predict(torch.tensor([row]), policy=policy) for row in answered.rows]
    answered.policy, answered.close = ExitPolicy.of(policy), np.zeros(120, dtype=bool)
    answered.logits = torch.cat([output.logits for output in outputs])
    answered.layers = torch.cat([output.exit_layer for output in outputs]).numpy()
    return answered


def test_token_types_and_masks_are_those_of_the_row(bert, short_sight):
    generator = np.random.default_rng(0)
    rows = []
    for ids in random_rows(generator.integers(2, 40, 60).tolist()):
        row = {"input_ids": ids.tolist(), "label": "left alone"}
        if generator.random() < 0.5:
            row["token_type_ids"] = generator.integers(0, 2, len(ids)).tolist()
        if generator.random() < 0.5:
            row["attention_mask"] = [*generator.integers(0, 2, len(ids) - 1).tolist(), 1]
        rows.append(row)
    bert.config.exit_policy = {"criterion": "entropy", "threshold": 0.75}
    for row, answer in zip(rows, bert.early_exit_stream(rows, 4), strict=True):
        alone = bert.early_exit_predict(**{name: torch.tensor([row[name]]) for name in row if name != "label"})
        assert answer.exit_layer == int(alone.exit_layer)
        assert torch.allclose(answer.logits, alone.logits[0], atol=1e-4)


def test_texts_and_pairs(minilm, reviews, short_sight):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = tiny_model("bert", encoder={"vocab_size": len(tokenizer), "pad_token_id": 0})
    texts = [*reviews[0][:40], "long " * 500]
    for rows in (texts, list(itertools.pairwise(texts))):
        answers = list(model.early_exit_stream(iter(rows), 4, tokenizer=tokenizer, criterion="entropy", threshold=0.75))
        assert len(answers) == len(rows)
        for row, answer in zip(rows, answers, strict=True):
            columns = [row] if isinstance(row, str) else list(row)
            inputs = tokenizer(*columns, truncation=True, max_length=160, return_tensors="pt")
            alone = model.early_exit_predict(**inputs, criterion="entropy", threshold=0.75)
            assert answer.exit_layer == int(alone.exit_layer)
            assert torch.allclose(answer.logits, alone.logits[0], atol=1e-4)


def test_an_empty_stream_and_a_single_row(plain):
    assert list(plain.early_exit_stream([])) == []
    assert list(plain.early_exit_stream([], tokenizer=Words())) == []
    (answer,) = plain.early_exit_stream(iter([{"input_ids": [5, 6]}]))
    assert (answer.index, answer.exit_layer) == (0, 4)
    assert torch.allclose(answer.logits, plain(input_ids=torch.tensor([[5, 6]])).logits[0], atol=1e-5)


class Words:
    """A tokenizer: a word is the number of its letters."""

    model_max_length = 50

    def __call__(self, texts, pairs=None, truncation=True, max_length=None):
        joined = texts if pairs is None else [f"{a} {b}" for a, b in zip(texts, pairs, strict=True)]
        return {"input_ids": [[len(word) + PAD for word in text.split()][:max_length] for text in joined]}


@pytest.mark.parametrize("rows", [[{"input_ids": [3, 4]}] * 11, ["some text"] * 11], ids=["tokens", "texts"])
@pytest.mark.parametrize("in_order", [True, False])
def test_rows_before_an_error_are_answered_first(plain, rows, in_order, short_sight):
    def breaking():
        yield from rows
        raise ConnectionError("the source is gone")

    answers = plain.early_exit_stream(
        breaking(),
        2,
        tokenizer=Words() if isinstance(rows[0], str) else None,
        in_order=in_order,
        criterion="entropy",
        threshold=0.75,
    )
    seen, error = until_error(answers)
    assert isinstance(error, ConnectionError)
    assert sorted(seen) == list(range(11))
    assert next(answers, None) is None


def until_error(answers):
    """The indices of the answers, and the error that ended them."""
    seen = []
    try:
        for answer in answers:
            seen.append(answer.index)
    except Exception as error:
        return seen, error
    return seen, None


GOOD = {"input_ids": [3, 4]}


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ("a text", TypeError, "Row 2 must be a dict with input_ids, got str; texts need a tokenizer"),
        ([3, 4], TypeError, "Row 2 must be a dict with input_ids, got list"),
        ({"label": 1}, ValueError, "Row 2 has no input_ids"),
        ({"input_ids": []}, ValueError, "Row 2 has no tokens"),
        ({"input_ids": [3, 4], "attention_mask": [0, 0]}, ValueError, "Row 2 has no tokens"),
        ({"input_ids": [3, 4], "attention_mask": [1, 2]}, ValueError, "attention_mask of row 2 must hold only 0"),
        ({"input_ids": [3] * 161}, ValueError, "Row 2 has 161 tokens, but this encoder takes at most 160: tokenize"),
        ({"input_ids": [3, 100]}, ValueError, r"input_ids of row 2 must be in \[0, 100\), .* got 100"),
        ({"input_ids": [3, -1]}, ValueError, "got -1"),
        ({"input_ids": [3, 0.5]}, TypeError, "input_ids of row 2 must be one list of whole numbers"),
        ({"input_ids": [[3, 4]]}, TypeError, "input_ids of row 2 must be one list of whole numbers"),
        ({"input_ids": [[3, 4], [5]]}, TypeError, "input_ids of row 2 must be one list of whole numbers"),
        ({"input_ids": [3, 4], "token_type_ids": [0]}, ValueError, "Row 2 has 2 input_ids, but 1 token_type_ids"),
        ({"inputs_embeds": [[0.0] * 32]}, ValueError, "Row 2 has inputs_embeds, which a stream does not take"),
        ({**GOOD, "position_ids": [0, 1]}, ValueError, "Row 2 has position_ids, which a stream does not take"),
    ],
    ids=str,
)
def test_bad_rows_are_named_and_the_others_answered(plain, row, error, message):
    seen, raised = until_error(plain.early_exit_stream([GOOD, GOOD, row, GOOD]))
    assert isinstance(raised, error)
    assert re.search(message, str(raised))
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (GOOD, TypeError, "Row 1 must be a text or a pair of texts, got dict; leave the tokenizer out"),
        (("a", "b", "c"), TypeError, "Row 1 must be a text or a pair of texts, got tuple"),
        (("a", "b"), ValueError, r"Row 1 has 2 text\(s\), but those before it have 1"),
        ("", ValueError, "Row 1 has no tokens"),
    ],
    ids=str,
)
def test_bad_texts_are_named(plain, row, error, message):
    answers = plain.early_exit_stream(["one", row], tokenizer=Words())
    assert next(answers).index == 0
    with pytest.raises(error, match=message):
        next(answers)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": [], "batch_size": 0}, ValueError, "batch_size must be a whole number, at least 1, got 0"),
        ({"rows": [], "batch_size": 2.5}, ValueError, "batch_size must be a whole number, at least 1, got 2.5"),
        ({"rows": "a text"}, TypeError, "rows must be an iterable with one entry per row .* got str"),
        ({"rows": GOOD}, TypeError, "rows must be an iterable .* got dict"),
        ({"rows": 5}, TypeError, "rows must be an iterable .* got int"),
        ({"rows": [], "threshold": [0.1, 0.2]}, ValueError, "lists 2 numbers, but the model has 4 exits"),
        ({"rows": [], "treshold": 0.1}, ValueError, "does not know 'treshold'"),
    ],
    ids=str,
)
def test_bad_arguments_are_an_error_of_the_call(plain, arguments, error, message):
    with pytest.raises(error, match=message):
        plain.early_exit_stream(**arguments)


def test_the_mode_of_the_model_and_gradients_are_the_consumers(bert):
    rows = [{"input_ids": row.tolist()} for row in random_rows([5] * 40)]
    expected = [answer.logits for answer in bert.early_exit_stream(rows, 4, criterion="entropy", threshold=0.75)]
    bert.train()
    seen = []

    def watched():
        for row in rows:
            seen.append((bert.training, torch.is_grad_enabled()))
            yield row

    for answer, logits in zip(
        bert.early_exit_stream(watched(), 4, criterion="entropy", threshold=0.75), expected, strict=True
    ):
        seen.append((bert.encoder.training, torch.is_grad_enabled()))
        assert torch.allclose(answer.logits, logits, atol=1e-5)
    assert set(seen) == {(True, True)}


@pytest.fixture
def states(monkeypatch):
    """Weak references to every state that a model makes."""
    made, correct = [], BlockState.__init__

    def watched(self, *arguments, **fields):
        correct(self, *arguments, **fields)
        made.append(weakref.ref(self))

    monkeypatch.setattr(BlockState, "__init__", watched)
    return lambda: [ref() for ref in made if ref() is not None]


@pytest.mark.parametrize("how", ["close", "forget", "finish", "error of the model"])
def test_nothing_is_alive_after_the_consumer_stops(plain, states, how, monkeypatch, short_sight):
    rows = [{"input_ids": row.tolist()} for row in random_rows(np.random.default_rng(0).integers(1, 40, 200).tolist())]
    answers = plain.early_exit_stream(rows, 4, criterion="entropy", threshold=0.75)
    next(answers)
    assert states()
    if how == "close":
        answers.close()
        assert next(answers, None) is None
    elif how == "forget":
        del answers
    elif how == "finish":
        list(answers)
    else:
        monkeypatch.setattr(plain, "read_exit", lambda index, state: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            list(answers)
    assert states() == []


class Rows:
    """A state of scripted stages: the numbers of the rows."""

    alive: ClassVar = weakref.WeakSet()
    lock: ClassVar = threading.Lock()  # around additions and counts: workers make states side by side

    def __init__(self, numbers):
        self.numbers = np.array(numbers)
        with self.lock:
            self.alive.add(self)

    @classmethod
    def count(cls):
        """How many rows are alive."""
        with cls.lock:
            return len(set().union(*[rows.numbers.tolist() for rows in cls.alive]))


class Scripted:
    """Stages over plain row numbers: row `[number, leaves_at, ...]` is sure from exit `leaves_at` on."""

    def __init__(self, exits, first_layer=1):
        self.exit_layers = list(range(first_layer, first_layer + exits))
        self.leaves_at, self.began, self.ran, self.most_alive = {}, [], [], 0
        self.lock = threading.Lock()

    def begin(self, rows):
        self.began.append(len(rows))
        self.leaves_at.update({row["input_ids"][0]: row["input_ids"][1] for row in rows})
        mask = np.arange(max(len(row["input_ids"]) for row in rows)) < np.array(
            [[len(row["input_ids"])] for row in rows]
        )
        return Rows([row["input_ids"][0] for row in rows]), mask

    def embed(self, state):
        return state

    def run_block(self, layer, state):
        with self.lock:
            self.ran.append((layer, len(state.numbers)))
            self.most_alive = max(self.most_alive, Rows.count())
        return Rows(state.numbers)

    def read_exit(self, exit_index, state):
        sure = [self.leaves_at[number] <= exit_index for number in state.numbers.tolist()]
        return np.where(sure, 10.0, 0.1)[:, None] * np.array([1.0, -1.0])

    def compact(self, state, rows, columns, padded):
        return Rows(state.numbers if rows is None else state.numbers[rows])

    def merge(self, states, masks):
        width = max(mask.shape[1] for mask in masks)
        mask = np.concatenate([np.pad(mask, ((0, 0), (0, width - mask.shape[1]))) for mask in masks])
        return Rows(np.concatenate([state.numbers for state in states])), mask

    def to_host(self, logits):
        return logits


def scripted_stream(stages, leaves_at, batch_size, in_order=True, lengths=None, workers=1):
    """Answers of scripted rows; counts in `stages.read` how many were read."""
    stages.read = 0

    def rows():
        for number, exit_index in enumerate(leaves_at):
            stages.read += 1
            yield {"input_ids": [number, exit_index] + [0] * (lengths[number] if lengths is not None else 0)}

    policy = ExitPolicy(threshold=0.1)
    return stream_with_policy(
        stages, rows(), batch_size, 2, policy, "single_label_classification", in_order, workers=workers
    )


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 5, 16, 40])
@pytest.mark.parametrize("leaving", ["evenly", "late", "together"])
def test_live_rows_are_at_most_batch_size_times_exits(batch_size, leaving, first_layer, workers):
    generator, exits, rows = np.random.default_rng(0), 6, 1500
    leaves_at = {
        "evenly": generator.integers(0, exits, rows),
        "late": np.where(generator.random(rows) < 0.05, 9, 3),
        "together": np.repeat(np.arange(rows // 50) % exits, 50),
    }[leaving].tolist()
    stages = Scripted(exits, first_layer)
    answers = scripted_stream(stages, leaves_at, batch_size, True, generator.integers(0, 50, rows), workers)
    expected = [min(exit_index, exits - 1) + first_layer for exit_index in leaves_at]
    assert [answer.exit_layer for answer in answers] == expected
    side_by_side = 2 * workers if workers > 1 else 0  # that run or are in line
    before_blocks = LEXICAL_BATCH * max(side_by_side, 1) if first_layer == 0 else 0
    most = batch_size * (exits + side_by_side) + before_blocks
    assert batch_size < stages.most_alive <= most or (batch_size, before_blocks) == (1, 0)


@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("in_order", [True, False])
def test_batches_are_full_until_the_end(in_order, first_layer):
    exits, batch_size = 6, 16
    leaves_at = np.random.default_rng(0).integers(0, exits, 3000).tolist()
    stages = Scripted(exits, first_layer)
    assert len(list(scripted_stream(stages, leaves_at, batch_size, in_order))) == 3000
    assert len(stages.began) == -(-3000 // (LEXICAL_BATCH if first_layer == 0 else batch_size))
    for exit_index, layer in enumerate(stages.exit_layers[1 - first_layer :], 1 - first_layer):
        sizes = [size for reached, size in stages.ran if reached == layer]
        assert sum(sizes) == sum(min(leaves, exits - 1) >= exit_index for leaves in leaves_at)
        assert len(sizes) == -(-sum(sizes) // batch_size), f"block {layer} ran batches that were not full"


class Meeting(Scripted):
    """Stages of which a block waits for as many batches as there are to be side by side, or says that they do not come.

    Args:
        batches: how many.
        patience: seconds that it waits.
        shared: the control: the exit reads what the last block left, whoever's it is.
    """

    def __init__(self, exits, batches, patience=20, shared=False):
        super().__init__(exits)
        self.meeting, self.shared, self.last = threading.Barrier(batches, timeout=patience), shared, None

    def run_block(self, layer, state):
        state = self.last = super().run_block(layer, state)
        if layer == 1:  # every row comes here: 4 batches of 2
            self.meeting.wait()
        return state

    def read_exit(self, exit_index, state):
        return super().read_exit(exit_index, self.last if self.shared else state)


@pytest.mark.parametrize("in_order", [True, False])
def test_batches_run_side_by_side(in_order):
    leaves_at = [0, 0, 1, 1, 2, 2, 0, 0]

    def answers(stages, workers):
        return [(a.index, a.exit_layer) for a in scripted_stream(stages, leaves_at, 2, in_order, workers=workers)]

    expected = [(index, exit_index + 1) for index, exit_index in enumerate(leaves_at)]
    found = answers(Meeting(3, batches=2), workers=2)
    assert (found if in_order else sorted(found)) == expected
    assert sorted(answers(Meeting(3, batches=2, shared=True), workers=2)) != expected
    assert sorted(answers(Meeting(3, batches=1, shared=True), workers=1)) == expected  # one by one nothing is shared
    with pytest.raises(threading.BrokenBarrierError):  # alone a batch waits in vain
        answers(Meeting(3, batches=2, patience=0.05), workers=1)


@pytest.mark.parametrize("how", ["close", "forget", "finish", "error of the model"])
def test_workers_are_gone_after_the_consumer_stops(how):
    threads, stages = threading.active_count(), Scripted(6)
    answers = scripted_stream(stages, np.random.default_rng(0).integers(0, 6, 2000).tolist(), 4, workers=3)
    for _ in range(5):
        next(answers)
    assert threading.active_count() > threads
    if how == "close":
        answers.close()
    elif how == "forget":
        del answers
    elif how == "finish":
        list(answers)
    else:
        stages.begin = lambda rows: 1 / 0
        with pytest.raises(ZeroDivisionError):
            list(answers)
    assert threading.active_count() == threads
    assert not Rows.alive


@pytest.mark.parametrize("closes", [True, False])
def test_a_batch_in_line_does_not_begin_when_the_consumer_stops(closes):
    stages, second, others = Scripted(2), threading.Event(), threading.Event()
    run_block = stages.run_block

    def wait_and_run(layer, state):
        if state.numbers[0] > 0:
            (second if state.numbers[0] == 1 else others).wait(20)
        return run_block(layer, state)

    stages.run_block = wait_and_run
    answers = scripted_stream(stages, [0] * 9, 1, workers=2)
    assert next(answers).index == 0
    second.set()
    assert next(answers).index == 1  # 2 and 3 are running, 4 is in line
    threading.Timer(1.0 if closes else 0.0, others.set).start()
    if closes:
        answers.close()
        assert len(stages.began) <= 4
    else:  # the control
        assert len(list(answers)) == 7
        assert len(stages.began) == 9


@pytest.mark.parametrize("in_order", [True, False])
def test_rows_before_an_error_are_answered_by_workers_too(in_order, short_sight):
    def leaves_at():
        yield from [0, 3, 1, 2] * 25
        raise LookupError("no more rows")

    answered, error = until_error(scripted_stream(Scripted(4), leaves_at(), 4, in_order, workers=3))
    assert isinstance(error, LookupError)
    assert sorted(answered) == list(range(100))


def most_undelivered(window, monkeypatch, rows=4000, batch_size=4, workers=1):
    """Rows that were read and not delivered, at most, when the first row goes deep and all others leave at once."""
    monkeypatch.setattr(stream_badge, "READ_AHEAD", 8)
    monkeypatch.setattr(stream_badge, "WINDOW", window)
    stages, most = Scripted(6), 0
    answers = scripted_stream(stages, [9] + [0] * (rows - 1), batch_size, workers=workers)
    for delivered, answer in enumerate(answers):
        assert answer.index == delivered
        most = max(most, stages.read - delivered)
    return most


def test_a_row_that_goes_deep_does_not_hold_up_the_others_for_ever(monkeypatch):
    batch_size = 4
    assert 16 * batch_size < most_undelivered(16, monkeypatch) <= (16 + 6 + 8) * batch_size
    assert most_undelivered(16, monkeypatch, workers=3) <= (16 + 6 + 6 * 2 * 3 + 8) * batch_size
    assert most_undelivered(10**6, monkeypatch) == 4000  # the control: without a window everything waits


def test_threads_do_not_disturb_each_other(short_sight):
    model = tiny_model("bert", exit_policy={"criterion": "entropy", "threshold": 0.75})
    batches = [random_rows(np.random.default_rng(seed).integers(1, 40, 40).tolist(), seed=seed) for seed in range(8)]

    def predict(rows):
        output = model.early_exit_predict(**pad(rows))
        return output.exit_layer.tolist(), output.logits

    def stream(rows):
        answers = list(model.early_exit_stream([{"input_ids": row.tolist()} for row in rows], 4))
        return [answer.exit_layer for answer in answers], torch.stack([answer.logits for answer in answers])

    expected = [predict(rows) for rows in batches]
    wrong, finished = [], []

    def work(i):
        for turn in range(4):
            layers, logits = (predict, stream)[(i + turn) % 2](batches[i])
            if layers != expected[i][0] or not torch.allclose(logits, expected[i][1], atol=1e-4):
                wrong.append((i, turn))
        finished.append(i)

    in_threads(work, 8)
    assert wrong == []
    assert len(finished) == 8
