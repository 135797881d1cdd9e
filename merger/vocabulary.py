"""What a row of an embedding means in each source, and the one vocabulary of a merge: `unite`.

Rows are merged by index. Where two tokenizers give one index to different tokens, rows have to be moved first: the
merge's own vocabulary is built by token string, and each source's matrix is read through a map of rows.

    a token that a source has            its own row
    a token that only others have        the base's row, so that nothing changes there;
                                         where the base lacks it too, the mean of its owners' rows, for every source
    a row without a token (padding)      its own row where it is padding in every source; else the base's; else the mean
                                         of rows spread over the base's vocabulary

mergekit 0.1.5 does the same but in the second line, where owners keep their own rows and deltas from their mean are
merged, trimmed and all; and it drops padding rows unless pad_to_multiple_of brings them back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.adapters.declare import AdapterModule, Saved
from merger.catalog import Catalog
from merger.errors import PlanError, Problem
from merger.formats.checkpoint import read_json
from merger.formats.token_tensors import EMBEDDINGS, is_token_name
from merger.formats.tokenizer import NewToken, Tokenizer, extended_files, grown_tokenizer, read_tokenizer
from merger.tensors import RowRun

GENERATION_CONFIG: Final = "generation_config.json"
_SHOWN: Final = 4
PADDING_SAMPLE: Final = 16
"""Rows whose mean fills padding that no source has: near the mean of all, and as small beside a token's own logit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens of one source and the rows that they have."""

    reference: str
    rows: int
    """Rows of its embeddings."""
    tokenizer: Tokenizer
    generation: Mapping[str, Any] | None = None
    """generation_config.json, which names tokens by id."""

    def row(self, token: str) -> int | None:
        """The row of a token; None where it has none."""
        number = self.tokenizer.tokens.get(token)
        return number if number is not None and number < self.rows else None


def read_vocabulary(reference: str, catalog: Catalog) -> Vocabulary | None:
    """What a model's tokenizer.json says; None where it has none. Raises SourceError."""
    tokenizer = read_tokenizer(catalog.store)
    rows = vocabulary_rows(catalog)
    if tokenizer is None or rows is None:
        return None
    held = GENERATION_CONFIG in catalog.companions
    generation = read_json(catalog.store, GENERATION_CONFIG) if held else None
    return Vocabulary(reference=reference, rows=rows, tokenizer=tokenizer, generation=generation)


def read_adapter_vocabulary(reference: str, catalog: Catalog, base: Vocabulary | None) -> Vocabulary | None:
    """The tokens of an adapter that changes rows of tokens, by its own files; None where it changes none or they do not
    say. Where it holds no embeddings its rows are those of the base, which its own tokenizer may call otherwise.

    A tokenizer that is only what was added (`added_tokens.json`) goes on from the base's. Raises SourceError.
    """
    held = held_rows(catalog)
    rows = max(held.values()) if held else (base.rows if base is not None else None)
    if rows is None or not changes_tokens(catalog):
        return None
    tokenizer = read_tokenizer(catalog.store)
    if tokenizer is None and base is not None:
        tokenizer = grown_tokenizer(base.tokenizer, catalog.store)
    return None if tokenizer is None else Vocabulary(reference=reference, rows=rows, tokenizer=tokenizer)


def changes_tokens(catalog: Catalog) -> bool:
    """Whether an adapter changes rows that are tokens, by the names of what it changes."""
    return any(tokens_changed(module) for module in catalog.modules.values())


def tokens_changed(module: AdapterModule) -> bool:
    """Whether a module changes embeddings or a head."""
    return any(is_token_name(change.target) for change in module.changes)


def holds_copies(catalog: Catalog) -> bool:
    """Whether an adapter holds embeddings or a head for no other reason than that LoRA targets one of them, as PEFT
    saves such adapters (save_embedding_layers="auto")."""
    return any(module.rank and tokens_changed(module) for module in catalog.modules.values()) and any(
        module.tuner == "embeddings" for module in catalog.modules.values()
    )


def held_rows(catalog: Catalog) -> dict[str, int]:
    """Rows of the embeddings and heads that an adapter holds whole, by their names in its base."""
    return {
        change.target: catalog.tensors[step.tensor].spec.shape[0]
        for module in catalog.modules.values() if tokens_changed(module)
        for change in module.changes for step in change.steps if isinstance(step, Saved)
    }  # fmt: skip


def vocabulary_rows(catalog: Catalog) -> int | None:
    """`vocab_size` of a config, which is the number of rows of the embeddings; of their tensor where it is not said."""
    for config in (catalog.config, catalog.config.get("text_config")):
        if isinstance(config, Mapping) and isinstance(config.get("vocab_size"), int):
            return int(config["vocab_size"])
    found = {stored.spec.shape[0] for name, stored in catalog.tensors.items() if name.endswith(EMBEDDINGS)}
    return found.pop() if len(found) == 1 else None


