"""CUDA graphs: buckets of shapes, and the memory that graphs share. Without a GPU, graphs are played by functions."""

import numpy as np
import pytest
import torch

from tiny import FAMILIES, pad, random_rows, tiny_model
from transformers_badge import BadgePredictor, ExitPolicy
from transformers_badge.inference import cuda_graphs
from transformers_badge.inference.cuda_graphs import CudaGraphs, Graph, bucket_rows, bucket_tokens
from transformers_badge.inference.graphed_stages import GraphedStages
from transformers_badge.model.early_exit_badge import predict_with_policy
from transformers_badge.model.stream_badge import stream_with_policy


POLICY = ExitPolicy(criterion="entropy", threshold=0.6)
PROBLEM = "single_label_classification"
LENGTHS = [2, 5, 60, 33, 12, 7, 90, 2, 3, 44]


class PlayedGraphs(CudaGraphs):
    """What a GPU does with a graph: read the inputs where they were, write the outputs where they were."""

    captured = replayed = 0

    def capture(self, call):
        self.captured += 1
        outputs = {name: value.clone() if name == "logits" else value for name, value in call().items()}

        def replay():
            self.replayed += 1
            for name, value in call().items():
                outputs[name].copy_(value)

        for output in outputs.values():  # a capture computes nothing
            output.zero_()
        return Graph(replay, outputs)

    def _wait_for_last(self):
        pass


def predict(stages, batch, policy, labels):
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    return predict_with_policy(stages, stages.begin_padded(ids, mask), mask > 0, labels, policy, PROBLEM)


def test_buckets_hold_what_is_put_into_them():
    for rows in range(1, 200):
        assert rows <= bucket_rows(rows) < max(1.5 * rows, 2)
    for tokens in range(1, 512):
        assert tokens <= bucket_tokens(tokens, 512) < tokens + 64
    assert len({(bucket_rows(r), bucket_tokens(t, 512)) for r in range(1, 257) for t in range(1, 513)}) < 200
    assert bucket_tokens(90, most=100) == 100


def test_every_family_answers_as_without_graphs(every_family):
    exits = [0, 1, 2, 4] if every_family in FAMILIES else [2, 4]
    model = tiny_model(every_family, exit_layers=exits, lexical_exit=exits[0] == 0)
    stages = GraphedStages(model, graphs=PlayedGraphs)
    # Twice, so that all memory has been used before
    for batch in 2 * [pad(random_rows(LENGTHS)), pad(random_rows(LENGTHS), "left"), pad(random_rows([44]))]:
        for policy in (ExitPolicy(), POLICY):
            exit_logits, taken = predict(stages, batch, policy, model.num_labels)
            expected = model.early_exit_predict(**batch, policy=policy, output_exit_logits=True)
            np.testing.assert_allclose(exit_logits, expected.exit_logits.numpy(), atol=1e-5)
            np.testing.assert_array_equal(np.array(exits)[taken], expected.exit_layer.numpy())
    # Where attention is plain Python there are none.
    assert (stages._graphs.captured > 0) == (model.encoder.config._attn_implementation == "sdpa")


@pytest.mark.parametrize("most_positions", [2048, 200, 0])
def test_streams_and_large_batches(monkeypatch, most_positions):
    monkeypatch.setitem(cuda_graphs.MOST_POSITIONS, torch.float32, most_positions)
    model = tiny_model("bert", exit_layers=[0, 1, 2, 4], lexical_exit=True)
    stages = GraphedStages(model, graphs=PlayedGraphs)
    graphs = stages._graphs
    rows = random_rows([int(n) for n in np.random.default_rng(0).integers(2, 100, 300)], seed=2)
    tokens = [{"input_ids": row.tolist()} for row in rows]
    expected = model.early_exit_predict(**pad(rows), policy=POLICY)
    assert len(set(expected.exit_layer.tolist())) == 4
    answers = list(stream_with_policy(stages, tokens, 8, model.num_labels, POLICY, PROBLEM))
    assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()
    np.testing.assert_allclose([answer.logits for answer in answers], expected.logits.numpy(), atol=1e-5)
    assert (graphs.captured > 0) == (most_positions > 0)
    once, memory = graphs.captured, sum(memory.nbytes for memory in graphs._memory.values())
    list(stream_with_policy(stages, tokens, 8, model.num_labels, POLICY, PROBLEM))
    assert graphs.captured == once
    predict(stages, pad(rows[:3]), ExitPolicy(), model.num_labels)  # another bucket takes no more of it
    assert (graphs.captured > once) == (most_positions == 2048)
    assert sum(memory.nbytes for memory in graphs._memory.values()) == memory


