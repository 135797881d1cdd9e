"""What a manifest asks of the merge's vocabulary and chat template, and the files that say it. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from merger.errors import PlanError, Problem
from merger.formats.tokenizer import with_chat_template
from merger.manifest import Manifest
from merger.planning.chat import CHAT_TEMPLATES
from merger.planning.inputs import Inputs
from merger.vocabulary import (
    GENERATION_CONFIG,
    RowSource,
    TokenizerWish,
    TokenRow,
    UnitedVocabulary,
    Vocabulary,
    held_rows,
    moved_ids,
    unite,
    vocabulary_rows,
)

_ID_KEYS: Final = ("token_id", "token_ids")
"""Endings of the keys by which configs name tokens: bos_token_id, eos_token_ids."""
_SHORTEST_TEMPLATE: Final = 20
"""Characters; as mergekit tells a template from a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlan:
    """What becomes of tokens in a merge; empty where the manifest asks for nothing."""

    rows: int | None = None
    """Rows of the output's embeddings; None: those of the sources."""
    maps: Mapping[str, tuple[RowSource, ...] | None] = field(default_factory=dict)
    """By source: what tensors by token are read as; None, or no entry: as they lie."""
    origin: str | None = None
    """The source whose tokenizer files the output takes; None: the donor's."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that are written instead of copied."""
    moved: Mapping[int, int] = field(default_factory=dict)
    """Ids of the donor's tokens that are others in the output."""
    warnings: tuple[Problem, ...] = ()
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Member:
    """One thing that is merged, as its tokens see it."""

    key: str
    """By which the manifest names it."""
    model: str
    adapter: str | None = None
    """Its last adapter that changes rows of tokens."""


def tokenizer_wish(manifest: Manifest) -> TokenizerWish | None:
    """`tokenizer` or `tokenizer_source`; None where neither is given."""
    if manifest.tokenizer_source is not None:
        return TokenizerWish(source=manifest.tokenizer_source)
    asked = manifest.tokenizer
    if asked is None:
        return None
    rows = {token: _token_row(spec.source, force=spec.force) for token, spec in (asked.tokens or {}).items()}
    return TokenizerWish(source=asked.source, tokens=rows, pad_to_multiple_of=asked.pad_to_multiple_of)


def _token_row(source: str | Mapping[str, Any] | None, *, force: bool) -> TokenRow:
    if source is None or isinstance(source, str):
        return TokenRow(source=source, force=force)
    if source["kind"] == "zero":
        return TokenRow(zero=True, force=force)
    return TokenRow(source=source["model"], token=source.get("token"), number=source.get("token_id"), force=force)


