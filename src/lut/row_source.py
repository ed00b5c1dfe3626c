"""What a table builder asks of whatever gives it rows.

E experts, D hidden.
"""

from typing import Protocol

from torch import Tensor


class TableSizes(Protocol):
    """The sizes that a table takes over from its source."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def num_layers(self) -> int:
        """L."""
        ...

    @property
    def num_experts(self) -> int:
        """E."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...


class TableIdentity(Protocol):
    """The weights that rows stand for; None where they are not known."""

    @property
    def backbone(self) -> str | None:
        """SHA-256 of the backbone."""
        ...

    @property
    def training_form(self) -> str | None:
        """SHA-256 of backbone and experts."""
        ...


class RowSource(Protocol):
    """Gives expert rows. A builder asks for the layers of a run of ids in order, then for the next run of ids."""

    @property
    def config(self) -> TableSizes:
        """The table's sizes."""
        ...

    @property
    def identity(self) -> TableIdentity:
        """The weights that the rows stand for."""
        ...

    @property
    def rows_from(self) -> str:
        """What makes the rows, in words, for the manifest; an interrupted build goes on with the same alone."""
        ...

    @property
    def held_row_bytes(self) -> int:
        """Bytes that the source keeps in memory for each id of the run that was asked for last."""
        ...

    def layer_rows(self, layer: int, first_token: int, num_tokens: int) -> Tensor:
        """Return the rows (num_tokens, E, D) float32 of consecutive ids."""
        ...
