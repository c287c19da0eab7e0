"""How a command takes options in groups: a parameter that is a dataclass of options stands for all its fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: parameters that are dataclasses of options replaced by their fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            groups[name] = hint
            inner = get_type_hints(hint, include_extras=True)
            flat += [_keyword(field.name, inner[field.name], field.default) for field in dataclasses.fields(hint)]
        else:
            flat.append(_keyword(name, hint, parameter.default))

    @functools.wraps(command)
    def taken(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        command(**values)

    paragraphs = (command.__doc__ or "").split("\n\n")
    taken.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the terminal wraps anew
    del taken.__wrapped__  # else typer would look past the new signature
    taken.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    taken.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return taken


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    empty = default is dataclasses.MISSING or default is inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if empty else default,
        annotation=annotation,
    )
