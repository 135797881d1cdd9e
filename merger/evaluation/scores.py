"""How well a model answers, by one forward pass an item: likelihood, whether the answer is the likeliest, and how far
its next-token distribution is from another model's.

Every token of an answer being the likeliest one, under the answer's own prefix, is the same as greedy decoding giving
that answer: no text is generated. Items go one by one, so nothing is padded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from merger.errors import MergeFailedError
from merger.evaluation.instances import Instance
from merger.evaluation.items import Item, Tokens, tokens_of

RESAMPLES: Final = 2000
"""Of the bootstrap."""
KEPT_POSITIONS: Final = 1024
"""Of the first model, positions whose whole distribution is kept on disk: 4 bytes a token of the vocabulary each."""
MOST_TOKENS: Final = 2048
"""Of one text: the logits of all its tokens stand in memory."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a model makes of one item."""

    nll: float
    """Negative log-likelihood of the scored tokens, in nats: their sum."""
    tokens: int
    right: bool | None
    """Whether each token of the answer is the likeliest; None where the item has none."""
    size: int = 0
    """Bytes of the text that the tokens stand for."""
    cut: bool = False
    """Whether only the beginning of a text was asked."""
    kl: float | None = None
    """Sum over the kept positions of KL(first ‖ this), in nats."""
    same: int = 0
    """At how many of them both find the same token likeliest."""
    kept: int = 0


class Kept:
    """The distributions of the first model at its first scored positions, in a file that goes away."""

    def __init__(self, positions: int = KEPT_POSITIONS) -> None:
        self._most = positions
        self._file = tempfile.TemporaryFile(prefix="raymerge-")  # noqa: SIM115 - closed in __exit__
        self._at: dict[int, tuple[int, tuple[int, int], Tokens]] = {}
        self._used = 0
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keep(self, index: int, tokens: Tokens, log_p: npt.NDArray[np.float32]) -> None:
        """Keep what was found of one item (positions, vocabulary), as far as there is room."""
        rows = np.ascontiguousarray(log_p[: self._most - self._used])
        if len(rows):
            self._file.seek(self._bytes)
            self._file.write(rows.data)
            self._at[index] = (self._bytes, (rows.shape[0], rows.shape[1]), tokens)
            self._used += len(rows)
            self._bytes += rows.nbytes

    def of(self, index: int, tokens: Tokens) -> npt.NDArray[np.float32] | None:
        """What was kept of an item, if the tokens are the same ones."""
        found = self._at.get(index)
        if found is None or found[2] != tokens:
            return None
        start, shape, _ = found
        self._file.seek(start)
        return np.frombuffer(self._file.read(4 * shape[0] * shape[1]), np.float32).reshape(shape)


def score_items(
    instance: Instance, items: Sequence[Item], *, keep: Kept | None = None, against: Kept | None = None
) -> list[Score]:
    """The scores of a model, item by item. Its distributions are kept in `keep`, or held `against` what was kept."""
    import torch

    found = []
    encoded = encode(instance, items)
    with torch.inference_mode():
        for index, (item, tokens) in enumerate(zip(items, encoded, strict=True)):
            log_p = log_probabilities(instance, tokens)
            if keep is not None:
                keep.keep(index, tokens, log_p)
            reference = None if against is None else against.of(index, tokens)
            found.append(_score(item, tokens, log_p, reference))
    return found


def encode(instance: Instance, items: Sequence[Item]) -> list[Tokens]:
    """All items as the model reads them. Raises what `tokens_of` raises, of the first that it cannot take."""
    return [tokens_of(item, instance.tokenizer, limit=instance.limit, text_limit=MOST_TOKENS) for item in items]


def log_probabilities(instance: Instance, tokens: Tokens) -> npt.NDArray[np.float32]:
    """The model's log-probabilities at each scored position: (positions, vocabulary), float32."""
    import torch

    ids = torch.tensor([tokens.ids], device=instance.device)
    count = len(tokens.ids) - tokens.first
    only = {"logits_to_keep": count + 1} if instance.keeps_logits else {}  # a vocabulary wide, so much the less
    logits = instance.model(input_ids=ids, use_cache=False, **only).logits[0, -count - 1 : -1]
    made: npt.NDArray[np.float32] = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
    return made


