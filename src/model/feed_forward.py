"""The two-matrix feed-forward network of every model here: exact (erf) GELU, no gate, no bias."""

from torch import Tensor, nn
from torch.nn import functional as F

from src.model.products import Linear


class FeedForward(nn.Module):
    """Dense's FFN, MoLE's always-on shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Create `up` (F, D) and `down` (D, F)."""
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down(F.gelu(self.up(hidden_states)))
