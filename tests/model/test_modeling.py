"""Bypasses, exits and the forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from tiny import pad, random_rows, tiny_config, tiny_model
from transformers_badge import BadgeConfig, BadgeForSequenceClassification


BATCH = pad(random_rows([9, 4, 12]))
WITHOUT_CHECKPOINTING = {"albert", "mpnet"}


def test_fresh_bypasses_change_nothing(family):
    torch.manual_seed(0)
    with_bypass = BadgeForSequenceClassification(tiny_config(family, bypass_size=8)).eval()
    without = BadgeForSequenceClassification(tiny_config(family, bypass_size=0)).eval()
    without.load_state_dict({name: value for name, value in with_bypass.state_dict().items() if "bypasses" not in name})
    with torch.no_grad():
        assert torch.equal(with_bypass(**BATCH).exit_logits, without(**BATCH).exit_logits)
        with_bypass.bypasses[
            1
        ].up.weight.normal_()  # the control: a bypass that is not zero does change the later exits
        difference = (with_bypass(**BATCH).exit_logits - without(**BATCH).exit_logits).abs().amax(dim=(0, 2))
    assert difference[0] == 0
    assert (difference[1:3] > 1e-3).all()
    assert difference[3] == 0  # the last exit reads the encoder alone


def test_bypasses_never_touch_the_encoder_stream(model):
    with torch.no_grad():
        before = model(**BATCH, output_hidden_states=True).hidden_states
        for bypass in model.bypasses:
            bypass.up.weight.normal_()
        after = model(**BATCH, output_hidden_states=True).hidden_states
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def pool(exit_, tokens):
    """A mean over the tokens, under weights from the exit's query or alike."""
    mask = BATCH["attention_mask"][..., None].float()
    weights = mask if exit_.pooling == "mean" else mask * torch.exp(exit_.query(tokens))
    return (tokens * weights).sum(1) / weights.sum(1)


def step(bypass, reading, state):
    normed = torch.nn.functional.layer_norm(reading + state, (32,), bypass.norm.weight, bypass.norm.bias)
    return state + bypass.up(torch.nn.functional.gelu(bypass.down(normed)))


@pytest.mark.parametrize("pooling", ["attention", "mean", "cls"])
@pytest.mark.parametrize("reads", ["pooled", "block_output", "block_input"])
def test_the_model_is_the_formula(reads, pooling):
    """h_m, p_m, b_m and z_m of the design, written out."""
    bert = tiny_model("bert", bypass_reads=reads, pooling=pooling)
    with torch.no_grad():
        hidden = bert.encoder(**BATCH, output_hidden_states=True).hidden_states
        logits = bert(**BATCH).exit_logits
        assert len(bert.bypasses) == 3
        state = torch.zeros(3, 32) if reads == "pooled" else torch.zeros_like(hidden[0])
        for m, exit_ in enumerate(bert.exits, start=1):
            read = (lambda tokens: tokens[:, 0]) if pooling == "cls" else (lambda tokens, e=exit_: pool(e, tokens))
            if m == 4:  # the last exit reads the encoder alone
                seen = read(hidden[m])
            elif reads == "pooled":
                state = step(bert.bypasses[m - 1], read(hidden[m]), state)
                seen = read(hidden[m]) + state
            else:
                state = step(bert.bypasses[m - 1], hidden[m if reads == "block_output" else m - 1], state)
                seen = read(hidden[m] + state)
            assert torch.allclose(logits[:, m - 1], exit_.classifier(seen), atol=1e-5), m


@pytest.mark.parametrize("reads", ["pooled", "block_output", "block_input"])
def test_exits_at_some_depths_share_the_bypasses_up_to_them(reads):
    model = tiny_model("bert", bypass_reads=reads, exit_layers=[1, 3, 4])
    assert model.bypass_layers == ([1, 3] if reads == "pooled" else [1, 2, 3])
    assert len(model.bypasses) == len(model.bypass_layers)
    assert model(**BATCH).exit_logits.shape == (3, 3, 3)
    assert tiny_model("bert", exit_layers=[4]).bypass_layers == []


def test_attention_pooling_starts_as_the_mean(family):
    torch.manual_seed(0)
    attention = BadgeForSequenceClassification(tiny_config(family)).eval()
    mean = BadgeForSequenceClassification(tiny_config(family, pooling="mean")).eval()
    mean.load_state_dict({name: value for name, value in attention.state_dict().items() if name in mean.state_dict()})
    with torch.no_grad():
        assert torch.allclose(attention(**BATCH).exit_logits, mean(**BATCH).exit_logits, atol=1e-6)
        attention.exits[1].query.weight.normal_()
        changed = (attention(**BATCH).exit_logits - mean(**BATCH).exit_logits).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.tolist() == [False, True, False, False]