def _score(
    item: Item, tokens: Tokens, log_p: npt.NDArray[np.float32], reference: npt.NDArray[np.float32] | None
) -> Score:
    wanted = np.array(tokens.ids[tokens.first :])
    nll = -float(log_p[np.arange(len(wanted)), wanted].sum(dtype=np.float64))
    if not np.isfinite(nll):
        raise MergeFailedError.of(
            "not-finite", "a model answers with NaN or Inf", where=item.where,
            why="its weights hold such values, or its sums overflow", fix="verify it, or leave it out",
        )  # fmt: skip
    likeliest = log_p.argmax(axis=1)
    right = bool((likeliest == wanted).all()) if item.has_answer else None
    if reference is None:
        return Score(nll, len(wanted), right, tokens.size, tokens.cut)
    count, width = len(reference), min(reference.shape[1], log_p.shape[1])
    p, q = (_normalised(x[:count, :width].astype(np.float64)) for x in (reference, log_p))
    kl = float((np.exp(p) * (p - q)).sum())
    same = int((reference[:, :width].argmax(axis=1) == log_p[:count, :width].argmax(axis=1)).sum())
    return Score(nll, len(wanted), right, tokens.size, tokens.cut, max(0.0, kl), same, count)


def _normalised(log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities over what both models have: vocabularies may be padded to different sizes."""
    most = log_p.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = log_p - most - np.log(np.exp(log_p - most).sum(axis=1, keepdims=True))
    return found


# ---- sums and intervals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether zero is outside."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Summary:
    """The scores of several items together."""

    items: int
    nll: float
    """Mean over all scored tokens, in nats."""
    nll_per_byte: float
    """The same over the bytes of the scored texts: comparable between tokenizers."""
    exact: float | None
    """Share of the answers that greedy decoding gives; None where no item has one."""
    kl: float | None = None
    """Mean over the kept positions."""
    agreement: float | None = None
    cut: int = 0
    """Texts of which only the beginning was asked."""

    def as_json(self) -> dict[str, Any]:
        return {
            "items": self.items, "nll": self.nll, "nll_per_byte": self.nll_per_byte,
            "perplexity": float(np.exp(self.nll)), "exact": self.exact, "kl": self.kl, "agreement": self.agreement,
            "cut": self.cut,
        }  # fmt: skip


def summary_of(scores: Sequence[Score]) -> Summary:
    tokens, size = sum(score.tokens for score in scores), sum(score.size for score in scores)
    total = sum(score.nll for score in scores)
    rights = [score.right for score in scores if score.right is not None]
    kept = sum(score.kept for score in scores)
    return Summary(
        len(scores), total / tokens, total / max(1, size), sum(rights) / len(rights) if rights else None,
        sum(score.kl or 0.0 for score in scores) / kept if kept else None,
        sum(score.same for score in scores) / kept if kept else None, sum(score.cut for score in scores),
    )  # fmt: skip


Measure = Literal["nll", "nll_per_byte", "exact"]


def difference(scores: Sequence[Score], others: Sequence[Score], measure: Measure = "nll") -> Interval | None:
    """How much larger a mean is than the others', with a paired bootstrap over items: `nll` in nats a token,
    `nll_per_byte`, or `exact`.

    None where there is nothing to tell: fewer than two items, or no answer.
    """
    if measure == "exact":
        pairs = [
            (float(s.right), 1, float(o.right), 1) for s, o in zip(scores, others, strict=True)
            if s.right is not None and o.right is not None
        ]  # fmt: skip
    elif measure == "nll":
        pairs = [(s.nll, s.tokens, o.nll, o.tokens) for s, o in zip(scores, others, strict=True)]
    else:
        pairs = [(s.nll, s.size, o.nll, o.size) for s, o in zip(scores, others, strict=True)]
    if len(pairs) < 2:
        return None
    table = np.array(pairs, np.float64)
    draw = np.random.default_rng(0)
    drawn = [
        np.bincount(draw.integers(0, len(table), len(table)), minlength=len(table)) @ table for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(_gap(np.array(drawn)), [0.025, 0.975])
    return Interval(float(_gap(table.sum(axis=0))), float(low), float(high))


def _gap(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    made: npt.NDArray[np.float64] = sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
    return made
