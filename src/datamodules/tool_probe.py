"""What the chat template does with tools that are given beside the messages."""

from transformers import PreTrainedTokenizerFast

_NAME = "tool_probe_4d1e"


def declares_tools(tokenizer: PreTrainedTokenizerFast, system: bool) -> bool:
    """Whether the template writes tools into the prompt of a conversation with or without a system message: one that
    nobody has is looked for there."""
    function = {"name": _NAME, "description": _NAME, "parameters": {"type": "object", "properties": {}}}
    roles = ("system", "user") if system else ("user",)
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": role, "content": "?"} for role in roles],
            tools=[{"type": "function", "function": function}],
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception:  # a template raises whatever Python does; one that cannot take tools declares none
        return False
    return _NAME in str(prompt)
