"""`python -m src.inspect_lut`: what a run's table holds for one token: rows, nearest tokens, routers' weights."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from tokenizers import Tokenizer

from src.cli import add_device_option, add_run_options, find_run, number, output_file, parser, require_text, run_verb
from src.config import load_run_config
from src.data.text_rule import TextRule
from src.data.tokenizer import load_run_rule
from src.errors import UserError, caused_by
from src.evaluation.held_out import held_out_of_run
from src.evaluation.routing_view import TokenWeights, measure_token_weights, windows_with
from src.inference import load_model
from src.lut import read_manifest
from src.lut.scan import read_row_ids
from src.lut.verification import Neighborhood, find_neighbors
from src.run_directory import RunDirectory
from src.system.console import print_note, progress_bar, text_table
from src.system.files import write_json

MAX_WINDOWS = 64
"""Held-out windows that are routed at most."""


def single_token(text: str, rule: TextRule) -> int:
    """Return the id of a text that is one token; UserError shows the pieces of any other."""
    tokenizer = rule.tokenizer
    named = tokenizer.token_to_id(text)
    if named is not None and (text in rule.reserved or named in tokenizer.get_added_tokens_decoder()):
        return named
    ids = rule.encode(text)
    if len(ids) != 1:
        pieces = ", ".join(f"{token_text(token_id, tokenizer)} (id {token_id})" for token_id in ids)
        raise UserError(
            f"--token {text!r}: is {len(ids)} tokens, expected one; its pieces are {pieces or 'none'}; "
            "give one of them, and mind the space that most words begin with"
        )
    return ids[0]


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """Quote a token, so that spaces and line ends show."""
    if tokenizer.id_to_token(token_id) is None:
        return "(unused)"
    return repr(tokenizer.decode([token_id], skip_special_tokens=False))


def token_weights(run: RunDirectory, lut: str, token_id: int, device: str = "cpu") -> TokenWeights:
    """Route the run's held-out text through its lookup form."""
    text, note = held_out_of_run(run, load_run_config(run).data)
    print_note(note)
    inputs = windows_with(text.windows, token_id, MAX_WINDOWS)
    with (
        load_model(run, experts="lut", lut=lut, device=device) as model,
        progress_bar("routing text (windows)", len(inputs)) as advance,
    ):
        return measure_token_weights(model, inputs, token_id, progress=advance, mask=text.mask)


def to_document(
    found: Neighborhood, weights: TokenWeights, tokenizer: Tokenizer, layers: Sequence[int]
) -> list[dict[str, object]]:
    """Return one entry for each layer and expert; the table's rows are for `layers` of the model."""
    entries: list[dict[str, object]] = []
    for at, place in enumerate(found.layers):
        for expert in range(found.norms.shape[1]):
            neighbors = zip(found.token_ids[at, expert].tolist(), found.cosines[at, expert].tolist(), strict=True)
            entries.append(
                {
                    "layer": layers[place],
                    "expert": expert,
                    "norm": found.norms[at, expert].item(),
                    "router_share": None if weights.shares is None else weights.shares[place, expert].item(),
                    "neighbors": [
                        {"id": token_id, "text": token_text(token_id, tokenizer), "cosine": cosine}
                        for token_id, cosine in neighbors
                    ],
                }
            )
    return entries


def print_entries(entries: Sequence[dict[str, object]], title: str, console: Console) -> None:
    """Print layers, experts, norms, shares and neighbors."""
    headings = ("layer", "expert", "norm", "router's weight", "nearest tokens (cosine)")
    table = text_table(escape(title), *headings, texts=headings[-1:])
    for entry in entries:
        share, neighbors = entry["router_share"], entry["neighbors"]
        assert isinstance(neighbors, list)
        table.add_row(
            str(entry["layer"]),
            str(entry["expert"]),
            f"{entry['norm']:.3f}",
            "-" if share is None else f"{share:.1%}",
            escape(", ".join(f"{neighbor['text']} {neighbor['cosine']:.2f}" for neighbor in neighbors)),
            end_section=entry is entries[-1],
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print what the table holds for the token."""
    options = parser("inspect_lut", __doc__ or "", 'python -m src.inspect_lut --run runs/quickstart --token " the"')
    add_run_options(options)
    add_device_option(options)
    options.add_argument("--token", required=True, help="text that is one token, most words with a space in front")
    options.add_argument("--layer", type=number(int, 0), help="show only this layer (default: all)")
    options.add_argument("--neighbors", type=number(int, 1), default=5, help="nearest tokens to show (default: 5)")
    options.add_argument("--json", type=output_file, metavar="FILE", help="also write every figure as JSON")
    given = options.parse_args(arguments)
    run = find_run(given.run, base=given.base)
    rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
    tokenizer, lut_dir = rule.tokenizer, run.lut_path(given.lut)
    with caused_by("--lut"):
        manifest = read_manifest(lut_dir)
        layout, row_ids = manifest.layout, read_row_ids(lut_dir, manifest)
    token_id = single_token(require_text("--token", given.token), rule)
    layers = run.model_config().mixture_layers
    if given.layer is not None and given.layer not in layers:
        last = len(layers) - 1
        which = f"0 to {last}" if layers == tuple(range(last + 1)) else ", ".join(map(str, layers))
        raise UserError(f"--layer {given.layer}: the table has layers {which}")
    places = range(layout.num_layers) if given.layer is None else [layers.index(given.layer)]
    weights, entries = token_weights(run, given.lut, token_id, given.device), list[dict[str, object]]()
    if has_row := row_ids is None or token_id in row_ids:
        with progress_bar("reading the table (rows)", layout.num_rows) as advance:
            found = find_neighbors(lut_dir, token_id, layers=places, neighbors=given.neighbors, progress=advance)
        entries = to_document(found, weights, tokenizer, layers)
    seen = f"{weights.occurrences:,} times in held-out text" if weights.occurrences else "not in held-out text"
    title = f"token {token_text(token_id, tokenizer)} (id {token_id}), {seen}"
    if has_row:
        print_entries(entries, title, Console())
    else:
        print(f"{title}: has no row in this table, so the experts add nothing for it")
    if given.json is not None:
        document = {"token": given.token, "id": token_id, "occurrences": weights.occurrences, "rows": entries}
        write_json(given.json, document)


if __name__ == "__main__":
    run_verb(main)
