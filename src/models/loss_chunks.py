"""How many tokens the loss takes at a time; without torch, so that the planner reads it."""

CHUNK_ELEMENTS = 2**27  # logits at a time: 512 MiB in fp32, 1,024 tokens of DeepSeek-V3's vocabulary
GRAD_CHUNKS = 4  # chunks whose logits' gradients, 1 GiB in bf16, are multiplied with the tokens at once
TILE = 256  # rows that a matrix product is cut into: whole tiles waste nothing


def chunk_tokens(vocab: int) -> int:
    """Tokens whose logits are there at once."""
    chunk = max(1, CHUNK_ELEMENTS // vocab)
    return chunk // TILE * TILE or chunk
