"""The renderer of conversations as a Jinja chat template, for tools that read one from a Hugging Face folder.

It says what ``telechat_chat.render`` does, in each prompt format; a test holds them together. TeleChat v1's
format is the plain one without ``<_start>``. A template makes one string of all: a marker that somebody types
is special there, and text here; and it cannot parse arguments of a tool call that are a JSON string, as
``render`` does, so it refuses them.
"""

import json

from research.telechat2.telechat_chat import DEFAULT_SYSTEM, TOOLS_HEAD, TOOLS_TAIL

_CHAT = """\
{%- set system = messages[0].content if messages[0].role == 'system' else DEFAULT -%}
{{- '<_system>' + system -}}
{%- if tools -%}
    {{- HEAD -}}
    {%- for tool in tools -%}
        {{- (tool | tojson) + '\\n' -}}
    {%- endfor -%}
    {{- TAIL -}}
{%- endif -%}
{{- '\\n' -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<_user>' + message.content -}}
    {%- elif message.role in ('assistant', 'bot') -%}
        {{- '<_bot>' + (message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- set given = function.arguments -%}
            {{- '' if loop.first else '\\n' -}}
            {{- '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {%- if given is string -%}
                {{- raise_exception('the arguments of tool call ' + function.name + ' are a string; '
                                    + 'expected the object that it holds: parse it with json.loads') -}}
            {%- endif -%}
            {{- (given | tojson) + '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<_end>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '\\n' if loop.previtem.role == 'tool' else '<_user>' -}}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- elif not (loop.first and message.role == 'system') -%}
        {{- raise_exception('a message has role ' + message.role + ', which cannot stand there') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<_bot>' -}}
{%- endif -%}
"""
_PLAIN = """\
{{- START -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<_user>' + message.content -}}
    {%- elif message.role in ('assistant', 'bot') -%}
        {{- '<_bot>' + message.content + '<_end>' -}}
    {%- else -%}
        {{- raise_exception('the plain prompt format has no place for role ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<_bot>' -}}
{%- endif -%}
"""


def chat_template(prompt_format: str) -> str:
    """The Jinja text of a prompt format: chat, plain, or v1."""
    if prompt_format == "chat":
        words = {"DEFAULT": DEFAULT_SYSTEM, "HEAD": TOOLS_HEAD, "TAIL": TOOLS_TAIL}
        text = _CHAT
    else:
        words = {"START": "<_start>" if prompt_format == "plain" else ""}
        text = _PLAIN
    for name, value in words.items():
        text = text.replace(name, json.dumps(value, ensure_ascii=False))
    return text
