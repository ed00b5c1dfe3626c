"""Prints an `Account` on the terminal."""

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from src.accounting.account import Account
from src.accounting.flops import Flops
from src.system.console import text_table

_OFFLOADED = {"mole": "the lookup table", "moe": "the experts", "dense": "nothing"}


def print_account(account: Account, console: Console) -> None:
    """Print parameters, offloaded part, FLOPs and memory, with their assumptions."""
    console.print(_parameters(account))
    if account.offload:
        console.print(_offload(account))
    console.print(_flops(account))
    console.print(_assumptions(account), style="dim", highlight=False)
    console.print(_memory(account))
    if account.expert_memory:
        console.print(_expert_memory(account))
    console.print("Other activations come on top.", style="dim")


def _parameters(account: Account) -> Table:
    count = account.parameters
    worst = " (worst case)" if account.architecture == "moe" else ""
    most = " (at most)" if account.expert_ids == "seen" else ""
    rows = {
        "trained": count.trained,
        "  of them routed experts and their norms": count.experts,
        **({"frozen": count.frozen} if count.frozen else {}),
        "resident at inference, experts offloaded": count.resident,
        f"offloaded: {_OFFLOADED[account.architecture]}{most}": count.offloaded,
        f"loaded per token{worst}": count.loaded_per_token,
    }
    table = text_table("", f"{account.architecture}: parameters", "values", "in 16 bit")
    for name, values in rows.items():
        table.add_row(name, _count(values), _bytes(2 * values))
    return table


def _offload(account: Account) -> Table:
    size = "size" if account.expert_ids == "all" else "size (at most)"
    table = text_table("", f"{_OFFLOADED[account.architecture]}, by precision", size, "read per token")
    for row in account.offload:
        table.add_row(row.precision, _bytes(row.total_bytes), _bytes(row.bytes_per_token))
    for reason in account.skipped_precisions.values():
        table.add_row(reason, "-", "-")
    return table


def _flops(account: Account) -> Table:
    columns = {"training, per token": account.training_per_token}
    if account.training_unique is not None:
        columns["per unique id"] = account.training_unique
    columns["inference"] = account.inference
    table = text_table("", "FLOPs per token", *columns)
    for item in fields(Flops):
        values = [getattr(flops, item.name) for flops in columns.values()]
        if any(values):
            table.add_row(item.name.replace("_", " "), *(_count(value) for value in values))
    table.add_section()
    table.add_row("total", *(_count(flops.total) for flops in columns.values()), style="bold")
    return table


def _assumptions(account: Account) -> str:
    windows = account.micro_batch_tokens // account.sequence_length
    lines = [
        f"Micro-batches of a device per optimizer step: {account.micro_batches:,}, each of {windows:,} windows of "
        f"{account.sequence_length:,} tokens.",
        f"Two per multiply-add; attention over the mean causal context of {account.sequence_length:,} tokens; "
        "training is forward and twice that backward.",
    ]
    if account.training_unique is not None:
        ratio = account.micro_batch_tokens / account.unique_ids
        origin = "an estimate; --unique-ids N states it" if account.unique_ids_estimated else "as stated"
        lines += [
            f"Per token: experts at every position. Per unique id: once for each of the {account.unique_ids:,} "
            f"distinct ids among a micro-batch's {account.micro_batch_tokens:,} tokens, {ratio:.1f}x fewer ({origin}).",
            f"This config trains in the form model.expert_execution={account.expert_execution}; "
            "inference reads the table.",
        ]
    return "\n".join(lines)


def _memory(account: Account) -> Table:
    kinds = [
        "alone or DDP" if memory.strategy == "whole" else f"FSDP2 over {memory.devices}" for memory in account.memory
    ]
    table = text_table("", "training memory per device", *kinds)
    for name, label in (
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimizer_states", "AdamW's two moments"),
        ("gathered", "gathered for a while, at most"),
    ):
        table.add_row(label, *(_bytes(size) if (size := getattr(memory, name)) else "-" for memory in account.memory))
    table.add_section()
    table.add_row("total", *(_bytes(memory.total) for memory in account.memory), style="bold")
    return table


def _expert_memory(account: Account) -> Table:
    table = text_table("", "experts' activations, by execution", "ids at once", "size")
    for memory in account.expert_memory:
        name = memory.execution
        if name == "unique_per_step":
            name += f" (of {account.micro_batches} micro-batches)"
        table.add_row(name, f"{memory.token_ids:,}", _bytes(memory.kept_bytes))
    return table


def _count(value: float) -> str:
    """Return a number with four digits and a decimal prefix, such as 389.1 M."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g}"


def _bytes(value: float) -> str:
    """Return bytes with a binary prefix, such as 72.00 KiB."""
    for prefix, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if value >= 1024**power:
            return f"{value / 1024**power:.2f} {prefix}"
    return f"{value:.0f} B"