def plan_tokens(manifest: Manifest, inputs: Inputs, members: Sequence[Member], donor: str) -> TokenPlan:
    """Unite the vocabularies of what is merged (the base among it), and choose the chat template. `donor` is the model
    whose config the output takes. Raises PlanError and SourceError with what stands against it."""
    wish = tokenizer_wish(manifest)
    united: UnitedVocabulary | None = None
    warnings: list[Problem] = []
    if wish is not None:
        united, warnings = _united(inputs, members, donor, wish)
    origin = donor if united is None else united.origin
    files = dict(united.files) if united is not None else {}
    if manifest.chat_template is not None:
        named = inputs.vocabularies
        sources = [m.adapter if m.adapter is not None and m.adapter in named else m.model for m in members]
        files = _with_template(manifest.chat_template, inputs, sources, origin, files)
    if united is None:
        return TokenPlan(files=files)
    own = inputs.vocabularies[donor]
    moved = moved_ids(own, united)
    if moved and own.generation is not None:
        config = moved_config(own.generation, moved)
        files[GENERATION_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
    return TokenPlan(
        rows=united.rows, maps=united.maps, origin=origin, files=files, moved=moved,
        warnings=(*warnings, *united.warnings), deviations=united.deviations,
    )  # fmt: skip


def _united(
    inputs: Inputs, members: Sequence[Member], donor: str, wish: TokenizerWish
) -> tuple[UnitedVocabulary, list[Problem]]:
    known = inputs.vocabularies
    if donor not in known:
        raise PlanError.of(
            "no-tokenizer", "the tokenizer of the base is not known", where=donor,
            why="a vocabulary is united by token strings, which tokenizer.json says",
            fix="save the tokenizer with transformers, which writes tokenizer.json, or leave tokenizer_source out",
        )  # fmt: skip
    merged, warnings = [], []
    for member in dict.fromkeys((Member(donor, donor), *members)):
        if member.adapter is not None:
            merged.append(replace(_of_adapter(inputs, member.adapter, known[donor]), reference=member.key))
            continue
        source = member.model
        if source in known:
            merged.append(replace(known[source], reference=member.key))
            continue
        rows = vocabulary_rows(inputs.catalogs[source])
        if rows != known[donor].rows:
            raise PlanError.of(
                "no-tokenizer", f"there is no tokenizer.json, and the model has {rows} rows", where=source,
                why=f"the base has {known[donor].rows}, so its tokens cannot be these", fix="add its tokenizer.json",
            )  # fmt: skip
        merged.append(replace(known[donor], reference=member.key))
        warnings.append(
            Problem("no-tokenizer", "there is no tokenizer.json: its rows are taken for the base's tokens", source, "",
                    "add the tokenizer that the model was trained with")
        )  # fmt: skip
    if wish.source not in ("union", "base") and wish.source not in known:
        raise PlanError.of(
            "no-tokenizer", "tokenizer_source has no tokenizer.json", where=wish.source,
            why="an adapter's counts where it changes embeddings or the head",
            fix="name a model that has one, base, or union",
        )  # fmt: skip
    order = [v for v in merged if v.reference != donor]
    base = next(v for v in merged if v.reference == donor)
    other = known.get(wish.source) if wish.source not in {v.reference for v in merged} else None
    return unite([base, *order], donor, wish, other=other), warnings


def _of_adapter(inputs: Inputs, adapter: str, base: Vocabulary) -> Vocabulary:
    """The vocabulary of an adapter on the base. Raises PlanError where its rows have no names."""
    held = held_rows(inputs.catalogs[adapter])
    if len(set(held.values())) > 1:
        raise PlanError.of(
            "rows-differ", "the adapter holds embeddings and head of different sizes",
            where=f"{adapter}: {', '.join(f'{name}: {rows} rows' for name, rows in sorted(held.items()))}",
            why="their rows cannot be the same tokens", fix="save both as they were trained (save_embedding_layers)",
        )  # fmt: skip
    known = inputs.vocabularies.get(adapter)
    if known is not None:
        return known
    if any(rows != base.rows for rows in held.values()):
        raise PlanError.of(
            "no-tokenizer", f"the adapter has no tokenizer.json, and its embeddings have {max(held.values())} rows",
            where=adapter, why=f"the base has {base.rows}, so what tokens the other rows are is not known",
            fix="put the tokenizer that it was trained with beside it (tokenizer.save_pretrained)",
        )  # fmt: skip
    return base


def _with_template(
    asked: str, inputs: Inputs, sources: Sequence[str], origin: str, files: Mapping[str, bytes]
) -> dict[str, bytes]:
    known = inputs.vocabularies
    if origin not in known:
        raise PlanError.of(
            "no-tokenizer", "a chat template needs a tokenizer, and its files are not known", where="chat_template",
            fix="use a model with a tokenizer.json, or leave chat_template out",
        )  # fmt: skip
    template: str | None
    if asked == "auto":
        counted = Counter(t for s in sources if s in known and (t := known[s].tokenizer.chat_template))
        template = counted.most_common(1)[0][0] if counted else None
        if template is None:
            raise PlanError.of(
                "no-chat-template", "no source has a chat template", where="chat_template",
                why="auto takes the commonest",
                fix=f"name one of {', '.join(CHAT_TEMPLATES)}, write one, or leave it out",
            )  # fmt: skip
    elif asked in CHAT_TEMPLATES:
        template = CHAT_TEMPLATES[asked]
    elif "{" in asked and len(asked) >= _SHORTEST_TEMPLATE:
        template = asked
    else:
        raise PlanError.of(
            "no-chat-template", f"there is no chat template {asked!r}", where="chat_template",
            why="it is neither a name nor a template in Jinja",
            fix=f"use auto, {', '.join(CHAT_TEMPLATES)}, or the text of a template",
        )  # fmt: skip
    if template == known[origin].tokenizer.chat_template:
        return dict(files)
    return with_chat_template(known[origin].tokenizer, template, files)


def moved_config(config: Mapping[str, Any], moved: Mapping[int, int]) -> dict[str, Any]:
    """A config, or generation config, with the ids of its tokens as they are in the output."""

    def renumber(value: Any) -> Any:
        if isinstance(value, list):
            return [renumber(item) for item in value]
        return moved.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    return {
        key: moved_config(value, moved) if isinstance(value, dict)
        else renumber(value) if key.endswith(_ID_KEYS) else value
        for key, value in config.items()
    }  # fmt: skip
