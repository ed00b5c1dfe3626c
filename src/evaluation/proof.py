"""The checks of `verify`: weights and table are what their files claim, and both forms give the same answers.

Everything is computed in float32. Without a training form, the checks that need one are listed as not done.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from src.evaluation.equivalence import (
    PrecisionCost,
    compare_greedy,
    logit_distance,
    permuted_rows,
    precision_costs,
    zeroed_rows,
)
from src.evaluation.held_out import HeldOut
from src.evaluation.perplexity import RowsOf
from src.inference import InferenceModel, load_model
from src.lut.codecs import CODECS
from src.lut.manifest import read_manifest
from src.lut.readers import READERS
from src.lut.store import LutStore
from src.lut.verification import verify_table
from src.run_directory import RunDirectory, hash_weights, identify, read_tensors
from src.system.console import Progress

LOGIT_LIMIT = 5e-5
"""Largest difference of logits between training form and float32 table: rounding of matrix products of other shapes."""
COMPARED_TOKENS = 4096
GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_NEW_TOKENS = 32, 32, 64


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was compared, and the result."""

    name: str
    found: str
    expected: str
    holds: bool | None
    """None where there is no limit, or the run lacks what the check needs."""
    values: dict[str, Any]
    cost: PrecisionCost | None = None
    """What a precision costs, in the checks of precisions."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "cost"}


def prove(run: RunDirectory, text: HeldOut, *, lut: str, progress: Progress, device: str = "cpu") -> Iterator[Check]:
    """Check a run and its table called `lut`, and yield each check when it is done; models compute on `device`.

    Raises:
        UserError: there is no table, or it cannot be opened at all.
    """
    sound = check_table(run, lut, progress)
    yield sound
    if not sound.holds:
        return
    yield check_identity(run, lut)
    load = partial(load_model, run, device=device, dtype=torch.float32)
    reference = load(experts="ffn") if run.experts_path.is_file() else None
    with load(experts="lut", lut=lut, reader="memmap") as lookup:
        if run.plug_in() is not None:
            yield from check_base(run, lut, lookup, text)
        if reference is None:
            yield _absent("training form against table", "the run holds no training form")
        for reader in READERS:
            yield check_reader(run, text, lut, reader, reference or lookup, progress)
        if reference is not None:
            yield check_greedy(reference, lookup, text)
        yield from check_losses(reference, lookup, text, progress, is_plug_in=run.plug_in() is not None)
        exact = reference or (lookup if _table_precision(lookup) == "float32" else None)
        if exact is None:
            yield _absent("other precisions", "there are no float32 rows to compare with")
        else:
            yield from check_precisions(exact, text, progress)


def check_identity(run: RunDirectory, lut: str) -> Check:
    """Compare the hashes of the weights with those in their files' metadata and in the manifest."""
    manifest, claimed = read_manifest(run.lut_path(lut)), run.identity()
    backbone = run.backbone_weights()
    experts = read_tensors(run.experts_path) if run.experts_path.is_file() else None
    found = identify(backbone, experts) if experts is not None else None
    hashed = hash_weights(backbone.items())
    holds = claimed.backbone == hashed == manifest.backbone
    if found is not None:
        holds = holds and found.training_form == claimed.training_form == manifest.training_form
    parts = "backbone and experts" if experts is not None else "backbone"
    return Check(
        name="weights are those of the table",
        found=f"{parts} {(found.training_form if found else hashed)[:12]}",
        expected=f"manifest {((manifest.training_form if found else manifest.backbone) or 'none')[:12]}",
        holds=holds,
        values={"backbone": hashed, "training_form": found.training_form if found else None},
    )


@torch.no_grad()
def check_base(run: RunDirectory, lut: str, lookup: InferenceModel, text: HeldOut) -> Iterator[Check]:
    """Compare the weights of a plug-in's base in use with those of its file, and what the model is without it."""
    base = run.base()
    assert base is not None
    stored, used = read_tensors(base.backbone_path), dict(lookup.state_dict())
    same = [name for name, weight in stored.items() if torch.equal(used[name], weight.to(used[name]))]
    yield Check(
        name="weights of the base in use",
        found=f"{len(same)} of {len(stored)} tensors are those of {base.backbone_path}",
        expected="all, value for value",
        holds=len(same) == len(stored),
        values={"same": len(same), "tensors": len(stored), "base": str(base.path)},
    )
    windows, device = _compared(text), lookup.embedding.weight.device
    with load_model(base, device=device, dtype=torch.float32) as model:
        expected = model(windows[:1])
        model.attach(run, experts="lut", lut=lut)
        attached = model(windows[:1])
        model.detach()
        found = model(windows[:1])
    yield Check(
        name="detached again",
        found=f"max |diff| {(found - expected).abs().max():.1e} to the base alone",
        expected=f"0 (attached: {(attached - expected).abs().max():.1e})",
        holds=torch.equal(found, expected),
        values={
            "detached": float((found - expected).abs().max()),
            "attached": float((attached - expected).abs().max()),
        },
    )


def check_table(run: RunDirectory, lut: str, progress: Progress) -> Check:
    """Read every byte of the table, and count what does not match its manifest."""
    lut_dir = run.lut_path(lut)
    rows = read_manifest(lut_dir).layout.num_rows
    with progress("reading every row", rows) as advance:
        problems = verify_table(lut_dir, advance)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(
        name="table is what was written",
        found=f"{problems[0]}{more}" if problems else f"{rows:,} rows match their checksums",
        expected="every file, header and row as the manifest says",
        holds=not problems,
        values={"rows": rows, "problems": problems},
    )


