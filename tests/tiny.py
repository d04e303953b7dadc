"""Tiny models with random weights, one per encoder family, and random inputs for them."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_torch_greater_or_equal

from transformers_badge import BadgeConfig, BadgeForSequenceClassification, ExitTable
from transformers_badge.inference.compiled_stages import OLDEST_TORCH
from transformers_badge.inference.onnx_export import EXPORT_TOOLS


VOCABULARY = 100
PAD = 1

# The package itself runs with an older torch than its exports are made with.
exporting = pytest.mark.skipif(
    not is_torch_greater_or_equal(EXPORT_TOOLS["torch"]), reason=f"exports need torch {EXPORT_TOOLS['torch']} or newer"
)
compiling = pytest.mark.skipif(
    not is_torch_greater_or_equal(OLDEST_TORCH), reason=f"the engine compiled needs torch {OLDEST_TORCH} or newer"
)

_BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
}
_TOKENS = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}

# Four families that differ: every test that goes through families goes through these.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 160},
    # A window narrow enough that rows outgrow it.
    "modernbert": {**_BERT_LIKE, "local_attention": 8, **_TOKENS},
}

# All of them: the tests of the adapters go through these.
EVERY_FAMILY: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "albert": {**_BERT_LIKE, "embedding_size": 16, "num_hidden_groups": 2},
    "camembert": _BERT_LIKE,
    "deberta": {
        **_BERT_LIKE,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
    },
    "deberta-v2": {
        **_BERT_LIKE,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "electra": {**_BERT_LIKE, "embedding_size": 16},
    "ernie": _BERT_LIKE,
    "eurobert": {**_BERT_LIKE, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3},
    "megatron-bert": _BERT_LIKE,
    "mpnet": _BERT_LIKE,
    "nomic_bert": {**_BERT_LIKE, "head_dim": 8},
    "xlm-roberta": _BERT_LIKE,
}


def tiny_config(family: str, **fields: Any) -> BadgeConfig:
    encoder = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "initializer_range": 0.15,
        **EVERY_FAMILY[family],
        **fields.pop("encoder", {}),
    }
    filters = {"lexical_filters": 8} if fields.get("lexical_exit") else {}
    return BadgeConfig(**{"num_labels": 3, "encoder_config": encoder, **filters, **fields})


def tiny_model(family: str, seed: int = 0, **fields: Any) -> BadgeForSequenceClassification:
    """A model in eval mode whose bypasses are far from their zero start, and whose exits tell rows apart.

    Made once and copied from then on, since making takes thirty times as long and most tests ask for one.
    """
    key = json.dumps([family, seed, fields], sort_keys=True)
    if key not in _made:
        _made[key] = _make_model(family, seed, fields)
    torch.manual_seed(seed)  # what a test draws next does not depend on who made the model
    return deepcopy(_made[key])


_made: dict[str, BadgeForSequenceClassification] = {}


def _make_model(family: str, seed: int, fields: dict[str, Any]) -> BadgeForSequenceClassification:
    """Random encoders answer all rows alike; the exits are shifted and stretched so that their logits have mean 0 and
    standard deviation 1.5 over random rows.
    """
    torch.manual_seed(seed)
    model = BadgeForSequenceClassification(tiny_config(family, **fields)).eval()
    probe = pad(random_rows([int(n) for n in torch.randint(1, 60, (64,))], seed=seed + 1))
    with torch.no_grad():
        for bypass in model.bypasses:
            bypass.up.weight.normal_(std=0.3)
        for exit_ in model.exits:
            if hasattr(exit_, "query"):
                exit_.query.weight.normal_(std=0.3)
        if model.config.lexical_exit:
            model.exits[0].weight.normal_(std=1.5)
            if model.exits[0].phrases is not None:
                speak(model.exits[0].phrases)
        later = [(index, exit_) for index, exit_ in enumerate(model.exits) if model.exit_layers[index] > 0]
        for _, exit_ in later:
            exit_.classifier.weight.normal_(std=0.6)
        for _ in range(2):
            logits = model(**probe).exit_logits
            for index, exit_ in later:
                exit_.classifier.weight.mul_(1.5 / logits[:, index].std(dim=0)[:, None])
                exit_.classifier.bias.mul_(1.5 / logits[:, index].std(dim=0))
            for index, exit_ in later:
                exit_.classifier.bias.sub_(model(**probe).exit_logits[:, index].mean(dim=0))
    return model


@torch.no_grad()
def speak(phrases: Any) -> None:
    """Give the phrases of exit 0 something to say."""
    phrases.vectors[:-1].normal_()  # the last is of what is no word
    phrases.vectors[:-1, -1] = 1.0
    phrases.filters.normal_(std=0.4)
    phrases.weight.normal_(std=0.05)


def tiny_classifier(family: str, seed: int = 0, **fields: Any) -> Any:
    """transformers' own classifier of a family, in eval mode; its fields are those of the encoder's config."""
    torch.manual_seed(seed)
    config = tiny_config(family, encoder={"num_labels": 3, **fields}, num_labels=fields.get("num_labels", 3))
    return AutoModelForSequenceClassification.from_config(config.encoder_config).eval()


def table_of(exit_logits: torch.Tensor) -> ExitTable:
    """The exit table of exit logits, (rows, exits, labels), with an exit after every block."""
    return ExitTable(exit_logits=exit_logits.numpy(), exit_layers=tuple(range(1, exit_logits.shape[1] + 1)))


def random_rows(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Rows of token ids without padding tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(PAD + 1, VOCABULARY, (length,), generator=generator) for length in lengths]


def pad(rows: list[torch.Tensor], side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    """A batch of rows, padded to the longest and `extra` columns more."""
    width = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns] = row
        mask[i, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run work(0), work(1), ... side by side. What one of them raises is raised: a thread by itself would hide it."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def all_logits(model: Any, rows: Any) -> torch.Tensor:
    """What every exit says of each row of a data set, read by itself: (rows, exits, labels)."""
    with torch.no_grad():
        return torch.cat([model.eval()(torch.tensor([ids])).exit_logits for ids in rows["input_ids"]])


def tiny_tokenizer() -> Any:
    """Words w4 to w99, whose ids are their numbers."""
    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(4, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=120, **special)
