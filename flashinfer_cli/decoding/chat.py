"""A conversation with a model: turns rendered by its chat template, keys and values kept as far as the text agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..config import SamplingParams
from ..errors import ContextError, TokenizerError
from ..tokenizer import Tokenizer
from .generate import Session, TokenEvent

GoOn = Callable[..., Iterator[TokenEvent]]  # (session, ids, sampling, progress=) -> events


class ChatSession:
    """Messages so far and the session that has read them. Raises TokenizerError where the model has no chat
    template."""

    def __init__(self, tokenizer: Tokenizer, session: Session, go_on: GoOn, system: str | None = None) -> None:
        if not tokenizer.has_chat_template:
            raise TokenizerError(
                "This model has no chat template, so it cannot chat.", "Use generate: it continues a text."
            )
        self.tokenizer = tokenizer
        self.session = session
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._go_on = go_on
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but not the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def send(self, message: str, sampling: SamplingParams | None = None, **options: Any) -> Iterator[TokenEvent]:
        """Say something; yields the answer's tokens. What was said so far stays, even if the answer is stopped.

        Raises ContextError, and forgets the message, when the conversation has outgrown the context.
        """
        turn = [*self.messages, {"role": "user", "content": message}]
        ids = self.tokenizer.encode_chat(turn)
        if len(ids) >= self.session.kv.capacity:
            raise ContextError(
                f"The conversation of {len(ids)} tokens is longer than the context of {self.session.kv.capacity}.",
                "Start anew, or give a larger --context.",
            )
        self.messages = turn
        same = 0
        while same < min(len(ids) - 1, len(self.session.ids)) and ids[same] == self.session.ids[same]:
            same += 1
        self.session.trim(same)
        answer = ""
        try:
            for event in self._go_on(self.session, ids[same:], sampling, **options):
                answer += event.text
                yield event
        finally:
            self.messages.append({"role": "assistant", "content": answer})
