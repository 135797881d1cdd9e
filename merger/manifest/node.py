"""What every mapping of the manifest is made of: the node, its scalars, and how it says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from merger.tensors import parse_size


def fail(code: str, what: str, *, why: str = "", fix: str = "") -> NoReturn:
    """Refuse a value, in our four parts; pydantic knows where."""
    raise PydanticCustomError(code, "{what}", {"what": what, "why": why, "fix": fix})


def _size(value: object) -> int:
    if not isinstance(value, str | int):
        fail("bad_value", "a size is a number with a unit", fix="write it as 5GB or 64MiB")
    try:
        return parse_size(value)
    except ValueError as error:
        fail("bad_value", str(error))


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        fail("bad_value", f"a number is expected, not {str(value).lower()}")
    return value


Size = Annotated[int, PlainValidator(_size)]
Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict()]
Finite = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Node(BaseModel):
    """A mapping of the grammar. A key without a value (`parameters:`) is an absent key, as in mergekit."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)
    says_defaults: ClassVar[bool] = True
    """Whether a section in which nothing is said is written out all the same."""

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        if not self.says_defaults and self == type(self)():
            return {}
        plain = handler(self)
        return {k: plain[k] for k in plain if plain[k] is not None and plain[k] not in ({}, [])}
