"""The demo's model in the shape of BERT-base: 12 blocks of width 768 that answer as its 6 of width 384 do.

What early exit is worth in seconds depends on the shape of the encoder and on which rows leave where. No trained
BERT-base lies at hand without a hub, so the demo's model is blown up: every number of its stream stands there twice,
and behind every block comes one that computes as much as any other and adds nothing. There are exits after every second
block. It loses what the demo's model loses at the same thresholds, and takes the time of a BERT-base.

Example: python benchmarks/base_shape.py demo-output/checkpoint --output-dir bench-output/base-shape
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from transformers_badge import BadgeConfig, BadgeForSequenceClassification


TEXTS = ["A lovely film.", "Two hours of my life that I will not get back, and the popcorn was stale."]


def twice(tensor: Tensor) -> Tensor:
    """What is put into the stream, or is added to it: its last axis is the stream's."""
    return torch.cat([tensor, tensor], dim=-1)


def reading(weight: Tensor) -> Tensor:
    """Weights (out, in) that read the stream: the halves of what they read are the same."""
    return twice(weight) / 2


def twice_by_head(tensor: Tensor, heads: int) -> Tensor:
    """Outputs (out, ...) of which every head has its own twice."""
    by_head = tensor.view(heads, -1, *tensor.shape[1:])
    return torch.cat([by_head, by_head], dim=1).flatten(0, 1)


def widen_block(name: str, tensor: Tensor, heads: int) -> Tensor:
    """A weight or bias of a block."""
    # The product of queries and keys is over twice as many numbers, and is divided by the root of that: 2 / sqrt(2).
    scale = 2**-0.25 if ".query." in name or ".key." in name else 1.0
    if "LayerNorm" in name:
        return twice(tensor)
    if ".self." in name:
        return scale * twice_by_head(reading(tensor) if tensor.ndim == 2 else tensor, heads)
    if tensor.ndim == 1:
        return twice(tensor)
    if name.startswith("attention.output"):  # it reads the heads
        return torch.cat(2 * [twice_by_head(tensor.t(), heads).t() / 2])
    return torch.cat(2 * [reading(tensor)])


@torch.no_grad()
def blow_up(model: Any) -> Any:
    """A model with twice the blocks and twice the width, and the same answers."""
    encoder = copy.deepcopy(model.config.encoder_config)
    heads, blocks = encoder.num_attention_heads, encoder.num_hidden_layers
    encoder.hidden_size *= 2
    encoder.intermediate_size *= 2
    encoder.num_hidden_layers *= 2
    source = model.config.to_dict()
    lexical = ("lexical_exit", "lexical_buckets", "lexical_ngrams", "lexical_filters", "lexical_ignored_ids")
    config = BadgeConfig(
        encoder_config=encoder,
        exit_layers=[2 * layer for layer in model.exit_layers],
        exit_policy={**source["exit_policy"], "certificate": None},
        id2label=model.config.id2label,
        label2id=model.config.label2id,
        problem_type=model.config.problem_type,
        **{name: source[name] for name in (*lexical, "bypass_size", "bypass_reads", "pooling")},
    )
    wide = BadgeForSequenceClassification(config).eval()
    weights, old = wide.state_dict(), model.state_dict()
    prefix = "encoder.encoder.layer."
    for name, tensor in old.items():
        if name.startswith(prefix):
            continue
        if ".classifier.weight" in name or ".query." in name or ".down.weight" in name:
            tensor = reading(tensor)
        elif ".up.weight" in name:
            tensor = torch.cat([tensor, tensor])
        elif ".norm." in name or "embeddings" in name:
            tensor = twice(tensor)
        weights[name] = tensor
    for layer in range(blocks):
        block = {n.removeprefix(f"{prefix}{layer}."): t for n, t in old.items() if n.startswith(f"{prefix}{layer}.")}
        for name, tensor in block.items():
            widened = widen_block(name, tensor, heads)
            plain = torch.ones_like(widened) if name.endswith("weight") else torch.zeros_like(widened)
            first, second = f"{prefix}{2 * layer}.{name}", f"{prefix}{2 * layer + 1}.{name}"
            if name.startswith("output.LayerNorm"):  # a norm of a norm: its weights come at the end
                weights[first], weights[second] = plain, widened
            elif name.startswith("attention.output.LayerNorm"):
                weights[first], weights[second] = widened, plain
            else:
                weights[first] = widened
                weights[second] = torch.zeros_like(widened) if ".output.dense" in f".{name}" else widened.clone()
    wide.load_state_dict(weights)
    return wide


@torch.no_grad()
def main() -> None:
    """Write the checkpoint, once it is known to answer as the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output/base-shape"))
    arguments = parser.parse_args()
    model = BadgeForSequenceClassification.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    wide = blow_up(model)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(wide(**batch).exit_logits, model(**batch).exit_logits, atol=1e-3, rtol=1e-3)
    wide.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"Wrote {arguments.output_dir}: {wide.num_parameters() / 1e6:.0f} million weights, the same answers.")


if __name__ == "__main__":
    main()
