"""The convex problem behind exit 0: which weights of n-grams say the targets best, and how they are found.

The weights of a row's n-grams are

    W = R * V + s U M

V, what is learned of every n-gram, is stretched by R, the naive Bayes log ratio of how often a class has it (Wang and
Manning, "Baselines and Bigrams", ACL 2012). U holds the encoder's own embeddings of the single tokens, so that M speaks
for words that the texts do not have as well. Both are drawn to zero alike; the sum is an ordinary table of weights, and
what was learned through the embeddings costs nothing later.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax, softmax


Array = np.ndarray[Any, np.dtype[Any]]

_STEPS, _TOLERANCE = 200, 1e-3  # of the solver: at most so many, until the slope is this share of that at zero
_FLAT = 1e-6  # a slope that is none, whatever it was at zero


@dataclass(frozen=True)
class Problem:
    """Rows to fit to.

    Args:
        counts: (rows, groups), sparse: n-grams, over the square root of how many a row has; see `group_rare`.
        sizes: (groups,), how many n-grams are in each.
        meant: `shorter` of two matrices: (rows, tokens), sparse, the same of single n-grams, those that have an
            embedding; and (tokens, hidden), float32, their rows of U.
        targets: (rows, labels).
        kind: the problem type.
        scale: s.
    """

    counts: Any
    sizes: Array
    meant: list[Any]
    targets: Array
    kind: str
    scale: float = 1.0

    def select(self, rows: Array) -> "Problem":
        """The problem of some rows."""
        meant = shorter([self.meant[0][rows], *self.meant[1:]])
        return replace(self, counts=self.counts[rows], meant=meant, targets=self.targets[rows])


def shorter(factors: list[Any]) -> list[Any]:
    """Two matrices that are to be multiplied, or their product if it has fewer rows: whichever is less to read."""
    if len(factors) == 1 or factors[0].shape[0] >= factors[1].shape[0]:
        return factors
    return [(factors[0] @ factors[1]).astype(np.float32)]


@dataclass(frozen=True)
class Solution:
    """What was learned: R * V (groups, labels), s M (hidden, labels) and the constant (labels,)."""

    words: Array
    meanings: Array
    bias: Array

    def answers(self, problem: Problem) -> Array:
        """Logits (rows, labels)."""
        said = self.meanings.astype(np.float32)
        for matrix in reversed(problem.meant):
            said = matrix @ said
        return np.asarray(problem.counts @ self.words + said + self.bias)

    def columns(self, change: Callable[[Array], Array]) -> "Solution":
        """With other columns, one per label, made of those of each part."""
        return Solution(change(self.words), change(self.meanings), change(self.bias))


def solve(problem: Problem, penalty: float, start: Solution | None = None) -> Solution:
    """The weights with the smallest loss plus penalty / 2 times their squares; the constant is free.

    Args:
        penalty: above 0; infinity leaves the constant alone.
        start: where to begin: a solution of the same problem with another penalty. Default: zeros.
    """
    if _is_one_question(problem):
        # The weights of two classes are each other's negative: half as many to find, and their penalties add up.
        one = replace(problem, kind="multi_label_classification", targets=problem.targets[:, 1:])
        start = None if start is None else start.columns(lambda part: 2 * part[..., 1:])
        return solve(one, penalty / 2, start).columns(lambda part: np.concatenate([-part, part], axis=-1) / 2)
    objective = Objective(problem, penalty)
    zeros = np.zeros(objective.size)
    flat = max(_TOLERANCE * float(np.linalg.norm(objective.loss(zeros)[1])), _FLAT)
    begin = zeros if start is None else objective.parameters(start)
    options = {"gtol": flat, "maxiter": _STEPS}
    found = minimize(objective.loss, begin, jac=True, hessp=objective.curvature, method="trust-ncg", options=options)
    return objective.solution(found.x)


class Objective:
    """What `solve` makes small, as a solver takes it: by one vector of parameters, which are V, M and the constant.

    Args:
        problem, penalty: as `solve` has them.
    """

    def __init__(self, problem: Problem, penalty: float) -> None:
        self.problem, self._ratio, self._constant = problem, _ratio(problem), bool(np.isinf(penalty))
        labels, hidden = problem.targets.shape[1], problem.meant[-1].shape[1]
        self._cuts = np.cumsum([self._ratio.size, hidden * labels])
        self._shrink = np.repeat([0.0 if self._constant else penalty, 0.0], [self._cuts[-1], labels])
        self._place, self._predicted = np.empty(0), np.empty(0)
        self.size = len(self._shrink)

    def solution(self, parameters: Array) -> Solution:
        """What the parameters stand for."""
        words, meanings, bias = np.split(parameters, self._cuts)
        words, meanings = words.reshape(self._ratio.shape), meanings.reshape(-1, len(bias))
        return Solution(self._ratio * words, self.problem.scale * meanings, bias)

    def parameters(self, solution: Solution) -> Array:
        """What stands for a solution of the same problem."""
        words = np.divide(solution.words, self._ratio, out=np.zeros_like(self._ratio), where=self._ratio != 0)
        return np.concatenate([words.ravel(), solution.meanings.ravel() / self.problem.scale, solution.bias])

    def loss(self, parameters: Array) -> tuple[float, Array]:
        """Loss and penalty, and their gradient."""
        value, gradient = answer_loss(self.solution(parameters).answers(self.problem), self.problem)
        return value + float(self._shrink @ parameters**2) / 2, self._pull(gradient) + self._shrink * parameters

    def curvature(self, parameters: Array, direction: Array) -> Array:
        """The second derivative at these parameters, times a direction."""
        if not np.array_equal(self._place, parameters):  # many directions are asked for at a place
            self._place = parameters.copy()
            self._predicted = _predict(self.solution(parameters).answers(self.problem), self.problem)
        bent = _bend(self._predicted, self.solution(direction).answers(self.problem), self.problem)
        return np.asarray(self._pull(bent) + self._shrink * direction)

    def _pull(self, gradient: Array) -> Array:
        """A gradient by the answers, (rows, labels), as one by the parameters."""
        if self._constant:
            return np.concatenate([np.zeros(self._cuts[-1]), gradient.sum(axis=0)])
        on_words, on_meanings = self._ratio * (self.problem.counts.T @ gradient), gradient
        for matrix in self.problem.meant:
            on_meanings = matrix.T @ on_meanings.astype(np.float32)
        on_meanings = self.problem.scale * on_meanings
        return np.concatenate([on_words.ravel(), on_meanings.ravel(), gradient.sum(axis=0)])


def _is_one_question(problem: Problem) -> bool:
    """Whether two classes share a row between them, so that what is said of one says it all."""
    targets = problem.targets
    two = problem.kind == "single_label_classification" and targets.shape[1] == 2
    return two and bool(np.allclose(targets.sum(axis=1), 1))


def _ratio(problem: Problem) -> Array:
    """R, (groups, labels): how much oftener than others a class has an n-gram, as a logarithm."""
    targets, counts = problem.targets, problem.counts.sign()
    if problem.kind == "regression":
        return np.ones((counts.shape[1], targets.shape[1]))

    def share(weights: Array) -> Array:
        had = np.asarray(counts.T @ weights) + 1.0
        return np.asarray(np.log(had / (problem.sizes @ had)))

    had = share(targets)
    if problem.kind == "multi_label_classification":
        return had - share(1 - targets)
    classes = had.shape[1]  # of every class, against the mean of the others
    return np.asarray((had - had.mean(axis=1, keepdims=True)) * classes / max(classes - 1, 1))


def _predict(logits: Array, problem: Problem) -> Array:
    """What logits (rows, labels) stand for: probabilities, or values as they are."""
    if problem.kind == "single_label_classification":
        return np.asarray(softmax(logits, axis=1))
    return np.asarray(expit(logits)) if problem.kind == "multi_label_classification" else logits


def answer_loss(logits: Array, problem: Problem) -> tuple[float, Array]:
    """Loss over the rows, summed, and its gradient (rows, labels)."""
    targets, predicted = problem.targets, _predict(logits, problem)
    if problem.kind == "single_label_classification":
        value = -(targets * log_softmax(logits, axis=1)).sum()
        return float(value), predicted * targets.sum(axis=1, keepdims=True) - targets
    if problem.kind == "multi_label_classification":
        value = -(targets * log_expit(logits) + (1 - targets) * log_expit(-logits)).sum()
    else:
        value = ((logits - targets) ** 2).sum() / 2
    return float(value), predicted - targets


def _bend(predicted: Array, change: Array, problem: Problem) -> Array:
    """By how much the gradient of `answer_loss` changes, to first order, when the logits change by this.

    Args:
        predicted: (rows, labels), what is predicted before.
        change: (rows, labels), of the logits.
    """
    if problem.kind == "single_label_classification":
        moved = predicted * (change - (predicted * change).sum(axis=1, keepdims=True))
        return np.asarray(moved * problem.targets.sum(axis=1, keepdims=True))
    if problem.kind == "multi_label_classification":
        return np.asarray(predicted * (1 - predicted) * change)
    return change
