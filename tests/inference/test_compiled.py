"""The engine torch.compile: the answers of the model, and nothing compiled once it has started."""

import numpy as np
import pytest
import torch

from tiny import FAMILIES, compiling, pad, random_rows, tiny_model, tiny_tokenizer
from transformers_badge import BadgeForSequenceClassification, BadgePredictor, ExitPolicy
from transformers_badge.inference import compiled_stages
from transformers_badge.inference.compiled_stages import CompiledStages
from transformers_badge.model.early_exit_badge import predict_with_policy


pytestmark = compiling

LENGTHS = [2, 5, 60, 33, 12, 7, 90, 2, 3, 44]
POLICY = {"criterion": "entropy", "threshold": 0.6}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def predict(stages, batch, policy, labels):
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    problem = "single_label_classification"
    return predict_with_policy(stages, stages.begin_padded(ids, mask), mask > 0, labels, policy, problem)


def test_every_family_is_one_graph_a_stage_for_all_shapes(every_family):
    exits = [0, 1, 2] if every_family in FAMILIES else [1, 2]  # the others as small as may be: it takes long
    blocks = {"n_layers" if every_family == "distilbert" else "num_hidden_layers": exits[-1]}
    model = tiny_model(every_family, encoder=blocks, exit_layers=exits, lexical_exit=exits[0] == 0)
    # The graphs are what differs between families, not the code that is made of them.
    stages = CompiledStages(model, backend="eager").compile()
    if every_family != "deberta":  # its own code reads a number out of a tensor
        assert not torch._dynamo.utils.counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (1, 2, 10):
            batch = pad(random_rows(LENGTHS[:count], seed=count))
            for policy in (ExitPolicy(), ExitPolicy(**POLICY)):
                exit_logits, taken = predict(stages, batch, policy, model.num_labels)
                expected = model.early_exit_predict(**batch, policy=policy, output_exit_logits=True)
                np.testing.assert_allclose(exit_logits, expected.exit_logits.numpy(), atol=1e-5)
                np.testing.assert_array_equal(np.array(exits)[taken], expected.exit_layer.numpy())


def test_many_models_in_one_process_are_all_compiled():
    exits = [1, 2]
    # Models of the same sizes would share their graphs.
    models = [
        tiny_model("bert", exit_layers=exits, encoder={"num_hidden_layers": 2, "intermediate_size": 40 + i})
        for i in range(2)
    ]
    with torch._dynamo.config.patch(recompile_limit=1):  # by itself torch gives up later, after eight graphs of a code
        stages = [CompiledStages(model, backend="eager").compile() for model in models]
    batch = pad(random_rows(LENGTHS))
    with torch.compiler.set_stance("fail_on_recompile"):
        for model, compiled in zip(models, stages, strict=True):
            exit_logits, _ = predict(compiled, batch, ExitPolicy(), model.num_labels)
            np.testing.assert_allclose(exit_logits, model(**batch).exit_logits.detach().numpy(), atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2 * 2 * len(exits)


def test_the_test_for_recompiling_sees_it():
    model = tiny_model("bert", exit_layers=[1, 2], encoder={"num_hidden_layers": 2})
    stages = CompiledStages(model, backend="eager")  # not compiled
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        predict(stages, pad(random_rows([3, 4])), ExitPolicy(), model.num_labels)


def test_a_checkpoint_is_compiled_and_answers_as_it_does_elsewhere(tmp_path):
    model = tiny_model("bert", exit_layers=[0, 2], lexical_exit=True, encoder={"num_hidden_layers": 2})
    model.config.exit_policy = ExitPolicy(**POLICY)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    predictor = BadgePredictor.from_pretrained(tmp_path, engine="compiled")
    rows = random_rows(LENGTHS, seed=3)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (pad(rows), pad(rows, "left"), pad(rows[:1])):
            output, expected = predictor.early_exit_predict(**batch), model.early_exit_predict(**batch)
            np.testing.assert_allclose(output.logits, expected.logits.numpy(), atol=1e-4)
            np.testing.assert_array_equal(output.exit_layer, expected.exit_layer.numpy())
        # A type that some library makes known to torch meanwhile
        torch.utils._pytree.register_pytree_node(type("Known", (), {}), lambda node: ([], None), lambda leaves, _: None)
        answers = list(predictor.early_exit_stream([{"input_ids": row.tolist()} for row in rows], 4))
        expected = model.early_exit_predict(**pad(rows))
        assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()
        np.testing.assert_allclose([answer.logits for answer in answers], expected.logits.numpy(), atol=1e-4)
        assert predictor("w5 w6")[0]["label"] in model.config.id2label.values()
    loaded = BadgeForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():  # the control
        loaded.exits[1].classifier.weight.neg_()
    changed = loaded.eval().early_exit_predict(**pad(rows))
    assert np.abs(changed.logits.numpy() - expected.logits.numpy()).max() > 1e-2


def test_what_the_engine_does_not_take_is_named(tmp_path):
    for given, message in (
        ({"provider": "CPUExecutionProvider"}, "are ONNX Runtime's"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16 for engine='compiled', got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            BadgePredictor.from_pretrained(tmp_path, engine="compiled", **given)
    with pytest.raises(OSError, match="nowhere"):
        BadgePredictor.from_pretrained(tmp_path / "nowhere", engine="compiled")


def test_a_torch_that_is_too_old_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_stages, "OLDEST_TORCH", "99.1")
    with pytest.raises(RuntimeError, match=r"needs torch 99.1 or newer on a processor, and this is \d"):
        BadgePredictor.from_pretrained(tmp_path, engine="compiled")
