"""The two-matrix feed-forward network of every model here: exact (erf) GELU, no gate, no bias."""

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Dense's FFN, MoLE's always-on shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Create `up` (F, D) and `down` (D, F)."""
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down(F.gelu(self.up(hidden_states)))