def is_by_token(catalog: Catalog, name: str) -> bool:
    """Whether the rows of a tensor are tokens: as many as the vocabulary has, and named so or unlike any other size."""
    rows = vocabulary_rows(catalog)
    shape = catalog.tensors[name].spec.shape
    if rows is None or not shape or shape[0] != rows or len(shape) > 2:
        return False
    config = catalog.config.get("text_config", catalog.config)
    others = [v for k, v in config.items() if k != "vocab_size" and isinstance(v, int)] if config else []
    return is_token_name(name) or rows not in others


def vocabulary_difference(vocabularies: Sequence[Vocabulary]) -> Problem | None:
    """The first source whose token ids are not those of one before it; None where all agree.

    Tokens that only one of them has, at ids that the others leave free, are no difference.
    """
    known: dict[int, tuple[str, Vocabulary]] = {}
    for other in vocabularies:
        by_id = {number: token for token, number in other.tokenizer.tokens.items()}
        differing = [n for n, token in sorted(by_id.items()) if n in known and known[n][0] != token]
        if differing:
            shown = ", ".join(f"{n}: {known[n][0]!r} / {by_id[n]!r}" for n in differing[:_SHOWN])
            return Problem(
                "vocabularies-differ",
                f"{len(differing)} token ids mean different tokens in the sources",
                f"{known[differing[0]][1].reference} / {other.reference}: {shown}",
                "embeddings are merged row by row, so these rows are mixed with rows of other tokens",
                "write tokenizer_source: union, which moves rows to their tokens, or use models of one tokenizer",
            )
        known |= {number: (token, other) for number, token in by_id.items() if number not in known}
    return None


