"""Every adapter against transformers' own hidden states, with padding trimmed and rows dropped."""

import numpy as np
import pytest
import torch

from tiny import EVERY_FAMILY, pad, random_rows, table_of, tiny_model
from transformers_badge import BadgeConfig
from transformers_badge.calibration.replay import score_exits
from transformers_badge.model.encoders_badge import BertAdapter, get_adapter


LENGTHS = [9, 30, 4, 17, 1]
# Families with absolute positions, which transformers counts from column 0 whatever stands there.
COUNTING_PADDING = {"albert", "bert", "distilbert", "electra", "ernie", "megatron-bert"}
EAGER_ONLY = {"deberta", "deberta-v2", "megatron-bert", "mpnet"}
ATTENTIONS = [
    (family, attention)
    for family in EVERY_FAMILY
    for attention in ("sdpa", "eager")
    if attention == "eager" or family not in EAGER_ONLY
]


def largest_difference(model, batch, rows=None, columns=None):
    """Largest difference between our hidden states and the encoder's own, over tokens that are not padding.

    With rows and columns given, the state is compacted to them after the embedding and again after block 2.
    """
    rows = np.arange(len(batch["input_ids"])) if rows is None else np.array(rows)
    columns = slice(0, batch["input_ids"].shape[1]) if columns is None else columns
    with torch.no_grad():
        reference = model.encoder(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].bool()
        state = model.embed(model.begin_padded(batch["input_ids"], batch["attention_mask"], None, None, None))
        state = model.compact(state, rows, columns, padded=True)
        worst = 0.0
        for layer in range(1, model.config.num_hidden_layers + 1):
            state = model.run_block(layer, state)
            if layer == 2:
                state = model.compact(state, np.arange(len(rows)), slice(0, None), padded=True)
            ours = state.hidden_states
            if layer == model.config.num_hidden_layers:
                ours = (model.adapter.final_norm(model.encoder) or torch.nn.Identity())(ours)
            kept = mask[rows][:, columns]
            worst = max(worst, (ours - reference[layer][rows][:, columns])[kept].abs().max().item())
    return worst


def with_attention(family, implementation):
    model = tiny_model(family)
    if family not in EAGER_ONLY:
        model.set_attn_implementation(implementation)
    assert model.encoder.config._attn_implementation == implementation
    return model


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_equal_those_of_transformers(family, attention, side):
    model = with_attention(family, attention)
    batch = pad(random_rows(LENGTHS), side)
    if side == "left" and family in COUNTING_PADDING:
        # transformers counts padding on the left as positions; we do not. Given the positions, it agrees.
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "position_ids": positions}), with_kwargs=True
        )
    assert largest_difference(model, batch) <= 1e-5


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_hidden_states_equal_with_rows_dropped_and_padding_trimmed(family, attention):
    model, batch = with_attention(family, attention), pad(random_rows(LENGTHS), extra=7)
    assert largest_difference(model, batch, rows=[0, 3], columns=slice(0, 17)) <= 1e-5


def test_families_called_eager_only_are(every_family):
    assert tiny_model(every_family).encoder._supports_sdpa == (every_family not in EAGER_ONLY)


def test_a_row_too_many_in_the_mask_is_noticed(every_family):
    """Negative control: blocks that run on the mask of other rows give other hidden states."""
    model, batch = tiny_model(every_family), pad(random_rows(LENGTHS))
    correct = model.compact

    def wrong(state, rows, columns, padded):
        state.attention_mask = state.attention_mask.roll(1, dims=0)
        return correct(state, rows, columns, padded)

    model.compact = wrong
    assert largest_difference(model, batch, rows=[0, 3], columns=slice(0, 17)) > 1e-3


