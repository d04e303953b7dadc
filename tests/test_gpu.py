"""What needs a GPU: the same answers there as on the CPU, in every way to run a model. Skipped where there is none."""

import copy

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from tiny import FAMILIES, in_threads, pad, random_rows, tiny_model, tiny_tokenizer
from transformers_badge import BadgePredictor, ExitPolicy
from transformers_badge.inference.graphed_stages import GraphedStages
from transformers_badge.model.early_exit_badge import predict_with_policy
from transformers_badge.model.stream_badge import stream_with_policy


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

POLICY = ExitPolicy(criterion="entropy", threshold=0.6)
PROBLEM = "single_label_classification"
LENGTHS = [2, 5, 60, 33, 12, 7, 90, 2, 3, 44]


def model_of(family):
    exits = [0, 1, 2, 4] if family in FAMILIES else [2, 4]
    return tiny_model(family, exit_layers=exits, lexical_exit=exits[0] == 0)


def on_gpu(batch):
    return {name: tensor.cuda() for name, tensor in batch.items()}


def test_every_family(every_family):
    model = model_of(every_family)
    there = copy.deepcopy(model).cuda()
    rows = random_rows(LENGTHS)
    for batch in (pad(rows), pad(rows, "left"), pad(rows[:1])):
        torch.testing.assert_close(
            there(**on_gpu(batch)).exit_logits.cpu(), model(**batch).exit_logits, atol=1e-4, rtol=1e-4
        )
        output, expected = (
            there.early_exit_predict(**on_gpu(batch), policy=POLICY),
            model.early_exit_predict(**batch, policy=POLICY),
        )
        assert output.exit_layer.tolist() == expected.exit_layer.tolist()
        assert output.logits.is_cuda
        torch.testing.assert_close(output.logits.cpu(), expected.logits, atol=1e-4, rtol=1e-4)
    tokens = [{"input_ids": row.tolist()} for row in rows]
    expected = model.early_exit_predict(**pad(rows), policy=POLICY)
    answers = list(there.early_exit_stream(tokens, 4, policy=POLICY))
    assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()


def test_every_family_in_cuda_graphs(every_family):
    model = model_of(every_family)
    stages = GraphedStages(copy.deepcopy(model).cuda())
    rows = random_rows(LENGTHS)
    for batch in 2 * [pad(rows), pad(rows, "left"), pad(rows[3:4])]:
        for policy in (ExitPolicy(), POLICY):
            ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
            exit_logits, taken = predict_with_policy(
                stages, stages.begin_padded(ids, mask), mask > 0, model.num_labels, policy, PROBLEM
            )
            expected = model.early_exit_predict(**batch, policy=policy, output_exit_logits=True)
            np.testing.assert_allclose(exit_logits, expected.exit_logits.numpy(), atol=1e-4)
            assert np.array(model.exit_layers)[taken].tolist() == expected.exit_layer.tolist()
    tokens = [{"input_ids": row.tolist()} for row in 20 * rows]
    answers = list(stream_with_policy(stages, tokens, 8, model.num_labels, POLICY, PROBLEM))
    expected = model.early_exit_predict(**pad(rows), policy=POLICY)
    assert [answer.exit_layer for answer in answers] == 20 * expected.exit_layer.tolist()


def test_graphs_share_memory():
    model = model_of("bert")
    stages = GraphedStages(copy.deepcopy(model).cuda())
    reserved = []
    for count in (2, 3, 4, 6, 8, 12, 16):
        batch = pad(random_rows(count * [60]))
        ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
        predict_with_policy(stages, stages.begin_padded(ids, mask), mask > 0, model.num_labels, ExitPolicy(), PROBLEM)
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    assert reserved[-1] - reserved[1] < 64  # 15 graphs more; each took 8 MiB or more on a stream of its own


def test_threads_on_one_predictor(tmp_path):
    model = model_of("bert")
    model.config.exit_policy = POLICY
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    predictor = BadgePredictor.from_pretrained(tmp_path, engine="compiled", device="cuda")
    rows = random_rows(LENGTHS)
    expected = model.early_exit_predict(**pad(rows))
    wrong: list[int] = []

    def work(place):
        stream = torch.cuda.Stream() if place % 2 else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            for turn in range(20):
                chosen = np.random.default_rng(100 * place + turn).permutation(len(rows))[: 1 + turn % len(rows)]
                output = predictor.early_exit_predict(**pad([rows[row] for row in chosen]))
                if not np.allclose(output.logits, expected.logits[chosen].numpy(), atol=1e-4):
                    wrong.append(place)

    in_threads(work, 8)
    assert not wrong


def test_half_precision(tmp_path):
    model = model_of("bert")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    predictor = BadgePredictor.from_pretrained(tmp_path, engine="compiled", precision="bf16", device="cuda")
    batch = pad(random_rows(LENGTHS))
    output = predictor.early_exit_predict(**batch, policy=ExitPolicy(), output_exit_logits=True)
    np.testing.assert_allclose(output.exit_logits, model(**batch).exit_logits.detach().numpy(), atol=0.15)


def test_pipeline(tmp_path):
    model = model_of("bert")
    model.config.exit_policy = POLICY
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    texts = [" ".join(f"w{int(token)}" for token in row.clamp(min=4)) for row in random_rows(LENGTHS)]
    here, there = (
        pipeline("text-classification", model=str(tmp_path), trust_remote_code=True, device=device)
        for device in ("cpu", "cuda")
    )
    for size in (1, 4):
        ours, expected = there(texts, batch_size=size), here(texts, batch_size=size)
        assert [answer["exit_layer"] for answer in ours] == [answer["exit_layer"] for answer in expected]
        assert [a["score"] for a in ours] == pytest.approx([a["score"] for a in expected], abs=1e-4)


def test_trainer(tmp_path):
    model = model_of("bert")
    rows = random_rows(64 * [12])
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in rows]

    def collate(chosen):
        return {
            **pad([row["input_ids"] for row in chosen]),
            "labels": torch.tensor([row["labels"] for row in chosen]),
        }

    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, learning_rate=1e-3, report_to=[], save_strategy="no", logging_steps=10,
        remove_unused_columns=False, per_device_train_batch_size=32, bf16=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert model.device.type == "cuda"
    assert losses[-1] < 0.8 * losses[0]
