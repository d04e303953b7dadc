"""What a benchmark says of a policy, and that its contenders do what their names say."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tiny import exporting, tiny_model, tiny_tokenizer
from transformers_badge import BadgeForSequenceClassification, ExitPolicy, ExitTable
from transformers_badge.evaluation import benchmark
from transformers_badge.evaluation.benchmark import (
    choose_policy,
    ideal_milliseconds,
    measure_policy,
    profile,
    ratio_name,
)
from transformers_badge.evaluation.benchmark_report import engine_names, render_ratios
from transformers_badge.evaluation.contenders import Contenders
from transformers_badge.evaluation.timing import PairedTimings, with_spread


@pytest.fixture
def table():
    """A hundred rows of which the first exit gets 90 right, surest of the right ones; the others get all right."""
    logits = np.zeros((100, 3, 2))
    logits[:, :, 1] = 4.0
    logits[:90, 0, 1] = np.linspace(2, 4, 90)
    logits[90:, 0, 0] = np.linspace(1, 0.1, 10)
    logits[90:, 0, 1] = 0
    return ExitTable(exit_logits=logits, exit_layers=(1, 2, 4), labels=np.ones(100, dtype=int))


def test_the_policy_chosen_is_the_fastest_that_loses_no_more_than_allowed(table):
    policy = ExitPolicy(criterion="entropy")
    chosen = {lost: measure_policy(table, choose_policy(table, policy, lost)) for lost in (0.0, 5.0, 20.0)}
    assert chosen[0.0]["early_exit"] == 100
    assert 95 <= chosen[5.0]["early_exit"] < 100
    assert chosen[0.0]["layer_speedup"] < chosen[5.0]["layer_speedup"] < chosen[20.0]["layer_speedup"]
    assert chosen[20.0]["early_exit"] == pytest.approx(90)
    assert all(entry["full_depth"] == 100 for entry in chosen.values())


def test_one_exit_is_as_deep_as_early_exit_or_deeper(table):
    entry = measure_policy(table, ExitPolicy())
    assert (entry["truncated_depth"], entry["truncated"], entry["layer_speedup"]) == (4, 100, 1)
    assert (entry["deeper_depth"], entry["deeper"]) == (4, 100)
    everyone = measure_policy(table, ExitPolicy(criterion="fixed_depth", threshold=1.0))
    assert (everyone["truncated_depth"], everyone["truncated"]) == (1, pytest.approx(90))
    assert (everyone["deeper_depth"], everyone["deeper"]) == (2, 100)


@pytest.fixture
def contenders(tmp_path):
    model = tiny_model("bert", exit_layers=[0, 1, 2], lexical_exit=True, encoder={"num_hidden_layers": 2})
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    threads = torch.get_num_threads()
    contenders = Contenders(tmp_path / "checkpoint", tmp_path, threads)
    contenders.policies["eager"] = ExitPolicy(criterion="entropy", threshold=0.6)
    return contenders


def test_contenders_stop_where_they_say(contenders, monkeypatch):
    depths = []
    model = contenders.engine("eager")
    run_block = model.run_block
    monkeypatch.setattr(model, "run_block", lambda layer, state: (depths.append(layer), run_block(layer, state))[1])
    texts = ["w5 w6 w7", "w8", "w9 w10", "w5"]
    for exit_index, expected in ((0, []), (1, [1]), (2, [1, 2])):
        depths.clear()
        contenders.truncated_at["eager"] = exit_index
        assert len(contenders.run("truncated", "eager")(texts, 4)) == 1
        assert depths == expected
    for exit_index, expected in ((0, [1]), (1, [1, 2]), (2, [1, 2])):
        depths.clear()
        contenders.truncated_at["eager"] = exit_index
        contenders.run("deeper", "eager")(texts, 4)
        assert depths == expected
    depths.clear()
    assert len(contenders.run("nobody leaves", "eager")(texts, 2)) == 2
    assert depths == [1, 2] * 2


def test_a_profile_accounts_for_every_part(contenders):
    parts = profile(contenders, "eager", ["w5 w6 w7", "w8", "w9 w10", "w5"], 2)
    assert set(parts) > {"tokenization", "exit 0", "blocks", "exits", "criterion and loop"}
    assert all(milliseconds >= 0 for milliseconds in parts.values())
    assert parts["blocks"] > 0


def test_in_the_ideal_time_rows_pay_for_what_they_need(contenders, monkeypatch):
    texts, nobody, everybody = ["w5 w6 w7", "w8", "w9 w10", "w5"], np.zeros(4), np.full(4, 2)
    assert ideal_milliseconds(contenders, "eager", texts, 2, nobody) > 0
    parts = [("tokenization",), ("begin",), ("embed",), ("run_block", 1), ("run_block", 2)]
    parts += [("read_exit", 0), ("read_exit", 1), ("read_exit", 2), ("compact",)]
    seconds = {part: 10.0**place for place, part in enumerate(parts)}
    monkeypatch.setattr(benchmark, "_profile", lambda *given, whole: (seconds, 1e9))
    depths = (nobody, np.array([0, 0, 1, 2]), everybody)
    ideal = [ideal_milliseconds(contenders, "eager", texts, 2, row_depths) for row_depths in depths]
    assert ideal == [pytest.approx(1000 / 4 * value) for value in (100_011, 3_103_061, 11_111_111)]


def test_a_round_is_set_against_itself_and_the_warm_up_counts_nowhere(monkeypatch):
    names = [f"{kind}, eager" for kind in ("full", "truncated", "deeper", "nobody leaves", "early exit", "stream")]
    told = iter([99.0, 2.0, 6.0])  # ms per row: of the warm-up, and of two rounds

    def in_turns(calls, rounds):
        for call in calls.values():
            for _ in range(1 + rounds):
                call()
        return PairedTimings({name: [0.01, 0.02] for name in calls})  # of 4 rows

    monkeypatch.setattr(benchmark, "time_in_turns", in_turns)
    batches = {name: iter([[9.0], [0.1, 0.2], [0.3, 0.4]]) for name in (benchmark.PIPELINE, *names)}
    runs = {name: lambda texts, size, each=each: next(each) for name, each in batches.items()}
    entry = benchmark._time(runs, ["w5"] * 4, 2, 2, {"eager": lambda: next(told)})
    for name in ("early exit, eager", "stream, eager"):
        assert entry["ratios"][f"{name} over ideal, eager"] == pytest.approx({"median": 1.0, "min": 0.8, "max": 1.2})
    assert entry["milliseconds_per_row"]["ideal, eager"] == pytest.approx(4.0)
    assert entry["milliseconds_per_row"]["full, eager"] == pytest.approx(1000 * 0.015 / 4)
    assert entry["latency"]["early exit, eager"] == pytest.approx({"p50": 250, "p99": 397})


@pytest.mark.parametrize("machine", [{}, {"gpu": "a GPU"}])
def test_every_ratio_is_in_the_table_of_what_it_is_over(machine):
    kinds = (*benchmark._KINDS, *benchmark._PARALLEL_KINDS)
    names = [f"{kind}, {engine}" for kind in kinds for engine in ("int8", "bf16")]
    pairs = [(ours, base) for ours in names for base in benchmark._COMPARED.get(ours.rpartition(", ")[0], ())]
    ratios = {ratio_name(*pair): {"median": 2.0 + at, "min": 1, "max": 99} for at, pair in enumerate(pairs)}
    entry = {"ratios": ratios, "milliseconds_per_row": dict.fromkeys((benchmark.PIPELINE, *names), 1.0)}
    record = {"machine": machine, "engines": {"int8": {}, "bf16": {}}, "batch_sizes": {"2": entry}}
    captions, tables = (render_ratios(record)[place::2] for place in (0, 1))
    assert len(captions) == len(set(captions)) == len({base for _, base in pairs})
    cells = [line.split(" | ")[-1].removesuffix(" |") for table in tables for line in table.splitlines()[2:]]
    assert sorted(cells) == sorted(with_spread(ratio) for ratio in ratios.values())
    over_full = tables[[caption.startswith("Times as fast as the full model on") for caption in captions].index(True)]
    ours = f"**early exit**, {engine_names(record)['int8']}"
    assert f"| {ours} | {with_spread(ratios['early exit, int8 over full, int8'])} |" in over_full
    (only,) = render_ratios(record, ["nobody leaves"])[1:]
    assert len(only.splitlines()) == 2 + 2


@pytest.mark.parametrize("kind", ["full", "early exit"])
def test_a_process_that_runs_one_model_loads_no_other(contenders, monkeypatch, kind):
    assert contenders.plain is not None  # what it runs lies there, once it was asked for
    loaded = []
    for model in (BadgeForSequenceClassification, AutoModelForSequenceClassification):
        load = model.from_pretrained
        monkeypatch.setattr(
            model, "from_pretrained", lambda *given, m=model, load=load: (loaded.append(m), load(*given))[1]
        )
    alone = Contenders(contenders.checkpoint, contenders.folder, contenders.threads)
    alone.policies = contenders.policies
    alone.run(kind, "eager")(["w5 w6 w7", "w8"], 2)
    assert loaded == [AutoModelForSequenceClassification if kind == "full" else BadgeForSequenceClassification]


@exporting
def test_contenders_in_onnx_runtime_run(contenders, tmp_path):
    contenders.policies["fp32"] = ExitPolicy(criterion="entropy", threshold=0.6)
    contenders.threads = 2
    for kind in ("full", "early exit", "parts side by side", "stream", "full side by side", "stream side by side"):
        seconds = contenders.run(kind, "fp32")(["w5 w6 w7", "w8", "w9 w10"], 2)
        assert len(seconds) == (2 if kind in ("full", "early exit", "parts side by side") else 1)
        assert min(seconds) > 0
    assert [contenders.engine("fp32", workers).workers for workers in (1, 2)] == [1, 2]
    assert {"full-fp32.onnx", "full-int8.onnx", "ours-fp32"} < {path.name for path in tmp_path.iterdir()}
