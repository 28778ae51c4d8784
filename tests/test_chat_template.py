"""Conversations as chat templates want them. The oracle is the template itself, given the form that it is written for.

Which form that is, vLLM reads off the template: parts where it loops over a content, else a text.
"""

from __future__ import annotations

import pytest
from tiny_tokenizers import fast, tokens_of

from engine.server.chat_template import ChatTemplate

TEXT = {  # for contents that are text
    "ChatML": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}",
    "added to": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}",
    "trimmed": "{% for m in messages %}{{ m.role }}:{{ m.content | trim }}{% endfor %}",
    "in capitals": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "quoted": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "roles must alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content + ']' }}{% endfor %}"
    ),
    "system first": (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ s if loop.first }}{{ '/' + m.content }}{% endfor %}"
    ),
}
LOOP = "{% for m in messages %}{{ m.role }}:{% for p in _ %}{{ p.text if p.type == 'text' }};{% endfor %}{% endfor %}"
PARTS = {  # for contents that are lists of parts
    "a loop over parts": LOOP.replace("_", "m['content']"),
    "by attribute": LOOP.replace("_", "m.content"),
    "through a variable": LOOP.replace("{% for p in _ %}", "{% set c = m.content %}{% for p in c %}"),
    "filtered": LOOP.replace("_", "m.content | selectattr('type', 'equalto', 'text')"),
    "the first part": "{% for m in messages %}{{ m.content[0]['text'] }}{% endfor %}",
    "in a macro": (
        "{% macro show(c) %}{% for p in c %}{{ p['text'] }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ m.role }}{{ show(m.content) }}{% endfor %}"
    ),
    "the system's as text": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '!' }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    ),
}
BOTH = {
    "text or parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    ),
}
CALLING = {  # what is written of {"name": "f", "arguments": {"q": 1}}
    "{{ c.function.name }} {{ c.function.arguments | tojson }}": 'f {"q": 1}',
    "{{ c.function.name + c.function.arguments }}": 'f{"q": 1}',
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}": "q=1",
    "{{ c | tojson }}": '{"id": "a1", "type": "function", "function": {"name": "f", "arguments": {"q": 1}}}',
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(fast(tokens_of("byte-level"), chat_template=source))


def each(writes: str) -> str:
    return f"{{% for m in messages %}}{writes}{{% endfor %}}"


def render(source: str, *messages: dict, **how: bool) -> str:
    return template(source).render(messages, {}, **how)


def as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def theirs(source: str, *messages: dict, **options: object) -> str:
    return fast(tokens_of("byte-level"), chat_template=source).apply_chat_template(
        list(messages), tokenize=False, **options
    )


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("given", ["text", "parts"])
@pytest.mark.parametrize("source", TEXT.values(), ids=list(TEXT))
def test_a_template_for_text_gets_text(source, given):
    content = "Hi you" if given == "text" else as_parts("Hi you")
    assert render(source, user(content)) == theirs(source, user("Hi you")) != ""


@pytest.mark.parametrize("given", ["text", "parts"])
@pytest.mark.parametrize("source", PARTS.values(), ids=list(PARTS))
def test_a_template_for_parts_gets_parts(source, given):
    content = "Hi you" if given == "text" else as_parts("Hi you")
    assert "Hi you" in theirs(source, user(as_parts("Hi you")))
    assert render(source, user(content)) == theirs(source, user(as_parts("Hi you")))


def test_each_role_gets_its_own_form():
    source = PARTS["the system's as text"]
    system = {"role": "system", "content": as_parts("Be brief")}
    assert render(source, system, user("Hi")) == "Be brief!Hi"


@pytest.mark.parametrize("content", ["Hi you", as_parts("Hi you"), [*as_parts("Hi "), *as_parts("you")]])
def test_a_template_for_both_gets_what_came(content):
    assert render(BOTH["text or parts"], user(content)) == "Hi you"


def test_parts_become_lines_of_a_text_and_stay_parts_where_they_are_looped_over():
    content = [*as_parts("one"), *as_parts("two")]
    assert render(TEXT["ChatML"], user(content)) == "<|user|>one\ntwo"
    assert render(PARTS["by attribute"], user(content)) == "user:one;two;"


@pytest.mark.parametrize("place", [0, -1])
def test_parts_are_lines_of_one_where_a_template_takes_one_alone(place):
    content = [*as_parts("one"), *as_parts("two")]
    first = f"{{{{ m.content[{place}].text }}}}"
    assert render(each(first), user(content)) == "one\ntwo"
    either = each("{% if m.content is string %}{{ m.content }}{% else %}" + first + "{% endif %}")
    assert render(either, user(content)) == "one\ntwo"


