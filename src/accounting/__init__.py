"""What a run costs, from its config alone: parameters, table, FLOPs and memory, without allocating any of it."""

from src.accounting.account import Account, account
from src.accounting.tables import print_account

__all__ = ["Account", "account", "print_account"]
