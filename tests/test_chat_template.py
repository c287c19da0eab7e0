"""Chat templates: they see what they are written for, and cannot leave their sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import CHAT, both, byte_level, byte_level_metadata, folder_of

from flashinfer_cli.errors import TokenizerError
from flashinfer_cli.tokenizer import Tokenizer
from flashinfer_cli.tokenizer_folder import TokenizerParts


def with_templates(templates: dict[str, str], **named: str) -> Tokenizer:
    return Tokenizer(TokenizerParts(byte_level(), named_tokens=named, templates=templates))


def render(template: str, messages: Any = CHAT, **extra: Any) -> str:
    return with_templates({"default": template}, bos_token="<s>").apply_chat_template(messages, **extra)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}|{% endfor %}",
            "<s>user:Hi <b>|assistant:Yes?|",
        ),
        ("{% if add_generation_prompt %}>{% endif %}", ">"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks and lstrip_blocks
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>"}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(indent=1) }}", '{\n "b": "é",\n "a": 1\n}'),
        ("{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "Yes?"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'tools' if tools else 'none' }}{{ eos_token }}{{ thinking }}", "none"),
        (
            "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages[0].content.upper() }}",
            "2HI <B>",
        ),
    ],
)
def test_templates_see_what_they_are_written_for(template: str, text: str) -> None:
    assert render(template) == text


def test_variables_reach_the_template() -> None:
    assert render("{{ thinking }}{{ add_generation_prompt }}", add_generation_prompt=False, thinking=3) == "3False"
    named = with_templates({"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "rag"})
    assert named.apply_chat_template(CHAT) == "plain"
    assert named.apply_chat_template(CHAT, tools=[{"name": "f"}]) == "1 tools"
    assert named.apply_chat_template(CHAT, chat_template="rag") == "rag"
    with pytest.raises(TokenizerError, match=r"'other'.*default, rag, tool_use"):
        named.apply_chat_template(CHAT, chat_template="other")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['__builtins__'].open('/etc/passwd').read() }}",
        "{{ self._TemplateReference__context.environment.globals.clear() }}",
        "{{ ''|attr('__class__')|attr('mro')() }}",
        "{{ '{0.__class__.__mro__}'.format(1)[0].x.y }}",
        "{% set x = messages.append(1) %}",
        "{% set x = messages[0].update({'a': 1}) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(TokenizerError, match="chat template failed"):
        render(template)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "failed"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ nothing.at.all }}", "nothing"),
    ],
)
def test_template_errors_are_ours(template: str, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        render(template)


def test_only_plain_values_get_in() -> None:
    with pytest.raises(TokenizerError, match="Path"):
        render("{{ folder.unlink() }}", folder=Path("x"))
    with pytest.raises(TokenizerError, match="role"):
        render("", messages=["hi"])
    with pytest.raises(TokenizerError, match="no chat template"):
        both()[0].apply_chat_template(CHAT)
    assert CHAT[0] == {"role": "user", "content": "Hi <b>"}


def test_chat_ids_have_one_bos() -> None:
    metadata = byte_level_metadata(add_bos_token=True)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    ids = Tokenizer.from_gguf(metadata).encode_chat(CHAT)
    assert ids == [1, *byte_level().encode("Hi <b>").ids, 2]


def test_template_files_win_over_the_config(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "old"}, {"name": "rag", "template": "rag"}]
    folder = folder_of(byte_level(), tmp_path, chat_template=listed)
    assert Tokenizer.from_folder(folder).apply_chat_template(CHAT) == "old"
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(CHAT) == "new"
    assert tokenizer.apply_chat_template(CHAT, chat_template="rag") == "rag"
    assert tokenizer.apply_chat_template(CHAT, tools=[{}]) == "tools"
    assert Tokenizer.from_folder(folder_of(byte_level(), tmp_path / "b", chat_template="{{ 1 }}")).has_chat_template