def check_reader(
    run: RunDirectory, text: HeldOut, lut: str, reader: str, reference: InferenceModel, progress: Progress
) -> Check:
    """Compare logits of the reference with those through one reader."""
    windows = _compared(text)
    precision = read_manifest(run.lut_path(lut)).layout.precision
    with (
        load_model(
            run,
            experts="lut",
            lut=lut,
            device=reference.embedding.weight.device,
            dtype=torch.float32,
            reader=reader,
        ) as other,
        progress(f"comparing logits ({reader})", len(windows)) as advance,
    ):
        distance = logit_distance(reference, other, windows, progress=advance, mask=text.mask)
    exact = precision == "float32" or _table_precision(reference) is not None
    return Check(
        name=f"logits through {reader}",
        found=f"max |diff| {distance.max_abs:.1e}, same choice {distance.top1_agreement:.2%}",
        expected=f"<= {LOGIT_LIMIT:.0e} on {distance.tokens:,} tokens" if exact else f"{precision}: no limit",
        holds=distance.max_abs <= LOGIT_LIMIT if exact else None,
        values={"reader": reader, **asdict(distance)},
    )


def check_greedy(reference: InferenceModel, lookup: InferenceModel, text: HeldOut) -> Check:
    """Compare greedy continuations; they may differ only after two nearly equal logits."""
    room = reference.config.max_sequence_length
    prompt_tokens = max(1, min(GREEDY_PROMPT_TOKENS, text.windows.shape[1] - 1, room // 2))
    new_tokens = min(GREEDY_NEW_TOKENS, room - prompt_tokens)
    prompts = text.windows[:GREEDY_PROMPTS, :prompt_tokens]
    result = compare_greedy(reference, lookup, prompts, new_tokens=new_tokens)
    exact = _table_precision(lookup) == "float32"
    parted = f", {result.near_ties} part at a near-tie (gap <= {result.widest_gap:.1e})" if result.near_ties else ""
    return Check(
        name=f"greedy text, {result.prompts} prompts x {new_tokens} tokens",
        found=f"{result.identical} identical{parted}",
        expected="identical up to near-ties" if exact else "no limit",
        holds=result.holds if exact else None,
        values={**asdict(result), "holds": result.holds},
    )


def check_losses(
    reference: InferenceModel | None, lookup: InferenceModel, text: HeldOut, progress: Progress, *, is_plug_in: bool
) -> Iterator[Check]:
    """Compare the table's held-out loss with the training form's, and with that of rows made wrong on purpose.

    Of a plug-in, most may be learned by routers and what rows have in common, so its rows may be worth little.
    """

    def loss(name: str, model: InferenceModel, rows_of: RowsOf | None = None) -> float:
        with progress(f"scoring: {name}", len(text.windows)) as advance:
            return text.score(model, progress=advance, rows_of=rows_of).loss

    table, precision = loss("table", lookup), _table_precision(lookup) or ""
    if reference is not None:
        computed, limit = loss("training form", reference), CODECS[precision].loss_limit
        yield Check(
            name=f"held-out loss, {precision} table",
            found=f"{table:.5f} against {computed:.5f} computed ({table - computed:+.1e})",
            expected=f"within {limit:.0e}",
            holds=abs(table - computed) <= limit,
            values={"table": table, "training_form": computed, "difference": table - computed},
        )
    for name, altered in (
        ("rows replaced by zeros", zeroed_rows(lookup)),
        ("rows permuted over ids", permuted_rows(lookup)),
    ):
        control = loss(name, lookup, altered)
        yield Check(
            name=f"control: {name}",
            found=f"loss {control:.4f} ({control - table:+.3f} nats)",
            expected="no limit: how much a plug-in learned" if is_plug_in else "worse: the table matters",
            holds=None if is_plug_in else control > table,
            values={"loss": control, "rise": control - table},
        )


def check_precisions(exact: InferenceModel, text: HeldOut, progress: Progress) -> Iterator[Check]:
    """Compare float32 rows with the same rows in every precision, encoded and decoded as a table stores them."""
    for cost in precision_costs(exact, text, _compared(text), progress):
        limit = CODECS[cost.precision].loss_limit
        yield Check(
            name=f"rows as {cost.precision}, {cost.bytes_per_token:,} bytes a token",
            found=f"loss {cost.rise:+.1e}, logits max {cost.logits.max_abs:.1e} mean {cost.logits.mean_abs:.1e}, "
            f"same choice {cost.logits.top1_agreement:.2%}",
            expected=f"loss within {limit:.1e}",
            holds=abs(cost.rise) <= limit,
            values=asdict(cost),
            cost=cost,
        )


def _compared(text: HeldOut) -> Tensor:
    windows = text.windows[:, :-1]
    return windows[: max(1, COMPARED_TOKENS // windows.shape[1])]


def _table_precision(model: InferenceModel) -> str | None:
    """Return the precision of the rows that a lookup form reads; None of a training form."""
    store = getattr(model.experts, "store", None)
    return store.layout.precision if isinstance(store, LutStore) else None


def _absent(name: str, reason: str) -> Check:
    return Check(name=name, found=reason, expected="", holds=None, values={})
