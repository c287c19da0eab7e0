"""Chat templates: jinja2 programs that come with a model, run where they can do nothing but make text.

A template is somebody else's code. It runs in jinja2's immutable sandbox and sees only plain values: strings, numbers,
lists and dicts, copied from what the caller gave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from .errors import TokenizerError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

DEFAULT = "default"


class ChatTemplates:
    """The named templates of a model, most often only "default". `sources` maps names to jinja2 text."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self._compiled: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        name: str | None = None,
    ) -> str:
        """The prompt for `messages`, each with at least a "role". `name` chooses among several templates.

        TokenizerError: no template, messages the template refuses, or a template that fails or leaves its sandbox.
        """
        name = name or ("tool_use" if variables.get("tools") and "tool_use" in self.sources else DEFAULT)
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise TokenizerError("A chat message is a mapping with a 'role' and a 'content'.")
        values = {key: _plain(value) for key, value in variables.items()}
        values |= {"messages": _plain(messages), "add_generation_prompt": bool(add_generation_prompt)}
        try:
            # Foreign code can fail in any way at all, endless recursion and division by zero included.
            return str(self._template(name).render(**values))
        except TokenizerError:
            raise
        except Exception as error:
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise TokenizerError(
                f"The model's chat template failed: {reason}.",
                "Some templates refuse a system message or a role out of turn; --raw sends the prompt without one.",
            ) from error

    def _template(self, name: str) -> Any:
        if name not in self._compiled:
            if name not in self.sources:
                others = ", ".join(sorted(self.sources))
                raise TokenizerError(
                    f"The model has no chat template named '{name}'; it has {others}."
                    if others
                    else "The model has no chat template.",
                    "Choose one of its templates by name." if others else "Send the prompt as it is with --raw.",
                )
            self._compiled[name] = _environment().from_string(self.sources[name])
        return self._compiled[name]


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates on the Hugging Face hub are written for."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here its body is text like any other."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes for HTML, which would put \u003c into prompts
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _plain(value: Any) -> Any:
    """A copy made of JSON's types only, so that no object with methods of its own gets into the sandbox."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    raise TokenizerError(
        f"A chat template takes text, numbers, lists and mappings; a {type(value).__name__} was given."
    )
