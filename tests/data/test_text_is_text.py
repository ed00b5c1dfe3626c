"""A text becomes the ids of its characters, whatever is written in it, in time linear in its length."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from src.data import tokenizer as tokenizer_module
from src.data.config import SourceConfig
from src.data.encoder import Encoder
from src.data.packed_corpus import prepare_corpus
from src.data.text_rule import training_rule
from src.data.tokenizer import (
    WORD_CHARACTERS,
    canonical_json,
    fingerprint,
    load_tokenizer,
    train_bpe,
)
from src.inspect_lut import single_token
from tests.data.corpora import config_for, documents_of, json_lines, sentences
from tests.data.test_binding import byte_level_tokenizer, unigram_tokenizer

RANDOM = random.Random(0)
WITHOUT_SPACES = {
    "one letter": "a" * 100_000,
    "DNA": "".join(RANDOM.choices("ACGT", k=100_000)),
    "letters": "".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=100_000)),
    "digits": "1234567890" * 10_000,
    "line ends": "\n" * 100_000,
    "spaces": " " * 100_000,
    "signs": "=-_" * 30_000,
    "mixed signs": "=\x1c_\u0301" * 20_000,
    "Japanese": "\u65e5\u672c" * 30_000,
}


def longest_word(tokenizer: Tokenizer, text: str) -> int:
    pre_tokenizer: Any = tokenizer.pre_tokenizer
    return max(len(word) for word, _ in pre_tokenizer.pre_tokenize_str(text))


@pytest.mark.parametrize("kind", WITHOUT_SPACES)
@pytest.mark.parametrize("make", [byte_level_tokenizer, unigram_tokenizer])
def test_no_long_word_reaches_the_encoder(make: Callable[[], Tokenizer], kind: str, tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert 1 <= longest_word(tokenizer, WITHOUT_SPACES[kind]) <= WORD_CHARACTERS
    tokenizer.save(str(tmp_path / "again.json"))
    assert load_tokenizer(tmp_path / "again.json").to_str() == tokenizer.to_str()
    assert fingerprint(tokenizer) == fingerprint(make())


@pytest.mark.parametrize("kind", WITHOUT_SPACES)
def test_no_long_word_reaches_the_trainer(kind: str) -> None:
    text = WITHOUT_SPACES[kind]
    tokenizer = train_bpe(iter([text]), 300)
    assert 1 < longest_word(tokenizer, text) <= WORD_CHARACTERS
    assert max(map(len, tokenizer.get_vocab())) <= WORD_CHARACTERS  # of a repeated letter a token would be longer
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("make", [byte_level_tokenizer, unigram_tokenizer])
def test_words_that_are_not_long_keep_ids_and_identity(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    plain = make()
    whole = json.loads(plain.to_str())
    whole["pre_tokenizer"] = tokenizer_module._uncut(whole["pre_tokenizer"])
    uncut = Tokenizer.from_str(json.dumps(whole))
    uncut.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for text in [*sentences(20), " " + "x" * (WORD_CHARACTERS - 1), ""]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == uncut.encode(text, add_special_tokens=False).ids
    assert canonical_json(tokenizer.to_str()) == canonical_json(uncut.to_str())


SPECIAL = ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|>" * 3, " <|endoftext|>\n"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "lines.txt"])
def test_a_separator_that_is_written_in_a_document_is_text(name: str, tmp_path: Path) -> None:
    texts = [text + SPECIAL[number % 4] + "\n" for number, text in enumerate(sentences(60))]
    if name == "lines.txt":
        texts = [" ".join(text.split()) + "\n" for text in texts]
        (tmp_path / name).write_text("".join(texts))
    else:
        rows = [{"text": text} for text in texts]
        (tmp_path / name).write_bytes(json.dumps(rows).encode() if name == "t.json" else json_lines(texts))
    start = "document" if name == "lines.txt" else None
    source = SourceConfig(files=[f"{tmp_path}/{name}"], document_start=start)
    corpus = prepare_corpus(config_for(tmp_path / "cache", source, prepare_processes=2))
    found = [*documents_of(corpus, "train"), *documents_of(corpus, "validation")]
    assert sorted(found) == sorted(texts)
    assert len(found) == 60 == corpus.train.documents + corpus.validation.documents


@pytest.mark.parametrize("make", [byte_level_tokenizer, unigram_tokenizer])
def test_prompts_and_scored_texts_are_text_too(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    rule = training_rule(load_tokenizer(tmp_path / "tokenizer.json"), "tokenizer.json")
    for text in SPECIAL:
        assert rule.separator not in rule.prompt(text)
    encoded = Encoder(rule)(SPECIAL)
    assert (encoded.token_ids == rule.separator).sum() == len(SPECIAL)
    assert single_token("<|endoftext|>", rule) == rule.separator
