"""Options: what kind of value each takes, in which range, and one sentence of help stand in the signature of its verb.

pydantic checks them, whether they come from a recipe or from Python, and writes them as a JSON schema.
"""

import contextlib
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from .system.reading import shown

MANY = 2**31 - 1
FINITE = 3e38  # in float32
STRICT = ConfigDict(strict=True, extra="forbid")
WORDS = {"boolean": "true or false", "string": "text", "object": "a mapping", "null": "null"}
Verb = TypeVar("Verb", bound=Callable)
Options = TypeVar("Options")


def _from_text(value: Any) -> Any:
    with contextlib.suppress(ValueError):  # YAML reads 1e-4 as text
        return float(value) if isinstance(value, str) else value
    return value


Fraction = Annotated[float, Field(gt=0, le=1), BeforeValidator(_from_text)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_from_text)]
Positive = Annotated[float, Field(gt=0, le=FINITE), BeforeValidator(_from_text)]
Weight = Annotated[float, Field(ge=0, le=FINITE), BeforeValidator(_from_text)]
Natural = Annotated[int, Field(ge=0, le=MANY)]
Count = Annotated[int, Field(ge=1, le=MANY)]
BatchSize = Annotated[Count, Field(description="Examples in each batch.")]
Checkpointing = Annotated[
    bool,
    Field(description="Keep only the inputs of decoder layers and compute the rest anew: less memory for more time."),
]


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: dict) -> bool:
        return False


@functools.cache
def options(verb: Callable, **defaults: Any) -> type:
    """A frozen dataclass of the keyword-only arguments of `verb`, which checks them; `defaults` replace the verb's."""
    kinds = typing.get_type_hints(verb, include_extras=True)
    own = {p.name: p.default for p in inspect.signature(verb).parameters.values() if p.kind is p.KEYWORD_ONLY}
    does = inspect.getdoc(verb).partition("\n")[0].replace(", in place; returns the model", "")
    space = own | defaults | {"__annotations__": {name: kinds[name] for name in own}, "__doc__": does}
    kind = type(verb.__name__.title().replace("_", ""), (), space)
    return pydantic.dataclasses.dataclass(kind, frozen=True, config=STRICT)


def checked(verb: Verb) -> Verb:
    """`verb`, which raises ValueError, one sentence, for a keyword-only argument that is not as its signature says."""
    known = options(verb)
    plain, signature = typing.get_type_hints(verb), inspect.signature(verb)

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {f.name: kwargs[f.name] for f in dataclasses.fields(known) if f.name in kwargs}
        right = make(known, given, f"{verb.__name__}: ")
        return verb(*args, **kwargs | {name: getattr(right, name) for name in given})

    shorter = [p.replace(annotation=plain[name]) for name, p in signature.parameters.items()]  # as help() shows them
    call.__signature__ = signature.replace(parameters=shorter, return_annotation=plain["return"])
    return call


def make(kind: type[Options], values: dict[str, Any], where: str) -> Options:
    """An instance of a dataclass of options. Raises ValueError, which begins with `where`, for a wrong value."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name, *inner = first["loc"]
        found = properties(kind)[name]
        said = f"{name} is"
        if inner and isinstance(inner[0], int):  # of a list
            said, found = f"{name} holds", found["items"]
        raise ValueError(f"{where}{said} {shown(first['input'])}, it should be {words(found)}") from None


@functools.cache
def schema(kind: type) -> dict:
    """The JSON schema of a dataclass of options."""
    return TypeAdapter(kind).json_schema(schema_generator=_Untitled)


def properties(kind: type) -> dict[str, dict]:
    """`{name: JSON schema}` of the options in a dataclass."""
    return schema(kind)["properties"]


def words(found: dict, limits: bool = True) -> str:
    """What a JSON schema asks of a value, as a phrase; without `limits` the most that 32 bits hold is not named."""
    if "examples" in found:
        like = ", ".join(found["examples"][:-1]) + f" or {found['examples'][-1]}"
        return f"{words({k: v for k, v in found.items() if k != 'examples'}, limits)}, such as {like}"
    if "anyOf" in found:
        return ", or ".join(words(part, limits) for part in found["anyOf"])
    if "enum" in found or "const" in found:
        *first, last = map(str, found.get("enum", [found.get("const")]))
        return f"{', '.join(first)} or {last}" if first else last
    if found["type"] == "array":
        return f"a list, each item {words(found['items'], limits)}"
    if found["type"] not in ("integer", "number"):
        return WORDS[found["type"]]
    least, above, most = (found.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    noun = "a whole number" if found["type"] == "integer" else "a fraction" if most == 1 else "a number"
    if not limits and most in (MANY, FINITE):
        return f"{noun}, {least} or more" if above is None else f"{noun} above {above}"
    return f"{noun} from {least} to {most}" if above is None else f"{noun} above {above} and up to {most}"
