"""Turns, ratios and the picture; no test here asserts a time."""

import pytest

from transformers_badge.evaluation.plots import plot_tradeoff
from transformers_badge.evaluation.timing import (
    PairedTimings,
    classifying,
    describe_machine,
    time_in_turns,
    with_spread,
)


def test_contenders_take_turns_and_warmups_do_not_count():
    calls, rounds = [], []
    timings = time_in_turns(
        {name: lambda name=name: calls.append(name) for name in "abc"}, 3, warmups=1, on_round=lambda: rounds.append(1)
    )
    assert "".join(calls) == "abcbcacababc"
    assert len(rounds) == 4
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_speedups_are_paired_by_round():
    timings = PairedTimings({"fast": [1.0, 2.0, 4.0], "slow": [2.0, 6.0, 8.0]})
    assert timings.speedup("fast", "slow") == {"median": 2.0, "min": 2.0, "max": 3.0}
    assert timings.median("slow") == 6.0


def test_the_machine_is_named():
    assert all(describe_machine().values())


def test_the_picture_is_drawn(tmp_path):
    record = {
        "exit_layers": [1, 2],
        "exit_accuracy": [0.7, 0.8],
        "full_depth": {"accuracy": 0.8},
        "early_exit": {"accuracy": 0.79, "layer_speedup": 1.5},
        "max_accuracy_drop": 0.01,
        "policy": {"criterion": "entropy"},
        "curve": [{"layer_speedup": 1.0, "accuracy": 0.8}, {"layer_speedup": 2.0, "accuracy": 0.7}],
    }
    plot_tradeoff(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        plot_tradeoff({}, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_a_speedup_is_told_with_its_spread_if_it_has_one():
    assert with_spread({"median": 3.257, "min": 3.1, "max": 3.78}) == "3.26x (3.10 to 3.78)"
    assert with_spread({"median": 0.9, "min": 0.9, "max": 0.9}) == "0.90"


def test_a_pipeline_is_given_the_list_or_one_text_at_a_time():
    given = []

    def classify(texts, **settings):
        given.append((texts, settings))

    classifying(classify, ["a", "b"], 8, threshold=None)()
    classifying(classify, ["a", "b"], 1)()
    assert given == [
        (["a", "b"], {"batch_size": 8, "threshold": None}),
        ("a", {"batch_size": 1}),
        ("b", {"batch_size": 1}),
    ]