class PoisonedGraphs(PlayedGraphs):
    """All memory is NaN before a stage fills what it needs."""

    def _replay(self, graph, given, bucket):
        self._holds.clear()
        for memory in self._memory.values():
            memory.fill_(float("nan") if memory.is_floating_point() else 1)
        return super()._replay(graph, given, bucket)


def test_a_row_is_answered_whatever_was_in_the_memory(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "bucket_tokens", lambda tokens, most: 64)  # there is always room
    model = tiny_model("bert", exit_layers=[2, 4])
    batch = pad(random_rows([30, 5, 17], seed=1))
    expected = model(**batch).exit_logits.detach().numpy()
    exit_logits, _ = predict(GraphedStages(model, graphs=PoisonedGraphs), batch, ExitPolicy(), model.num_labels)
    np.testing.assert_allclose(exit_logits, expected, atol=1e-5)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: tensor)  # the control
    exit_logits, _ = predict(GraphedStages(model, graphs=PoisonedGraphs), batch, ExitPolicy(), model.num_labels)
    assert not np.allclose(exit_logits, expected, atol=1e-5)


class TrustingGraphs(PlayedGraphs):
    """Takes what lies in the memory, once there is anything, for what is given."""

    def _fill(self, name, tensor, bucket):
        for key in self._holds:
            self._holds[key] = lambda: tensor
        return super()._fill(name, tensor, bucket)


@pytest.mark.parametrize("graphs", [PlayedGraphs, TrustingGraphs])
@pytest.mark.parametrize("lengths", [[30, 5, 17], [60]])  # of the last: in the same bucket as the others, in another
def test_batches_that_take_turns_do_not_mix(graphs, lengths):
    model = tiny_model("bert", exit_layers=[1, 2, 4])
    batches = [pad(random_rows(each, seed=seed)) for seed, each in enumerate([[30, 5, 17], [3, 32, 9], lengths])]
    expected = [model(**batch).exit_logits.detach().numpy() for batch in batches]
    stages = GraphedStages(model, graphs=graphs)
    states = [
        stages.embed(stages.begin_padded(batch["input_ids"].numpy(), batch["attention_mask"].numpy()))
        for batch in batches
    ]
    right = True
    for index, layer in enumerate(model.exit_layers):
        states = [stages.run_block(layer, state) for state in states]
        for state, logits in zip(states, expected, strict=True):
            right &= np.allclose(stages.read_exit(index, state), logits[:, index], atol=1e-5)
    assert right == (graphs is PlayedGraphs)


def test_a_stage_finds_what_the_stage_before_has_left():
    class CountingGraphs(PlayedGraphs):
        def _fill(self, name, tensor, bucket):
            before = dict(self._holds)
            buffer = super()._fill(name, tensor, bucket)
            if any(before.get(key) is not held for key, held in self._holds.items()):
                copied.append(name)
            return buffer

    copied = []
    model = tiny_model("bert", exit_layers=[0, 1, 2, 4], lexical_exit=True)
    stages = GraphedStages(model, graphs=CountingGraphs)
    batch = pad(random_rows([16, 16]))
    predict(stages, batch, ExitPolicy(), model.num_labels)
    copied.clear()
    predict(stages, batch, ExitPolicy(), model.num_labels)
    # The first stage's inputs, and nothing of what it and the second hand on
    assert copied == ["input_ids", "attention_mask", "token_type_ids", "lexical_logits"]


def test_what_cannot_be_a_graph_runs_without(caplog):
    class NoGraphs(PlayedGraphs):
        def capture(self, call):
            raise RuntimeError("Cannot copy between devices")

    model = tiny_model("bert", exit_layers=[2, 4])
    stages = GraphedStages(model, graphs=NoGraphs)
    batch = pad(random_rows(LENGTHS))
    for _ in range(2):
        exit_logits, _ = predict(stages, batch, ExitPolicy(), model.num_labels)
        np.testing.assert_allclose(exit_logits, model(**batch).exit_logits.detach().numpy(), atol=1e-5)
    told = [record.message for record in caplog.records]
    assert told == [f"exit_{n} runs without CUDA graphs, and slower: Cannot copy between devices" for n in (2, 4)]


def test_a_device_that_is_not_here_is_named(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="There is no device 'cuda:77' here"):
        BadgePredictor.from_pretrained(tmp_path, engine="compiled", device="cuda:77")
    with pytest.raises(ValueError, match="There is no device 'gpu' here"):
        BadgePredictor.from_pretrained(tmp_path, engine="compiled", device="gpu")
    with pytest.raises(ValueError, match="device is of the engine compiled"):
        BadgePredictor.from_pretrained(tmp_path, engine="onnxruntime", device="cuda")
