"""Which positions of a packed window belong to the same document. Knows nothing of models.

B batch, T tokens.
"""

from torch import Tensor


def segment_ids(token_ids: Tensor, separator_id: int) -> Tensor:
    """Return, for windows (B, T), which document each position belongs to (B, T) int64, counted from 0 per window.

    A separator belongs to the document that it ends.
    """
    ends = (token_ids == separator_id).long()
    return ends.cumsum(dim=-1) - ends


def document_mask(token_ids: Tensor, separator_id: int) -> Tensor:
    """Return booleans (B, T, T): True where the first position may attend to the second, being of one document.

    It is symmetric: combine it with a causal mask. Rotary positions need no reset, for only their differences count.
    """
    segments = segment_ids(token_ids, separator_id)
    return segments.unsqueeze(-1) == segments.unsqueeze(-2)
