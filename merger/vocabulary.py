"""Whether the sources of a merge mean the same by a row of their embeddings: tokens and ids, from tokenizer.json.

Rows are merged by index. Where two tokenizers give one index to different tokens, the merge mixes unrelated rows.
Uniting vocabularies is not built yet; here they are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from merger.catalog import Catalog
from merger.errors import Problem, RefusedError
from merger.formats.tokenizer import tokens_of

_SHOWN: Final = 4


def vocabulary_difference(models: Sequence[Catalog]) -> Problem | None:
    """The first model whose token ids are not those of the first model that has a tokenizer.json; None where all agree.

    Tokens that only one of them has, at ids that the other leaves free, are no difference.
    """
    known: tuple[str, dict[int, str]] | None = None
    for catalog in models:
        try:
            tokens = tokens_of(catalog.store)
        except RefusedError:  # a tokenizer that cannot be read is copied or left, and never decides a number
            continue
        if tokens is None:
            continue
        by_id = {number: token for token, number in tokens.items()}
        if known is None:
            known = (catalog.reference, by_id)
            continue
        differing = [n for n, token in by_id.items() if n in known[1] and known[1][n] != token]
        if differing:
            shown = ", ".join(f"{n}: {known[1][n]!r} / {by_id[n]!r}" for n in differing[:_SHOWN])
            return Problem(
                "vocabularies-differ",
                f"{len(differing)} token ids mean different tokens in the sources",
                f"{known[0]} / {catalog.reference}: {shown}",
                "embeddings are merged row by row, so these rows are mixed with rows of other tokens",
                "use models of one tokenizer; uniting vocabularies is the work of a later version",
            )
    return None