def test_forward_returns_the_hidden_states_of_transformers(every_family):
    model, batch = tiny_model(every_family), pad(random_rows(LENGTHS))
    with torch.no_grad():
        ours = model(**batch, output_hidden_states=True).hidden_states
        reference = model.encoder(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    assert len(ours) == len(reference) == 5
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.shape == theirs.shape == (5, 30, 32)
        assert torch.allclose(mine[mask], theirs[mask], atol=1e-5)


def test_rows_are_answered_alone_as_in_any_batch(every_family):
    """The long test of this is test_batch_invariance; this one goes through every family."""
    model, rows = tiny_model(every_family), random_rows(LENGTHS)
    with torch.no_grad():
        exit_logits = model(**pad(rows)).exit_logits
    scores = score_exits(table_of(exit_logits), model.config.exit_policy)
    thresholds = [float(value) for value in np.median(scores, axis=0)]  # some leave, some stay
    alone = [model.early_exit_predict(**pad([row]), threshold=thresholds) for row in rows]
    assert len({int(output.exit_layer) for output in alone}) > 1
    for batch in (pad(rows), pad(rows, "left", extra=9)):
        together = model.early_exit_predict(**batch, threshold=thresholds)
        # a median of an odd number of rows is the score of one of them, which may fall either way
        sure = [i for i in range(len(rows)) if np.abs(scores[i] - thresholds).min() > 1e-5]
        assert len(sure) >= 1
        assert all(int(together.exit_layer[i]) == int(alone[i].exit_layer) for i in sure)
        assert all(torch.allclose(together.logits[i], alone[i].logits[0], atol=1e-5) for i in sure)


@pytest.mark.parametrize("pooling", ["attention", "mean", "cls"])
@pytest.mark.parametrize("reads", ["pooled", "block_output", "block_input"])
def test_rows_leave_alike_whatever_bypasses_and_exits_read(family, reads, pooling):
    model, rows = tiny_model(family, bypass_reads=reads, pooling=pooling), random_rows(LENGTHS)
    with torch.no_grad():
        exit_logits = model(**pad(rows)).exit_logits
    scores = score_exits(table_of(exit_logits), model.config.exit_policy)
    ordered = np.sort(scores, axis=0)
    thresholds = [float(value) for value in ordered[1:3].mean(axis=0)]  # between two rows: two leave at each exit
    early = model.early_exit_predict(**pad(rows, "left", extra=5), threshold=thresholds, output_exit_logits=True)
    seen = ~early.exit_logits.isnan()
    assert (~seen).sum() > 0  # some did leave, so that rows were dropped
    assert torch.allclose(early.exit_logits[seen], exit_logits[seen], atol=1e-5)


def test_right_padding_gives_the_positions_of_transformers():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert BertAdapter().position_ids(None, torch.arange(4), None, mask).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_without_a_mask_every_column_is_a_token(every_family):
    model = tiny_model(every_family)
    batch = pad(random_rows([7, 7]))
    with torch.no_grad():
        assert torch.allclose(model(**batch).exit_logits, model(input_ids=batch["input_ids"]).exit_logits, atol=1e-5)
    early = model.early_exit_predict(input_ids=batch["input_ids"], threshold=0.75)
    assert torch.equal(early.exit_layer, model.early_exit_predict(**batch, threshold=0.75).exit_layer)


def test_inputs_embeds_stand_for_their_token_ids(every_family):
    model = tiny_model(every_family)
    batch = pad(random_rows([7, 7]))
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        by_ids = model(**batch).exit_logits
        by_embeddings = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).exit_logits
    assert torch.allclose(by_ids, by_embeddings, atol=1e-6)


@pytest.mark.parametrize("family_with_types", ["bert", "roberta"])
def test_token_types_reach_the_encoder(family_with_types):
    model = tiny_model(family_with_types, encoder={"type_vocab_size": 2})
    batch = pad(random_rows([12, 5]))
    types = (torch.arange(12) > 4).long().expand(2, -1).contiguous()
    with torch.no_grad():
        reference = model.encoder(**batch, token_type_ids=types).last_hidden_state
        ours = model(**batch, token_type_ids=types, output_hidden_states=True).hidden_states[-1]
        without = model(**batch, output_hidden_states=True).hidden_states[-1]
    mask = batch["attention_mask"].bool()
    assert torch.allclose(ours[mask], reference[mask], atol=1e-5)
    assert not torch.allclose(ours[mask], without[mask], atol=1e-2)


def test_bfloat16_runs_and_stays_close(every_family):
    model, batch = tiny_model(every_family), pad(random_rows(LENGTHS))
    with torch.no_grad():
        exact = model(**batch).exit_logits
        model = model.to(torch.bfloat16)
        rough = model(**batch).exit_logits
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.15 * exact.abs().max()
    assert model.early_exit_predict(**batch, threshold=0.9).logits.dtype == torch.bfloat16


def test_encoders_are_built_without_parts_that_get_no_gradient(every_family):
    model = tiny_model(every_family).train()
    model(**pad(random_rows(LENGTHS)), labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    # roberta and bert ignore the gradient of padding rows only; every parameter as a whole must have one
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_model_that_has_predicted_can_be_trained(every_family):
    """Predicting runs in inference mode, of which nothing may be left in the encoder or in the answers."""
    model, batch = tiny_model(every_family), pad(random_rows(LENGTHS))
    taught = model.early_exit_predict(**batch, threshold=0.9, output_exit_logits=True)
    streamed = next(iter(model.early_exit_stream([{"input_ids": [5, 6, 7]}], threshold=0.9)))
    assert not any(made.is_inference() for made in (taught.logits, taught.exit_logits, streamed.logits))
    torch.nn.functional.mse_loss(model.train()(**batch).logits, taught.logits).backward()
    assert any(parameter.grad is not None for parameter in model.encoder.parameters())


def test_an_unsupported_family_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="'gpt2'.*albert, bert, .*xlm-roberta"):
        get_adapter("gpt2")
    with pytest.raises(ValueError, match="'gpt2' is supported"):
        BadgeConfig(encoder_config={"model_type": "gpt2"})


def test_all_families_are_tested():
    from transformers_badge.model.encoders_badge import _ADAPTERS

    assert set(_ADAPTERS) == set(EVERY_FAMILY)
