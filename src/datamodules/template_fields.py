"""What a chat template makes of fields that only some templates know: tools beside the messages, a message's own.

Its text does not tell (`name` is a function's too), so something that nobody writes is put there and looked for.
"""

from collections.abc import Callable
from typing import Any

_PROBE = "field_probe_4d1e"
_FUNCTION = {"name": _PROBE, "description": _PROBE, "parameters": {"type": "object", "properties": {}}}
_CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
_USER = {"role": "user", "content": "?"}
_BEFORE: dict[str, list[dict[str, Any]]] = {
    "assistant": [_USER],
    "tool": [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}],
}

# apply(messages, add_generation_prompt, tools) -> the prompt; raises ValueError where the template refuses
Apply = Callable[[list[dict[str, Any]], bool, list[Any] | None], str]


def declares_tools(apply: Apply, system: bool) -> bool:
    """Whether tools reach the prompt of a conversation that begins with a system message, or of one that does not."""
    messages = [{"role": "system", "content": "?"}, _USER] if system else [_USER]
    return _PROBE in (_applied(apply, messages, [{"type": "function", "function": _FUNCTION}]) or "")


def reads_field(apply: Apply, role: str, field: str) -> bool:
    """Whether a field of this name, on a message of this role, changes the prompt; or makes the template raise."""
    *before, message = [*_BEFORE.get(role, []), {"role": role, "content": "?"}]
    after = [_USER] if role == "system" else []
    with_field, without = (
        _applied(apply, [*before, {**message, **more}, *after], None) for more in ({field: _PROBE}, {})
    )
    return with_field != without


def _applied(apply: Apply, messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
    try:
        return apply(messages, False, tools)
    except ValueError:
        return None
