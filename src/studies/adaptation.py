"""The sections of a study's page about models that were trained on from another: gains, forgetting, many domains."""

import math

from src.studies.markdown import line, megabytes, number, signed, table
from src.studies.summary import ArmRows, Summary

_ABOUT_GENERAL = """

Nats per token, with standard errors over seeds. General text is held-out text of the kind that the base was trained on:
what the loss rises there is what training on the domain makes the model forget."""
_ABOUT_DOMAINS = """

In 16 bit, by arithmetic. Ten domains at a time: a plug-in keeps its routers in memory and its table on disk, LoRA keeps
its matrices apart from the base (one domain alone is merged), and full fine-tuning keeps ten models."""


def shares(summary: Summary) -> str:
    """Say in a sentence which share of the gain of one arm each of the others has; empty where none is asked for."""
    study = summary.study
    if study.share_of is None or (whole := summary.gain(study.share_of)) is None:
        return ""
    found = {name: summary.share(name) for name in summary.arms if name not in (study.baseline, study.share_of)}
    parts = [
        f"{study.arms[name].label} {100 * share:.0f}{f' ± {100 * error:.0f}' if math.isfinite(error) else ''} %"
        for name, (share, error) in found.items()
        if math.isfinite(share)
    ]
    baseline, best = study.arms[study.baseline].label, study.arms[study.share_of].label
    gain = signed(whole.mean, whole.stderr).removeprefix("+")
    return f"{best} gains {gain} nats per token over {baseline.lower()}. Of that gain: {'; '.join(parts)}.\n\n"


def forgotten(summary: Summary) -> str:
    """Return the table of gains on the domain and losses on general text."""
    study = summary.study
    lines = table("", "held-out loss", "gain", "general loss", f"above {study.arms[study.baseline].label.lower()}")
    for name, arm in summary.arms.items():
        gain, above = summary.gain(name), summary.compare(name, study.baseline, on_general=True).over_seeds
        changes = [
            "" if found is None or name == study.baseline else signed(found.mean, found.stderr)
            for found in (gain, above)
        ]
        lines.append(
            line(
                arm.arm.label,
                number(arm.mean(lambda row: row.held_out_loss)),
                changes[0],
                number(arm.mean(lambda row: row.general_loss)),
                changes[1],
            )
        )
    return "\n".join(lines) + _ABOUT_GENERAL


def domains(summary: Summary) -> str:
    """Return the table of what one and ten domains take in memory and on disk."""
    base = summary.arms[summary.study.baseline].rows[0].resident_parameters
    lines = table("", "in memory, one domain", "in memory, ten domains", "on disk, a domain", "read per token")
    for arm in summary.arms.values():
        one, ten, stored = _parameters(arm, base)
        read = f"{arm.rows[0].bytes_per_token:,} B" if arm.rows[0].bytes_per_token else "0"
        lines.append(line(arm.arm.label, megabytes(one), megabytes(ten), megabytes(stored) if stored else "", read))
    return "\n".join(lines) + _ABOUT_DOMAINS


def _parameters(arm: ArmRows, base: int) -> tuple[int, int, int]:
    """Return the parameters in memory of one and of ten domains, and those that each domain stores."""
    row = arm.rows[0]
    if not arm.arm.is_trained:
        return base, base, 0
    if row.offloaded_parameters:
        return row.resident_parameters, base + 10 * (row.resident_parameters - base), row.offloaded_parameters
    if arm.arm.lora_rank is not None:
        return base, base + 10 * row.trained_parameters, row.trained_parameters
    return row.resident_parameters, 10 * row.resident_parameters, row.resident_parameters
