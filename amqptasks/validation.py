"""Arguments against annotations: one compiled pydantic validator per task, for the call and for the worker."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pydantic_core
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from amqptasks.errors import ConfigError, InvalidArguments

__all__ = ["ArgumentValidator", "return_converter"]

_CONFIG = ConfigDict(arbitrary_types_allowed=True, validate_default=False)


class ArgumentValidator:
    """Checks and converts the arguments of one function.

    Built at first use, because annotations may name what is defined further down in the module. A parameter without
    an annotation takes anything. `skip` parameters (``self``) are left out at the front.
    """

    def __init__(self, task: str, function: Callable[..., Any], *, skip: int = 0) -> None:
        self._task = task
        self._function = function
        self._skip = skip
        self._names: list[str] = []
        self._validate: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The converted arguments. Raises `InvalidArguments` with one line for each that does not fit."""
        validate = self._validate or self._compile()
        try:
            checked, named = validate(ArgsKwargs(tuple(args), dict(kwargs)))
        except ValidationError as error:
            raise InvalidArguments(self._explain(error)) from None
        # Only what the caller gave: the function's own defaults apply where it runs.
        return checked[: len(args)], {name: named[name] for name in kwargs}

    def _compile(self) -> Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]:
        # The adapter validates the arguments of a stand-in that has the task's signature and returns what it got.
        def stand_in(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs

        function = self._function
        try:
            signature = inspect.signature(function)
            hints = typing.get_type_hints(function, include_extras=True)
            parameters = list(signature.parameters.values())[self._skip :]
            self._names = [parameter.name for parameter in parameters]
            names = set(self._names)
            stand_in.__annotations__ = {name: hint for name, hint in hints.items() if name in names}
            stand_in.__signature__ = signature.replace(  # type: ignore[attr-defined]  # inspect reads it
                parameters=[p.replace(annotation=hints.get(p.name, p.empty)) for p in parameters],
                return_annotation=inspect.Signature.empty,
            )
            adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, stand_in), config=_CONFIG)
        except (NameError, PydanticUserError, PydanticSchemaGenerationError, pydantic_core.SchemaError) as error:
            raise ConfigError(f"task {self._task}: its annotations cannot be used: {error}") from error
        self._validate = adapter.validator.validate_python
        return self._validate

    def _explain(self, error: ValidationError) -> str:
        problems = []
        for problem in error.errors(include_url=False, include_context=False):
            first, *rest = problem["loc"]
            # A positional argument has a number; people know its name.
            named = self._names[first] if isinstance(first, int) and first < len(self._names) else first
            where = ".".join(str(part) for part in (named, *rest))
            got = "" if problem["type"].startswith("missing") else f", got {problem['input']!r:.100}"
            problems.append(f"{where}: {problem['msg']}{got}")
        return f"task {self._task}: " + "; ".join(problems)


#: What JSON gives back as it was: nothing to convert.
_PLAIN = frozenset({None, type(None), Any, int, str, bool, float, list, dict, inspect.Signature.empty})


def return_converter(function: Callable[..., Any]) -> Callable[[Any], Any] | None:
    """Makes the value that the function is annotated to return of its JSON; None when that is the value.

    A value that does not fit is given as it is: the task ran, and its caller should see what it returned.
    """
    try:
        hint = typing.get_type_hints(function, include_extras=True).get("return")
        if hint is None or (hint.__hash__ is not None and hint in _PLAIN):
            return None
        validate = TypeAdapter(hint, config=None if _has_config(hint) else _CONFIG).validator.validate_python
    except Exception:  # an annotation that pydantic does not know: the value stays what JSON says
        return None

    def convert(value: Any) -> Any:
        try:
            return validate(value)
        except ValidationError:
            return value

    return convert


def _has_config(hint: Any) -> bool:
    """pydantic refuses a configuration for types that have their own."""
    return isinstance(hint, type) and (
        hasattr(hint, "model_config") or hasattr(hint, "__dataclass_fields__") or hasattr(hint, "__total__")
    )
