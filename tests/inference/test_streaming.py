"""Text on the terminal: whole characters only, nothing lost, one prompt per line when interactive."""

import io
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from src.data.tokenizer import train_bpe
from src.errors import UserError
from src.generate import interact, pieces

TOKENIZER = train_bpe(iter(["plain text"]), 260)  # every other character takes several tokens


@given(st.text(alphabet=st.sampled_from("aé€🙂 \n日"), max_size=30))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    token_ids = TOKENIZER.encode(text).ids
    found = list(pieces(TOKENIZER, token_ids))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_an_unfinished_character_is_shown_as_such_at_the_end() -> None:
    token_ids = TOKENIZER.encode("a€").ids[:-1]
    assert "".join(pieces(TOKENIZER, token_ids)) == TOKENIZER.decode(token_ids) != "a"


def test_text_appears_with_the_token_that_completes_it() -> None:
    token_ids, seen = TOKENIZER.encode("é€").ids, list[int]()

    def tokens() -> Iterator[int]:
        for token_id in token_ids:
            seen.append(token_id)
            yield token_id

    consumed = [(piece, len(seen)) for piece in pieces(TOKENIZER, tokens())]
    assert consumed == [("é", 2), ("€", 5)]


def sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    """A vocabulary of words that start with a space, and of bytes for everything else."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁say", "▁hello", "s", "▁▁", "</s>"]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


LLAMA = sentencepiece(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
)
METASPACE = sentencepiece(decoders.Metaspace())
WORDS = list(range(257, LLAMA.get_vocab_size()))


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE])
@given(prompt=st.lists(st.sampled_from(WORDS), max_size=3), new=st.lists(st.sampled_from(WORDS), max_size=9))
def test_pieces_continue_the_prompt_where_decoders_strip_a_space(
    tokenizer: Tokenizer, prompt: list[int], new: list[int]
) -> None:
    found = "".join(pieces(tokenizer, new, prompt))
    assert tokenizer.decode(prompt) + found == tokenizer.decode(prompt + new)


@given(st.text(alphabet=st.sampled_from("aé€🙂 \n日"), max_size=20))
def test_characters_spelled_in_bytes_appear_whole(text: str) -> None:
    found = list(pieces(LLAMA, [1 + byte for byte in text.encode()], WORDS[1:2]))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(0, LLAMA.get_vocab_size() - 1), max_size=12))
def test_any_ids_can_be_shown(token_ids: list[int]) -> None:
    whole = LLAMA.decode(token_ids)
    assert "".join(pieces(LLAMA, token_ids)) == whole or "\ufffd" in whole  # bytes that are no text


def test_interactive_continues_each_line_until_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(prompt: str) -> None:
        if prompt == "bad":
            raise UserError("the prompt is too long")
        print(prompt, "continued")

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nbad\ntwo"))
    interact(write)
    shown = capsys.readouterr()
    assert shown.out == "one continued\ntwo continued\n"
    assert "error: the prompt is too long" in shown.err