def test_pre_norm_exits_read_through_a_norm_of_their_own():
    model = tiny_model("modernbert")
    norms = [type(exit_.norm) for exit_ in model.exits]
    assert norms == [torch.nn.LayerNorm] * 3 + [torch.nn.Identity]  # the last reads through the encoder's
    assert all(isinstance(exit_.norm, torch.nn.Identity) for exit_ in tiny_model("bert").exits)


@pytest.mark.parametrize(("reads", "bypasses"), [("pooled", 1), ("block_output", 64), ("block_input", 64)])
def test_bypass_flops_are_the_closed_form_and_at_most_two_percent(reads, bypasses):
    torch.manual_seed(0)
    rows, tokens = 2, 64
    batch = {"input_ids": torch.randint(0, 1000, (rows, tokens))}
    encoder = {"model_type": "bert", "num_hidden_layers": 2, "vocab_size": 1000}

    def flops(bypass_size):
        config = BadgeConfig(encoder_config=encoder, bypass_size=bypass_size, bypass_reads=reads)
        model = BadgeForSequenceClassification(config).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**batch)
        return counter.get_total_flops(), model.config.bypass_size

    (with_bypass, width), (without, _) = flops(None), flops(0)
    # one bypass (the last exit has none) x matrices x multiply-add, on each of the vectors that it reads
    assert with_bypass - without == 2 * 2 * rows * bypasses * 768 * width
    assert (with_bypass - without) / without <= 0.02


def test_from_encoder_keeps_every_weight_of_the_encoder(tmp_path):
    torch.manual_seed(1)
    source = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
    source.save_pretrained(tmp_path)
    model = BadgeForSequenceClassification.from_encoder(tmp_path, num_labels=4, bypass_size=3, exit_layers=[1, 2])
    assert (model.num_labels, model.config.bypass_size, model.training) == (4, 3, False)
    ours = model.encoder.state_dict()
    theirs = {name: value for name, value in source.state_dict().items() if "pooler" not in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert all((bypass.up.weight == 0).all() for bypass in model.bypasses)
    assert all(exit_.classifier.weight.std() > 0 for exit_ in model.exits)
    assert model.config.exit_policy.threshold is None


def test_from_encoder_says_what_is_wrong(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "badge")
    with pytest.raises(ValueError, match="BADGE checkpoint already: load it with from_pretrained"):
        BadgeForSequenceClassification.from_encoder(tmp_path / "badge")
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="does not know 'num_label'"):
        BadgeForSequenceClassification.from_encoder(tmp_path / "bare", num_label=3)
    with pytest.raises(OSError, match="model.safetensors"):
        BadgeForSequenceClassification.from_encoder(tmp_path / "bare")
    with pytest.raises(OSError, match="no/such/folder"):
        BadgeForSequenceClassification.from_encoder("no/such/folder")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_reaches_the_encoder(tmp_path, model, attention):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.encoder.config._attn_implementation == attention
    with torch.no_grad():
        assert torch.allclose(loaded(**BATCH).exit_logits, model(**BATCH).exit_logits, atol=1e-5)


def test_a_tuple_is_returned_when_asked_for(bert):
    loss, logits, exit_logits = bert(**BATCH, labels=torch.tensor([0, 1, 2]), return_dict=False)
    assert (loss.shape, logits.shape, exit_logits.shape) == ((), (3, 3), (3, 4, 3))


def test_attentions_are_the_encoders_own_affair(bert):
    assert bert(**BATCH, output_attentions=None).logits.shape == (3, 3)  # peft always says so
    with pytest.raises(ValueError, match="Attentions are not returned: .* ask the encoder"):
        bert(**BATCH, output_attentions=True)


def test_the_vocabulary_can_be_resized(bert):
    bert.resize_token_embeddings(120)
    batch = {"input_ids": torch.tensor([[119, 5]])}
    assert bert(**batch).logits.shape == (1, 3)
    assert bert.early_exit_predict(**batch).logits.shape == (1, 3)


def test_gradient_checkpointing_changes_no_gradient(every_family):
    if every_family in WITHOUT_CHECKPOINTING:
        with pytest.raises(ValueError, match="does not support"):
            tiny_model(every_family).encoder.gradient_checkpointing_enable()
        return
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(every_family)
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():  # training mode switches checkpointing on; dropout stays off, to compare
            module.training = not isinstance(module, torch.nn.Dropout) and "Attention" not in type(module).__name__
        model(**BATCH, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
