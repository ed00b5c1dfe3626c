"""Ends training after a time, over all its resumptions."""

from typing import Any

from lightning.pytorch.callbacks import Timer

from src.errors import RunError


class TimeLimit(Timer):
    """Lightning's timer, which would let a resumed run with no time left end at once without a word."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the time that was used; RunError when that is all there was."""
        super().load_state_dict(state_dict)
        left = self.time_remaining()
        if left is not None and left <= 0:
            raise RunError(
                f"trainer.max_time: all of it was used before ({self.time_elapsed():,.0f} s); resume with a "
                "longer one, or with trainer.max_time=null"
            )
