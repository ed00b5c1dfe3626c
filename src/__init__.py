"""Mixture of Lookup Experts (arXiv:2503.15798): train, turn experts into tables, infer from disk."""

import sys

if sys.argv[:1] == ["-m"]:  # of `python -m src.VERB` until the verb runs: its imports take seconds
    from signal import SIGINT

    from src.system.signals import leave_on_stop_signals

    leave_on_stop_signals([SIGINT])
