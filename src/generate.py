"""`python -m src.generate`: continue a prompt. Stdout is the text alone; everything else goes to stderr."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from src.cli import add_form_options, parser, run_verb
from src.data.tokenizer import END_OF_TEXT, load_tokenizer
from src.errors import UserError
from src.inference import InferenceModel, load_model
from src.inference.generation import stream
from src.run_directory import RunDirectory


def write_text(model: InferenceModel, tokenizer: Tokenizer, prompt: str, **sampling: object) -> None:
    """Print `prompt` and its continuation, piece by piece as it is generated."""
    token_ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.embedding.weight.device)
    decoder = DecodeStream(skip_special_tokens=True)  # holds back bytes of an unfinished character
    print(prompt, end="", flush=True)
    stop = tokenizer.token_to_id(END_OF_TEXT)
    for step in stream(model, token_ids, stop_ids=[stop], **sampling):  # type: ignore[arg-type]
        if (piece := decoder.step(tokenizer, int(step))) is not None:
            print(piece, end="", flush=True)
    print()


def _prompt(text: str | None, file: Path | None) -> str:
    if file is None:
        assert text is not None
        return text
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {file}: cannot be read as UTF-8 text ({error})") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and generate."""
    options = parser("generate", __doc__ or "", 'python -m src.generate --run runs/quickstart --prompt "import os"')
    add_form_options(options)
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompt-file", type=Path, help="UTF-8 file to continue")
    options.add_argument("--max-new-tokens", type=int, default=128, help="tokens to add at most (default: 128)")
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    options.add_argument("--top-k", type=int, help="sample among the k most likely tokens only")
    options.add_argument("--top-p", type=float, help="sample among the most likely tokens that reach this probability")
    options.add_argument("--seed", type=int, default=0, help="makes sampling repeatable (default: 0)")
    given = options.parse_args(arguments)
    run = RunDirectory(given.run).require()
    tokenizer = load_tokenizer(run.tokenizer_path)
    prompt = _prompt(given.prompt, given.prompt_file)
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    with load_model(run.path, experts=given.experts, lut=given.lut, device=given.device, reader=given.reader) as model:
        room = model.config.max_sequence_length - len(tokenizer.encode(prompt).ids)
        if room < given.max_new_tokens:
            print(f"note: the context holds {room} more tokens, not {given.max_new_tokens}", file=sys.stderr)
        write_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max(0, min(given.max_new_tokens, room)),
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            seed=given.seed,
        )


if __name__ == "__main__":
    run_verb(main)
