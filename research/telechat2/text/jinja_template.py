"""The renderer of conversations as a Jinja chat template, for tools that read one from a Hugging Face folder.

It gives the text of ``chat.render``, in each prompt format; a test holds them together. A template
makes one string of all: a marker that somebody types is special there, and text here.
"""

import json

from research.telechat2.text.chat import DEFAULT_SYSTEM, TOOLS_HEAD, TOOLS_TAIL

_TEXT = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is mapping or content is not iterable -%}
        {{- raise_exception('a message has a content that is neither a string nor a list of text parts') -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is mapping and part.type in ('text', 'input_text', 'output_text')
                   and part.text is string -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('part ' + (loop.index | string) + ' of a content is no text, '
                                    + 'and a text model reads no others') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""
# As exact_json.loads and dumps do: one line, a blank behind "," and ":", escapes only where JSON needs them.
_COMPACT = """\
{%- macro character(code) -%}
    {%- if code in (34, 92) -%}
        {{- '\\\\' + ('%c' | format(code)) -}}
    {%- elif code >= 32 -%}
        {{- '%c' | format(code) -}}
    {%- elif code in (8, 9, 10, 12, 13) -%}
        {{- '\\\\' + {8: 'b', 9: 't', 10: 'n', 12: 'f', 13: 'r'}[code] -}}
    {%- else -%}
        {{- '\\\\u%04x' | format(code) -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro compact(json) -%}
    {%- set at = namespace(quoted=false, escape='', high=0) -%}
    {%- for c in json -%}
        {%- if not at.quoted -%}
            {%- set at.quoted = c == '"' -%}
            {{- '' if c in ' \\t\\r\\n' else c + ' ' if c in ',:' else c -}}
        {%- elif at.escape == '' -%}
            {%- if at.high and c != '\\\\' -%}
                {{- raise_exception('half of a surrogate pair in the arguments of a tool call') -}}
            {%- elif c == '\\\\' -%}
                {%- set at.escape = c -%}
            {%- else -%}
                {%- set at.quoted = c != '"' -%}
                {{- c -}}
            {%- endif -%}
        {%- elif at.escape == '\\\\' and c != 'u' -%}
            {%- set at.escape = '' -%}
            {{- c if c == '/' else '\\\\' + c -}}
        {%- else -%}
            {%- set at.escape = at.escape + c -%}
            {%- if at.escape | length == 6 -%}
                {%- set code = at.escape[2:] | int(base=16) -%}
                {%- set at.escape = '' -%}
                {%- if 55296 <= code and code < 56320 -%}
                    {%- set at.high = code -%}
                {%- elif at.high -%}
                    {{- character(at.high * 1024 + code - 56613888) -}}
                    {%- set at.high = 0 -%}
                {%- else -%}
                    {{- character(code) -}}
                {%- endif -%}
            {%- endif -%}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
"""
_CHAT = (
    _TEXT
    + _COMPACT
    + """\
{{- '<_system>' + (text(messages[0].content) if messages[0].role == 'system' else DEFAULT) -}}
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
        {{- '<_user>' + text(message.content) -}}
    {%- elif message.role in ('assistant', 'bot') -%}
        {{- '<_bot>' + text(message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- set given = function.arguments -%}
            {{- '' if loop.first else '\\n' -}}
            {{- '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {%- if given is mapping -%}
                {{- given | tojson -}}
            {%- elif given is string and (given | trim)[:1] == '{' -%}
                {{- compact(given) -}}
            {%- else -%}
                {{- raise_exception('the arguments of tool call ' + function.name + ' are no object') -}}
            {%- endif -%}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<_end>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '\\n' if loop.previtem.role == 'tool' else '<_user>' -}}
        {{- '<tool_response>\\n' + text(message.content) + '\\n</tool_response>' -}}
    {%- elif not (loop.first and message.role == 'system') -%}
        {{- raise_exception('a message has role ' + message.role + ', which cannot stand there') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<_bot>' -}}
{%- endif -%}
"""
)
_PLAIN = (
    _TEXT
    + """\
{{- START -}}
{%- if tools -%}
    {{- raise_exception('the plain prompt format has no place for tools') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<_user>' + text(message.content) -}}
    {%- elif message.role in ('assistant', 'bot') and not message.tool_calls -%}
        {{- '<_bot>' + text(message.content or '') + '<_end>' -}}
    {%- elif loop.first and message.role == 'system' and not text(message.content) -%}
    {%- else -%}
        {{- raise_exception('the plain prompt format has no place for '
                            + ('tool calls' if message.tool_calls else 'role ' + message.role)) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<_bot>' -}}
{%- endif -%}
"""
)


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
