"""Text on the terminal: whole characters only, nothing lost, one prompt per line when interactive."""

import io
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
