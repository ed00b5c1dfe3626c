"""`python -m src.generate`: continue a prompt. Stdout is the text alone; everything else goes to stderr."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from src.cli import add_form_options, find_plug_in, find_run, input_file, number, parser, require_text, run_verb
from src.data.text_rule import TextRule
from src.data.tokenizer import load_run_rule, num_ids
from src.errors import MAX_FLOAT32, UserError, caused_by
from src.inference import InferenceModel, load_model, stream
from src.inference.generation import Sampling
from src.inference.loader import require_table


def pieces(tokenizer: Tokenizer, token_ids: Iterable[int], prompt_ids: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text that `token_ids` add to the prompt's, as soon as its characters are complete.

    A decoder may strip a space in front of its first token, so new tokens are decoded behind a token that is printed.
    """
    window = list(prompt_ids)
    shown = tokenizer.decode(window)
    for token_id in token_ids:
        window.append(token_id)
        text = tokenizer.decode(window)
        if text.endswith("\ufffd"):  # a character whose other bytes are still to come
            continue
        if piece := text[len(shown) :]:
            yield piece
        shown, alone = text, tokenizer.decode([token_id])
        if alone and "\ufffd" not in alone:  # decodes by itself, so what comes next can be decoded behind it
            window, shown = [token_id], alone
    if rest := tokenizer.decode(window)[len(shown) :]:
        yield rest


def interact(write: Callable[[str], None]) -> None:
    """Continue each line of standard input until it ends; the prompt sign goes to stderr."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            try:
                write(require_text("prompt", line.rstrip("\n")))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


def _prompt(text: str | None, file: Path | None) -> str:
    if file is None:
        assert text is not None
        prompt, flag = require_text("--prompt", text), "--prompt"
    else:
        flag = f"--prompt-file {file}"
        try:
            prompt = file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8
            raise UserError(f"{flag}: cannot be read as UTF-8 text ({error})") from error
    if not prompt:
        raise UserError(f"{flag}: the prompt is empty; give at least one character")
    return prompt


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and generate."""
    example = 'python -m src.generate --run runs/quickstart --prompt "import os" --temperature 0.8'
    options = parser("generate", __doc__ or "", example)
    add_form_options(options)
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompt-file", type=input_file, help="file of UTF-8 text to continue")
    source.add_argument("--interactive", action="store_true", help="continue each line of standard input")
    options.add_argument("--max-new-tokens", type=number(int, 1), default=128, help="most tokens to add (default: 128)")
    options.add_argument("--temperature", type=number(float, 0, MAX_FLOAT32), default=0.0, help="0 is greedy (default)")
    options.add_argument("--top-k", type=number(int, 1), help="sample among the k most likely tokens only")
    options.add_argument(
        "--top-p", type=number(float, 0, 1), help="sample among the most likely tokens that reach this probability"
    )
    options.add_argument("--seed", type=number(int, -(2**63)), default=0, help="makes sampling repeatable (default: 0)")
    options.add_argument("--window", action="store_true", help="read only the end of a prompt that is too long")
    options.add_argument(
        "--cache-mb", type=number(float, 0, 2**40), default=0, help="MiB of table rows kept in memory (default: 0)"
    )
    given = options.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character must not end the text
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; `require_text` then refuses the line
    run = find_run(given.run, base=given.base)
    plug_in = find_plug_in(given.attach, run)
    with caused_by("--lut"):
        require_table(plug_in or run, given.experts, given.lut)
    rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
    sampling = _sampling(given.temperature, given.top_k, given.top_p, given.seed, num_ids(rule.tokenizer))
    prompt = None if given.interactive else _prompt(given.prompt, given.prompt_file)
    with load_model(
        run,
        attach=plug_in,
        experts=given.experts,
        lut=given.lut,
        device=given.device,
        reader=given.reader,
        cache_mb=given.cache_mb,
    ) as model:
        write = partial(print_continuation, model, rule, given.max_new_tokens, sampling, given.window)
        if prompt is None:
            interact(write)
        else:
            write(prompt)


def _sampling(temperature: float, top_k: int | None, top_p: float | None, seed: int, ids: int) -> Sampling:
    try:
        return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, num_ids=ids)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from error


def print_continuation(
    model: InferenceModel, rule: TextRule, max_new_tokens: int, sampling: Sampling, window: bool, prompt: str
) -> None:
    """Print `prompt` and its continuation, piece by piece, as far as the context allows."""
    limit, prompt_ids = model.config.max_sequence_length, rule.prompt(prompt)
    if not prompt_ids:
        raise UserError("the prompt is empty; give at least one character")
    # A window keeps at least half of the context for the prompt, and all of the prompt where it fits.
    room = max(limit - len(prompt_ids), limit // 2) if window else limit - len(prompt_ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, but the context holds {limit}; "
            "shorten it, or read only its end with --window"
        )
    if room < max_new_tokens:
        print(f"note: the context holds {room} more tokens, not {max_new_tokens}", file=sys.stderr)
    steps = stream(
        model,
        torch.tensor([prompt_ids]),
        max_new_tokens=min(max_new_tokens, room),
        stop_ids=rule.stop_ids,
        overflow="window" if window else "refuse",
        **asdict(sampling),
    )
    print(prompt, end="", flush=True)
    for piece in pieces(rule.plain, (int(step) for step in steps), prompt_ids):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_verb(main)
