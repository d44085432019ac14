"""The geometry of a packed row.

Legend: T tokens of the whole row, D its documents, Dr = qk_rope_head_dim.
"""

from typing import NamedTuple

from torch import Tensor


class RowGeometry(NamedTuple):
    """Where the tokens of one packed row stand; but for `documents` the same on every rank of an SP group.

    cu_seqlens: int32 [D+1], the documents' bounds in the whole row, padding as the last one.
    max_seqlen: the longest document.
    cos, sin: fp32 [T, Dr/2], the rotary angles of each token's place in its document.
    documents: fp32 [D, T/SP], one where this rank's token belongs to the document; padding belongs to none.
    lengths: fp32 [D], the documents' tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    cos: Tensor
    sin: Tensor
    documents: Tensor
    lengths: Tensor