# ------------------------------------------------------------------------------------------------ one vocabulary of all


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """Where the row of one token comes from (mergekit's `tokens`)."""

    source: str | None = None
    """Reference of a merged model; None: zero where `zero`, else the usual rule."""
    token: str | None = None
    number: int | None = None
    """Another token of that model, by name or id; None: the token itself."""
    zero: bool = False
    force: bool = False
    """Whether sources that have the token take this row too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerWish:
    """What a manifest asks of the merge's tokenizer."""

    source: str
    """`union`, `base`, or the reference of a model."""
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows of one source's matrix, and the share with which they count."""

    source: str
    share: float
    runs: tuple[RowRun, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitedVocabulary:
    """The vocabulary of a merge."""

    rows: int
    tokens: Mapping[str, int]
    origin: str
    """The source whose tokenizer files the output takes."""
    files: Mapping[str, bytes]
    """Those of them that change."""
    maps: Mapping[str, tuple[RowSource, ...] | None]
    """By source: what its matrix is read as, in the order of sums; None where it is read as it lies."""
    warnings: tuple[Problem, ...] = ()
    deviations: tuple[str, ...] = ()


_Fill = list[tuple[str, int]]
"""Rows of sources whose mean is meant; empty: zero."""
_Rows = npt.NDArray[np.int64]


def unite(
    vocabularies: Sequence[Vocabulary], base: str | None, wish: TokenizerWish, *, other: Vocabulary | None = None
) -> UnitedVocabulary:
    """One vocabulary for these sources, which are those of the merge in their order, the base among them if it has one.

    `other` is the tokenizer of a model that is not merged, for `wish.source`. Raises PlanError (`no-token`) where the
    manifest names a token that its model lacks, and SourceError (`token-gap`).
    """
    by_name = {v.reference: v for v in vocabularies}
    first = by_name.get(base, vocabularies[0]) if base is not None else vocabularies[0]
    origin = first if wish.source in ("union", "base") else (other or by_name[wish.source])
    removed = [token for token, number in origin.tokenizer.tokens.items() if number >= origin.rows]
    _check_removed(origin, removed)
    tokens = {t: n for t, n in origin.tokenizer.tokens.items() if n < origin.rows}
    new = _new_tokens(vocabularies, tokens, union=wish.source == "union")
    new += [(t, {"content": t}) for t in wish.tokens if t not in tokens and t not in dict(new)]
    number = max(tokens.values(), default=-1) + 1
    numbered = [NewToken(token, number + i, entry) for i, (token, entry) in enumerate(new)]
    tokens |= {token.content: token.number for token in numbered}
    size = max(tokens.values(), default=-1) + 1
    multiple = wish.pad_to_multiple_of
    rows = -(-size // multiple) * multiple if multiple else max(size, origin.rows)
    own, fills, forced, orphans = _rows_of(vocabularies, first, origin, tokens, rows, wish)
    maps = {v.reference: _row_map(v, own[v.reference], fills, forced, rows) for v in vocabularies}
    return UnitedVocabulary(
        rows=rows, tokens=tokens, origin=origin.reference,
        files=extended_files(origin.tokenizer, numbered, removed), maps=maps,
        warnings=tuple(_warnings(vocabularies, first, removed, orphans, wish)),
        deviations=tuple(_deviations(fills, forced, rows, size, multiple)),
    )  # fmt: skip


def _check_removed(origin: Vocabulary, removed: Sequence[str]) -> None:
    pieces = [token for token in removed if token not in origin.tokenizer.added]
    if pieces:
        raise PlanError.of(
            "tokens-without-rows",
            f"{len(pieces)} pieces of a tokenizer have no rows in its model: {', '.join(map(repr, pieces[:_SHOWN]))}",
            where=origin.tokenizer.where, why=f"the model has {origin.rows} rows", fix="use the model's own tokenizer",
        )  # fmt: skip


def _new_tokens(
    vocabularies: Sequence[Vocabulary], tokens: Mapping[str, int], *, union: bool
) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Tokens that others have: first pieces of vocabularies, then added tokens; both by source and id."""
    if not union:
        return []
    found: dict[str, Mapping[str, Any] | None] = {}
    for want_added in (False, True):
        for vocabulary in vocabularies:
            added = vocabulary.tokenizer.added
            for token, number in sorted(vocabulary.tokenizer.tokens.items(), key=lambda item: item[1]):
                if (token in added) is want_added and token not in tokens and number < vocabulary.rows:
                    if want_added and found.get(token, added[token]) is None:
                        found[token] = added[token]
                    found.setdefault(token, added[token] if want_added else None)
    return list(found.items())


def _rows_of(
    vocabularies: Sequence[Vocabulary],
    first: Vocabulary,
    origin: Vocabulary,
    tokens: Mapping[str, int],
    rows: int,
    wish: TokenizerWish,
) -> tuple[dict[str, _Rows], dict[int, _Fill], npt.NDArray[np.bool_], list[str]]:
    """(each source's own stored rows or -1, what fills rows that are not a source's own, rows where all take the fill,
    tokens that no source has)."""
    own = {v.reference: np.full(rows, -1, np.int64) for v in vocabularies}
    for v in vocabularies:
        mine = own[v.reference]
        for token, number in tokens.items():
            row = v.row(token)
            if row is not None:
                mine[number] = row
    fills: dict[int, _Fill] = {}
    forced = np.zeros(rows, np.bool_)
    orphans = []
    base = own[first.reference]
    matrix = np.stack(list(own.values()))
    lacking: npt.NDArray[np.bool_] = np.any(matrix < 0, axis=0)
    for token, number in tokens.items():
        asked = wish.tokens.get(token)
        if asked is not None and (asked.source is not None or asked.zero):
            fills[number] = _asked(vocabularies, token, asked)
            forced[number] = asked.force
            continue
        if not lacking[number] and asked is None:
            continue
        owners = [v.reference for v in vocabularies if own[v.reference][number] >= 0]
        if base[number] >= 0:
            fills[number] = [(first.reference, int(base[number]))]
            forced[number] = asked is not None and asked.force
            continue
        if not owners:
            orphans.append(token)
        fills[number] = [(name, int(own[name][number])) for name in owners]
        forced[number] = True
    _pad(vocabularies, first, origin, tokens, own, fills, forced)
    return own, fills, forced, orphans


def _pad(
    vocabularies: Sequence[Vocabulary], first: Vocabulary, origin: Vocabulary, tokens: Mapping[str, int],
    own: Mapping[str, _Rows], fills: dict[int, _Fill], forced: npt.NDArray[np.bool_],
) -> None:  # fmt: skip
    """Give rows without a token what they hold."""
    blank = np.setdiff1d(np.arange(len(forced)), np.fromiter(tokens.values(), np.int64, len(tokens)))
    used = {v.reference: set(v.tokenizer.tokens.values()) for v in vocabularies}
    known = sorted(number for number in first.tokenizer.tokens.values() if number < first.rows)
    spread = [known[i * len(known) // PADDING_SAMPLE] for i in range(PADDING_SAMPLE)] if known else []
    for row in map(int, blank):
        if all(row < v.rows and row not in used[v.reference] for v in vocabularies):
            for v in vocabularies:
                own[v.reference][row] = row
            continue
        forced[row] = True
        if row < first.rows and origin is first and row not in used[first.reference]:
            fills[row] = [(first.reference, row)]
        else:
            fills[row] = [(first.reference, other) for other in spread]


def _asked(vocabularies: Sequence[Vocabulary], token: str, asked: TokenRow) -> _Fill:
    if asked.zero:
        return []
    found = next((v for v in vocabularies if v.reference == asked.source), None)
    where = f"tokenizer.tokens.{token}.source"
    if found is None:
        raise PlanError.of(
            "no-token", f"{asked.source} is no model of this merge that has a tokenizer", where=where,
            why="its row cannot be read", fix=f"name one of {', '.join(v.reference for v in vocabularies)}",
        )  # fmt: skip
    row = found.row(asked.token or token) if asked.number is None else asked.number
    if row is None or not 0 <= row < found.rows:
        raise PlanError.of(
            "no-token", f"{found.reference} has no row for {asked.token or token if asked.number is None else row!r}",
            where=where, why=f"it has {found.rows} rows", fix="name a token that the model has",
        )  # fmt: skip
    return [(found.reference, row)]


def _row_map(
    vocabulary: Vocabulary, own: _Rows, fills: Mapping[int, _Fill], forced: npt.NDArray[np.bool_], rows: int
) -> tuple[RowSource, ...] | None:
    kept = (own >= 0) & ~forced
    if rows == vocabulary.rows and kept.all() and bool((own == np.arange(rows)).all()):
        return None
    at = np.flatnonzero(kept)
    found = [RowSource(vocabulary.reference, 1.0, runs_of(at, own[at]))] if len(at) else []
    others: dict[tuple[int, str, float], list[tuple[int, int]]] = {}
    for row in map(int, np.flatnonzero(~kept)):
        fill = fills.get(row, [])
        for turn, (source, stored) in enumerate(fill):
            others.setdefault((turn, source, 1.0 / len(fill)), []).append((row, stored))
    for (_, source, share), pairs in others.items():
        result, stored_rows = np.array(pairs, np.int64).T
        found.append(RowSource(source, share, runs_of(result, stored_rows)))
    return tuple(found)


def runs_of(result: _Rows, stored: _Rows) -> tuple[RowRun, ...]:
    """Pairs of rows, ascending, as runs of neighbours."""
    breaks = np.flatnonzero((np.diff(result) != 1) | (np.diff(stored) != 1)) + 1
    bounds = [0, *map(int, breaks), len(result)]
    return tuple(RowRun(int(result[i]), int(stored[i]), j - i) for i, j in itertools.pairwise(bounds) if j > i)


def _warnings(
    vocabularies: Sequence[Vocabulary], first: Vocabulary, removed: Sequence[str], orphans: Sequence[str],
    wish: TokenizerWish,
) -> list[Problem]:  # fmt: skip
    found = []
    if removed:
        found.append(
            Problem("tokens-without-rows", f"{len(removed)} tokens of {first.reference} have no rows and are left out",
                    ", ".join(map(repr, removed[:_SHOWN])), f"the model has {first.rows} rows", "")
        )  # fmt: skip
    if orphans:
        found.append(
            Problem("token-without-source", f"{len(orphans)} tokens are in no source and get rows of zeros",
                    ", ".join(map(repr, orphans[:_SHOWN])), "", "give their source under tokenizer.tokens")
        )  # fmt: skip
    if wish.source != "union":
        return found
    for other in vocabularies:
        rules = first.tokenizer.same_rules(other.tokenizer)
        if rules:
            found.append(
                Problem("tokenizers-differ", f"{other.reference} splits text by other rules: {', '.join(rules)}",
                        other.tokenizer.where, f"the output splits text as {first.reference} does",
                        "its rows are right by token; check what text becomes")
            )  # fmt: skip
        mine, theirs = first.tokenizer.added, other.tokenizer.added
        flags = [t for t in mine.keys() & theirs.keys() if _flags(mine[t]) != _flags(theirs[t])]
        if flags:
            found.append(
                Problem("token-flags-differ", f"{len(flags)} added tokens are searched for differently",
                        f"{first.reference} / {other.reference}: {', '.join(map(repr, sorted(flags)[:_SHOWN]))}",
                        f"the output takes {first.reference}'s", "")
            )  # fmt: skip
    return found


def _flags(entry: Mapping[str, Any]) -> tuple[bool, ...]:
    return tuple(bool(entry.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special"))


def _deviations(
    fills: Mapping[int, _Fill], forced: npt.NDArray[np.bool_], rows: int, size: int, multiple: int | None
) -> list[str]:
    found = []
    shared = [row for row, fill in fills.items() if forced[row] and len({name for name, _ in fill}) > 1]
    if shared:
        found.append(
            f"{len(shared)} tokens that the base lacks and several sources have take the mean of these sources' rows; "
            "mergekit merges what each row differs from that mean"
        )
    if rows > size and not multiple:
        found.append(f"{rows - size} rows without a token are kept; mergekit drops them")
    return found


def moved_ids(donor: Vocabulary, united: UnitedVocabulary) -> dict[int, int]:
    """Ids of the donor's tokens that are others in the merge: for configs, which name tokens by id."""
    return {
        number: united.tokens[token]
        for token, number in donor.tokenizer.tokens.items()
        if token in united.tokens and united.tokens[token] != number
    }
