"""Fitting the phrases of exit 0: filters over word vectors that learn what the last exit answers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformers_badge.model.lexical_badge import pool_phrases
from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.model.ngrams_badge import find_words
from transformers_badge.model.phrases_badge import VECTOR_SHARE, WINDOW
from transformers_badge.model.rows_badge import pad_rows
from transformers_badge.training.answers import last_logits
from transformers_badge.training.lexical import text_folds
from transformers_badge.training.recipes import distillation_losses


MOST_ROWS = 50_000  # that are learnt from: more would hardly teach more
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 6, 32, 1e-3, 0.05
DROPOUT = 0.4  # of what the filters found; half as much of the vectors
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of what the phrases say, of which the best for rows held out is taken
_MIXED = 50  # batches of similar length are cut from so many batches of random rows


def fit_phrases(
    model: Any,
    tokenizer: Any,
    rows: Any,
    folds: Any | None = None,
    answers: Any | None = None,
    *,
    seed: int = 0,
    show_progress: bool = True,
) -> None:
    """Fit the phrases of a model's exit 0 to what its last exit answers; the rest of the model stays as it is.

    The vectors start from the encoder's token embeddings, so that phrases of words that the rows do not have are known
    too. What the phrases say is weighed on rows held out: where that is of no use, they say nothing.

    Args:
        model: a fine-tuned `BadgeForSequenceClassification`. Without phrases there is nothing to do.
        tokenizer: of its encoder.
        rows: a `datasets.Dataset` with `input_ids`, not padded, and `lexical_logits`. Many: made-up ones will do
            (`pieces.fill_up`), and without these little is gained.
        folds: (rows,), whole numbers; those of fold 0 are held out. Default: at random, but equal rows together.
        answers: logits of the last exit, (rows, labels). Default: it is asked.
        seed: of everything random.
    """
    if not model.config.phrase_filters:
        return
    rng = np.random.default_rng(seed)
    folds = text_folds(rows["input_ids"], seed) if folds is None else np.asarray(folds)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(part))[:MOST_ROWS] for part in (folds != 0, folds == 0)])
    if len(chosen) < len(rows):
        rows, folds, answers = rows.select(chosen), folds[chosen], None if answers is None else answers[chosen]
    if answers is None:
        answers = last_logits(model, tokenizer, rows, show_progress)
    problem_type = infer_problem_type(model.config.problem_type, model.num_labels, None)
    data = _Rows(model, rows, answers)
    learning, held_out = (np.flatnonzero(part) for part in (folds != 0, folds == 0))
    # Values of a regression are as large as they are, and weights of a fresh head about 1.
    spread = data.answers[learning].std(dim=0).clamp(min=1e-6) if problem_type == "regression" else 1.0
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        net = PhraseNet(model).to(model.device)
        _learn(net, data, learning, spread, problem_type, rng, show_progress)
    says = torch.cat([net(*data.batch(chunk)[:2]) for chunk in _chunks(held_out, 512)]) * spread
    losses = [
        _loss(data.lexical[held_out] + share * says, data.answers[held_out], problem_type).item() for share in SHARES
    ]
    net.write(model.exits[0].phrases, SHARES[int(np.argmin(losses))] * spread)


class _Rows:
    """Token rows, and what n-grams and last exit say of them, (rows, labels), float32."""

    def __init__(self, model: Any, rows: Any, answers: Any) -> None:
        self.model, self.ids = model, list(rows["input_ids"])
        self.lexical = torch.as_tensor(np.asarray(rows["lexical_logits"]), dtype=torch.float32, device=model.device)
        self.answers = torch.as_tensor(answers, dtype=torch.float32, device=model.device)
        self.lengths = np.array([len(row) for row in self.ids])

    def batch(self, chosen: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of these rows ids and words, (rows, tokens), and what n-grams and last exit say."""
        inputs, mask = pad_rows([{"input_ids": self.ids[row]} for row in chosen], padding_id=0)
        words = find_words(inputs["input_ids"], mask, self.model.config.ignored_ids)
        ids, inside = (torch.from_numpy(array).to(self.model.device) for array in (inputs["input_ids"], words))
        return ids, inside, self.lexical[chosen], self.answers[chosen]


class PhraseNet(nn.Module):
    """The phrases while they learn: their vectors are a projection of the encoder's token embeddings."""

    embeddings: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        embeddings = model.get_input_embeddings().weight.detach().float()
        embeddings = embeddings - embeddings.mean(dim=0)
        self.register_buffer("embeddings", embeddings / embeddings.std().clamp(min=1e-12))
        filters, size = model.config.lexical_filters, model.config.lexical_filters // VECTOR_SHARE
        self.project = nn.Linear(embeddings.shape[1], size - 1)  # one component of a vector is a constant
        self.filter = nn.Linear(WINDOW * size, filters, bias=False)
        self.head = nn.Linear(2 * filters, model.num_labels, bias=False)
        self.dropout, self.vector_dropout = nn.Dropout(DROPOUT), nn.Dropout(DROPOUT / 2)

    def forward(self, input_ids: Tensor, words: Tensor) -> Tensor:
        """Logits (rows, labels)."""
        vectors = F.pad(self.vector_dropout(self.project(self.embeddings[input_ids])), (0, 1), value=1.0)
        vectors = F.pad(vectors * words[..., None], (0, 0, WINDOW - 1, WINDOW - 1))
        return self.head(self.dropout(pool_phrases(vectors, words, self.filter.weight.t())))  # type: ignore[no-any-return]

    @torch.no_grad()
    def write(self, phrases: Any, scale: Any) -> None:
        """Put it into a model, with what it says times a number, or one per label."""
        phrases.vectors[:-1] = F.pad(self.project(self.embeddings), (0, 1), value=1.0).to(phrases.vectors)
        phrases.filters.copy_(self.filter.weight.t())
        phrases.weight.copy_(self.head.weight.t() * scale)


def _learn(
    net: PhraseNet, data: _Rows, rows: Any, spread: Any, problem_type: str, rng: Any, show_progress: bool
) -> None:
    """Fit the net to these rows."""
    from tqdm.auto import tqdm

    steps = EPOCHS * -(-len(rows) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    net.train()
    with torch.enable_grad(), tqdm(total=steps, desc="phrases", unit="step", disable=not show_progress) as bar:
        for _ in range(EPOCHS):
            for chunk in _batches_by_length(rng.permutation(rows), data.lengths, rng):
                input_ids, words, lexical, answers = data.batch(chunk)
                says = lexical + net(input_ids, words) * spread
                loss = _loss(says / spread, answers / spread, problem_type)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(1)
    net.eval().requires_grad_(False)


def _loss(says: Tensor, answers: Tensor, problem_type: str) -> Tensor:
    """Of logits against those of the last exit, both (rows, labels)."""
    return distillation_losses(torch.stack([says, answers], dim=1), problem_type, 1.0)[0]


def _batches_by_length(order: Any, lengths: Any, rng: Any) -> Any:
    """Batches of rows of similar length, in random order."""
    batches = []
    for chunk in _chunks(order, _MIXED * BATCH_SIZE):
        batches += _chunks(chunk[np.argsort(lengths[chunk], kind="stable")], BATCH_SIZE)
    return [batches[index] for index in rng.permutation(len(batches))]


def _chunks(order: Any, size: int) -> list[Any]:
    return [order[start : start + size] for start in range(0, len(order), size)]
