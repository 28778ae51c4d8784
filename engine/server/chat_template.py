"""A model's chat template, and the form in which it takes messages. No template says so: each form is tried.

A template is a program of the model's author. It runs in the sandbox that transformers gives it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import product
from typing import Any, NamedTuple

from traces.errors import reason

Message = dict[str, Any]
Content = str | list[Message]
MARK = "8061732954"  # found again in a prompt, whatever a template does with letters and spaces
_PRINTED = re.compile(rf"""'\w+': '{MARK}|"text": ?"{MARK}""")  # an object that was printed where its text was meant
_CALL_ID = "a1b2c3d4e"  # as long as Mistral's templates want it
_KNOWN_ROLES = 64
_LONGEST_ERROR = 1000


class _ContentForm(NamedTuple):
    """The forms in which a template takes a role's content: a text, and a list of parts. If neither, a list of one."""

    as_text: bool
    as_parts: bool

    def write(self, content: Content) -> Content:
        """The content as it came if the template takes that; else parts become lines of a text, as in vLLM."""
        if isinstance(content, list):
            if self.as_parts:
                return content
            content = "\n".join(part["text"] for part in content)
        return content if self.as_text else _parts(content)


class _CallForm(NamedTuple):
    """The form in which a template takes tool calls: arguments as an object or as JSON, beside "" or no content."""

    parsed: bool
    empty_content: bool

    def write(self, message: Message) -> Message:
        """A message with calls, whose arguments are objects, in this form."""
        calls = [call | {"function": self._function(call["function"])} for call in message["tool_calls"]]
        without = {} if message["content"] or self.empty_content else {"content": None}  # transformers leaves it out
        return message | {"tool_calls": calls} | without

    def _function(self, function: Message) -> Message:
        arguments = function["arguments"]
        return function | {"arguments": arguments if self.parsed else json.dumps(arguments, ensure_ascii=False)}


class ChatTemplate:
    """Writes conversations as the model was taught to read them.

    Attributes:
        reserved: names that are no variables of a template's own.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a transformers tokenizer."""
        self._tokenizer = tokenizer
        self.reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages", "self"}
        self._content_form = lru_cache(_KNOWN_ROLES)(self._find_content_form)
        self._call_form = cache(self._find_call_form)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any], **how: bool) -> str:
        """The prompt for a conversation.

        Args:
            messages: with `role`, `content` (a text or text parts), and more as the template knows it.
            variables: the template's own, none of them in `reserved`.
            how: `add_generation_prompt`, `continue_final_message`.

        Raises:
            ValueError: there is no template, it fails, or it leaves a message out.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template: use /v1/completions")
        written = [self._write(message) for message in messages]
        try:
            return self._apply(written, **how, **variables)
        except Exception as error:  # a program fails as programs do
            raise ValueError(f"the chat template refuses these messages: {reason(error)[:_LONGEST_ERROR]}") from None

    def _apply(self, messages: list[Message], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _write(self, message: Message) -> Message:
        message = self._call_form().write(message) if message.get("tool_calls") else message
        return self._with_content(message)

    def _with_content(self, message: Message) -> Message:
        form, content = self._content_form(message["role"]), message["content"]
        return message if content is None else message | {"content": form.write(content)}

    def _find_content_form(self, role: str) -> _ContentForm:
        text, part, parts = (
            self._try(self._around(role, content)) for content in (MARK, _parts(MARK), _parts(MARK) * 2)
        )
        as_text = text is not None and MARK in text
        if as_text or _shows(part):
            whole = parts is not None and part is not None and parts.count(MARK) == 2 * part.count(MARK)
            return _ContentForm(as_text, _shows(part) and whole)
        if text is not None and part is not None:
            raise ValueError(f"the chat template leaves out messages of role {role!r}")
        return _ContentForm(text is None, as_parts=False)  # it fails on them, and will say why

    def _find_call_form(self) -> _CallForm:
        forms = [_CallForm(*each) for each in product((True, False), repeat=2)]
        prompts = [self._try([self._around_user(), self._calling(form, MARK)]) for form in forms]
        shown = [form for form, prompt in zip(forms, prompts, strict=True) if _shows(prompt)]
        if not shown and None not in prompts:
            raise ValueError("the chat template leaves out tool_calls")
        return (shown or forms)[0]

    def _try(self, messages: list[Message]) -> str | None:
        """The prompt, or None if the template fails."""
        try:
            return self._apply(messages)
        except Exception:
            return None

    def _around(self, role: str, content: Content) -> list[Message]:
        """A conversation with a message of a role, as templates insist that it be."""
        message = {"role": role, "content": content}
        if role == "user":
            return [message]
        user = self._around_user()
        if role == "assistant":
            return [user, message, user]
        if role == "tool":
            return [user, self._calling(self._call_form(), "hi"), message | {"tool_call_id": _CALL_ID, "name": "f"}]
        return [message, user]

    def _around_user(self) -> Message:
        return {"role": "user", "content": self._content_form("user").write("hi")}

    def _calling(self, form: _CallForm, said: str) -> Message:
        call = {"id": _CALL_ID, "type": "function", "function": {"name": "f", "arguments": {"q": said}}}
        return self._with_content(form.write({"role": "assistant", "content": "", "tool_calls": [call]}))


def _parts(text: str) -> list[Message]:
    return [{"type": "text", "text": text}]


def _shows(prompt: str | None) -> bool:
    return prompt is not None and MARK in prompt and not _PRINTED.search(prompt)