@pytest.mark.parametrize("source", [*TEXT.values(), *PARTS.values(), *BOTH.values()], ids=[*TEXT, *PARTS, *BOTH])
def test_a_conversation_is_what_the_template_makes_of_its_own_form(source):
    said = [("user", "one"), ("assistant", "two"), ("user", "three")]
    form = as_parts if source in PARTS.values() else str
    expected = theirs(source, *({"role": role, "content": form(text)} for role, text in said))
    assert render(source, *({"role": role, "content": text} for role, text in said)) == expected


@pytest.mark.parametrize(("call", "written"), CALLING.items())
@pytest.mark.parametrize("before", ["", "{{ m.content }}", "{{ 'said ' + m.content }}"])
def test_tool_calls_have_their_arguments_in_the_form_that_the_template_takes(call, written, before):
    called = f"{{% for c in m.tool_calls %}}{call}{{% endfor %}}"
    source = each(f"{{% if m.tool_calls %}}{before}{called}{{% else %}}{{{{ m.content }}}}{{% endif %}}")
    calls = [{"id": "a1", "type": "function", "function": {"name": "f", "arguments": {"q": 1}}}]
    prompt = render(source, user("Hi"), {"role": "assistant", "content": "", "tool_calls": calls})
    assert prompt.removeprefix("Hi").removeprefix("said ") == written


def test_a_tools_result_is_written():
    called = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    source = each("{{ m.role }}({{ m.tool_call_id }}):{{ m.content }}" + called)
    calls = [{"id": "a1", "type": "function", "function": {"name": "f", "arguments": {}}}]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    result = {"role": "tool", "content": as_parts("4"), "tool_call_id": "a1"}
    assert render(source, user("2+2"), asked, result) == "user():2+2assistant():f{}tool(a1):4"


USERS_ALONE = each("{% if m.role == 'user' %}{{ m.content }}{% endif %}")
CALLS_ALONE = each("{{ m.content if m.role != 'tool' }}{{ m.tool_calls | tojson if m.tool_calls }}")
LAST_ALONE = "{{ messages[-1].role }}: {{ messages[-1].content }}"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("source", "messages", "why"),
    [
        (USERS_ALONE, [{"role": "system", "content": "Be brief"}, user("Hi")], "leaves out messages of role 'system'"),
        (USERS_ALONE, [user("Hi"), {"role": "tool", "content": "4"}], "leaves out"),
        (USERS_ALONE, [{"role": "developer", "content": "Be brief"}, user("Hi")], "leaves out .* 'developer'"),
        (LAST_ALONE, [user("Hi"), {"role": "assistant", "content": "4"}, user("Hi")], "leaves out .* 'assistant'"),
        (TEXT["ChatML"], [user("Hi"), CALL], "leaves out tool_calls"),
        (CALLS_ALONE, [user("Hi"), CALL, {"role": "tool", "content": "4"}], "leaves out .* 'tool'"),
        (TEXT["roles must alternate"], [user("Hi"), user("Hi")], "refuses these messages: roles must alternate"),
        (TEXT["roles must alternate"], [{"role": "system", "content": "x"}, user("Hi")], "roles must alternate"),
        ("{{ messages[0].content.nothing.at.all }}", [user("Hi")], "refuses these messages: 'str object' has no"),
        ("{% for m in %}", [user("Hi")], "refuses these messages: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", [user("Hi")], "is unsafe"),
        ("{{ messages.append(1) }}", [user("Hi")], "is unsafe|is not safely callable"),
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}{{ messages[0].content }}", [user("Hi")], "Range too big"),
    ],
)
def test_what_a_template_cannot_write_is_refused_with_its_reason(source, messages, why):
    with pytest.raises(ValueError, match=why) as raised:
        render(source, *messages)
    assert "\n" not in str(raised.value)


def test_without_a_template_it_says_what_else_to_use():
    with pytest.raises(ValueError, match="no chat template: use /v1/completions"):
        ChatTemplate(fast(tokens_of("byte-level"))).render([user("Hi")], {})


@pytest.mark.parametrize("source", [TEXT["ChatML"], TEXT["trimmed"], PARTS["the first part"]])
@pytest.mark.parametrize("said", ["The capital is", "The capital is ", ""])
def test_a_final_message_is_continued_where_it_ends(source, said):
    form = as_parts if source in PARTS.values() else str
    source = source.replace("{% endfor %}", "<|end|>{% endfor %}")
    prompt = render(source, user("Hi"), {"role": "assistant", "content": said}, continue_final_message=True)
    messages = [user(form("Hi")), {"role": "assistant", "content": form(said)}]
    assert prompt == theirs(source, *messages, continue_final_message=True)
    assert prompt.rstrip().endswith(said.rstrip()) and prompt.count("<|end|>") == 1


def test_variables_reach_the_template_and_names_of_its_callers_are_reserved():
    source = "{{ messages[0].content }}{% if thinks %}<think>{% endif %}"
    assert template(source).render([user("Hi")], {"thinks": True, "unknown": 1}) == "Hi<think>"
    reserved = {"tokenize", "chat_template", "messages", "conversation", "tools", "add_generation_prompt"}
    assert reserved <= template(source).reserved
