"""docs/help.md from the commands themselves: `python -m flashinfer_cli.cli.reference > docs/help.md`."""

from __future__ import annotations

import re
import sys
from typing import Any, Literal, get_args, get_origin

import typer

from .main import NAME, app

HEAD = "<!-- Written by `python -m flashinfer_cli.cli.reference`; a test compares it with the commands. -->\n"


def reference() -> str:
    """Every command with its arguments and options, as Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [f"{HEAD}\n# {NAME}\n\n{_prose(group.help)}\n"]
    commands = "\n".join(
        f"- [`{name}`](#{name}) {_first_line(command.help)}" for name, command in group.commands.items()
    )
    parts.append(commands + "\n")
    functions: list[Any] = [registered.callback for registered in app.registered_commands]
    hints = {function.__name__.replace("_", "-"): function.__annotations__ for function in functions}
    for name, command in group.commands.items():
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        usage = " ".join([NAME, name, *(_argument(each) for each in arguments), "[OPTIONS]"])
        parts.append(f"## {name}\n\n```\n{usage}\n```\n\n{_prose(command.help)}\n")
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            panel = "Arguments" if parameter in arguments else parameter.rich_help_panel or "Options"
            panels.setdefault(panel, []).append(_row(parameter, hints[name][parameter.name]))
        parts += [f"| {panel} | |\n|---|---|\n" + "".join(rows) for panel, rows in panels.items()]
    return "\n".join(parts)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar) if parameter.required else f"[{parameter.metavar}]"


def _row(parameter: Any, hint: Any) -> str:
    if parameter.param_type_name == "argument":
        names, value = f"`{parameter.metavar}`", ""
    else:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        value = "" if parameter.is_flag else f" {parameter.metavar or ', '.join(_words(hint)) or 'VALUE'}"
    shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    default = f" Default: {shown}." if shown not in (None, False, "") and not parameter.required else ""
    return f"| {names}{value} | {parameter.help}{default}{' Required.' if parameter.required else ''} |\n"


def _words(hint: Any) -> tuple[str, ...]:
    """The words that an option takes, where there are only some."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((words for inner in get_args(hint) if (words := _words(inner))), ())


def _first_line(text: str) -> str:
    return _prose(text).split("\n\n")[0]


def _prose(text: str) -> str:
    """The help without its console markup; what that dims are examples."""
    return re.sub(r"\[dim\](.*?)\[/dim\]", r"`\1`", text).strip()


if __name__ == "__main__":
    sys.stdout.write(reference())
