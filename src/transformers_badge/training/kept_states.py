"""What a frozen encoder says, computed once and kept on disk, for exits that read nothing but fixed pooled rows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transformers_badge.model.encoders_badge import BertAdapter


class KeptStates(BertAdapter):
    """Stands in for the encoder of a converted model whose inputs_embeds are rows of `keep_states`.

    Each row is a text of one token, its pooled state, which a mean or a first token leaves as it is.
    """

    def __init__(self, exit_layers: list[int], num_labels: int) -> None:
        self.exit_layers, self.num_labels = exit_layers, num_labels

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        """All kept states of the rows, (rows, exits, hidden)."""
        states = inputs["inputs_embeds"]
        assert states is not None
        return states

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        """Hand the kept states on to every block."""
        return {"states": hidden_states}

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The kept state at this depth, if it has an exit: (rows, 1, hidden)."""
        if layer not in self.exit_layers:
            return hidden_states
        index = self.exit_layers.index(layer)
        states: Tensor = arguments["states"]
        return states[:, index : index + 1]

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The source's logits, which stand at the start of the last kept state."""
        return last_hidden_state[:, 0, : self.num_labels]


class KeptRows(Dataset):  # type: ignore[type-arg]
    """Kept states as a data set, read from disk as they are asked for."""

    def __init__(self, path: Path, lexical: slice | None = None) -> None:
        self.states = np.load(path, mmap_mode="c")
        self.lexical = lexical  # where in the last kept state of a row stands what the lexical exit says

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        states = torch.from_numpy(self.states[row])
        inputs = {"inputs_embeds": states}
        return inputs if self.lexical is None else {**inputs, "lexical_logits": states[-1, self.lexical]}


def can_keep(model: Any) -> bool:
    """Whether every inner exit of a converted model reads pooled rows that training does not change."""
    config = model.config
    on_rows = config.bypass_reads == "pooled" or not config.bypass_size
    fixed = config.pooling != "attention" and not model.adapter.pre_norm  # else query or norm see every token
    return bool(
        config.frozen and on_rows and fixed and config.num_labels + config.lexical_columns <= config.hidden_size
    )


@contextmanager
def kept_in_place(model: Any, trainer: Any, path: Path) -> Iterator[KeptRows]:
    """The kept states of a trainer's rows, and the model with them in the place of its encoder; then as it was."""
    rows = keep_states(model, trainer.get_test_dataloader(trainer.train_dataset), len(trainer.train_dataset), path)
    adapter = model.adapter
    model.adapter = KeptStates(model.exit_layers, model.num_labels)
    try:
        yield rows
    finally:
        model.adapter = adapter


@torch.no_grad()
def keep_states(model: Any, dataloader: Any, rows: int, path: Path) -> KeptRows:
    """Run the encoder over all rows once and write what the exits read: (rows, exits, hidden), float32.

    In the place of the last exit stand the source's logits and then the rows' lexical_logits, so that the order of the
    rows is of no account. A file that is there already is taken as it is; an interrupted run leaves none.

    Args:
        model: a converted model for which `can_keep` holds.
        dataloader: batches of the rows, as the model takes them.
        rows: how many there are.
        path: the `.npy` file.
    """
    from tqdm.auto import tqdm

    labels = model.num_labels
    lexical = slice(labels, labels + model.config.lexical_columns) if model.config.lexical_exit else None
    if path.exists():
        return KeptRows(path, lexical)
    model.eval()
    layers = model.exit_layers
    unfinished = path.with_suffix(".unfinished")
    kept = np.lib.format.open_memmap(
        unfinished, mode="w+", dtype=np.float32, shape=(rows, len(layers), model.config.hidden_size)
    )
    start = 0
    with tqdm(total=rows, desc="one pass through the encoder", unit="row") as bar:
        for batch in dataloader:
            mask = batch["attention_mask"]
            output = model(**batch, output_hidden_states=True)
            here = kept[start : start + len(mask)]
            for index, layer in enumerate(layers[:-1]):
                if layer > 0:
                    pooled = model.exits[index].pool(output.hidden_states[layer], mask)
                    here[:, index] = pooled.float().cpu().numpy()
            here[:, -1, :labels] = output.logits.float().cpu().numpy()
            if lexical is not None:
                here[:, -1, lexical] = batch["lexical_logits"].float().cpu().numpy()
            start += len(mask)
            bar.update(len(mask))
    kept.flush()
    os.replace(unfinished, path)
    return KeptRows(path, lexical)
