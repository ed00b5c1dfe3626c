"""One rule per run turns text into ids: what separates documents, what stands before and after a text."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from src import prepare_data, train
from src.data.config import SourceConfig, TokenizerConfig
from src.data.encoder import Encoder
from src.data.packed_corpus import prepare_corpus
from src.data.text_rule import (
    PIECE_CHARACTERS,
    SEPARATORS,
    TextRule,
    imported_rule,
    pieces,
    recorded_rule,
    training_rule,
)
from src.data.tokenizer import WORD_CHARACTERS, fingerprint, load_tokenizer, train_bpe
from src.errors import ConfigError, DataError
from src.inspect_lut import single_token
from tests.data.corpora import all_documents, config_for, json_lines, sentences

CHARACTERS = [*"abcdefghijklmnopqrstuvwxyz .,:;</>|_[]ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-'\n"]


def special_token() -> tuple[Tokenizer, str]:
    return train_bpe(iter(sentences(20)), 300, "</s>"), "</s>"


def added_token() -> tuple[Tokenizer, str]:
    tokenizer = train_bpe(iter(sentences(20)), 300, "[PAD]")
    tokenizer.add_tokens([AddedToken("<eos>", special=False)])
    return tokenizer, "<eos>"


def unigram_entry() -> tuple[Tokenizer, str]:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((character, -3.0) for character in CHARACTERS)]
    return Tokenizer(models.Unigram(vocabulary, 0)), "</s>"


def merged_entry() -> tuple[Tokenizer, str]:
    names = [*CHARACTERS, "</", "s>", "</s>", "</s></s>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "</s>")]
    return Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges)), "</s>"


def whole_word_entry() -> tuple[Tokenizer, str]:
    names = [*CHARACTERS, "<|end_of_text|>"]
    bpe = models.BPE({name: number for number, name in enumerate(names)}, [], ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return tokenizer, "<|end_of_text|>"


def word_piece_entry() -> tuple[Tokenizer, str]:
    names = ["[EOS]", "[UNK]", *CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, "[EOS]"


KINDS = [special_token, added_token, unigram_entry, merged_entry, whole_word_entry, word_piece_entry]
Make = Callable[[], tuple[Tokenizer, str]]
MADE: dict[Make, tuple[Tokenizer, str, TextRule]] = {}


def loaded(tokenizer: Tokenizer, tmp_path: Path) -> Tokenizer:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("make", KINDS)
def test_a_separator_stands_after_documents_and_never_in_them(make: Make, tmp_path: Path) -> None:
    made, name = make()
    tokenizer = loaded(made, tmp_path)
    rule = training_rule(tokenizer, "tokenizer.json")
    assert rule.separator == tokenizer.token_to_id(name)
    texts = [name, f"a{name}b", name * 3, f"one {name} two\n", "no such thing"]
    for text in texts:
        assert rule.encode(text)
        assert rule.separator not in rule.prompt(text)
        assert [*rule.document(text)] == [*rule.prompt(text), rule.separator]
        assert "".join(rule.plain.decode(rule.encode(text)).split()) == "".join(text.split())
    encoded = Encoder(rule)(texts)
    assert encoded.token_ids.tolist() == [token_id for text in texts for token_id in rule.document(text)]
    assert rule.plain.decode([rule.separator]) == ""
    assert single_token(name, rule) == rule.separator


@pytest.mark.parametrize("make", KINDS)
def test_text_without_separators_keeps_its_ids_and_the_tokenizer_its_identity(make: Make, tmp_path: Path) -> None:
    made, _ = make()
    rule = training_rule(loaded(made, tmp_path), "tokenizer.json")
    for text in [*sentences(20), "a  b", "s>", "</", " ", ""]:
        assert rule.encode(text) == made.encode(text, add_special_tokens=False).ids
    assert fingerprint(rule.tokenizer) == fingerprint(made)


def unknown_entry() -> tuple[Tokenizer, str]:
    """Its unknown token is special, as usual, and so is a part of a merge."""
    names = {**merged_entry()[0].get_vocab(), "<unk>": 99}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "</s>")]
    tokenizer = Tokenizer(models.BPE(names, merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</"])
    return tokenizer, "</s>"


@pytest.mark.parametrize("make", [*KINDS, unknown_entry])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_whatever_is_written_no_text_becomes_a_reserved_token(make: Make, data: st.DataObject) -> None:
    if make not in MADE:
        made, name = make()
        MADE[make] = made, name, training_rule(made, "here", name)
    made, name, rule = MADE[make]
    parts = st.sampled_from([name, *rule.reserved, "</", "s>", "a", " ", "<", ">", "\n", "\u00e9", "\U0001f600"])
    text = "".join(data.draw(st.lists(parts, max_size=12)))
    ids = rule.encode(text)
    unknown = {rule.tokenizer.token_to_id("<unk>"), rule.tokenizer.token_to_id("[UNK]")}
    reserved, alone = {*rule.reserved.values()} - unknown, made.encode(text, add_special_tokens=False).ids
    assert not reserved & {*ids}
    if not any(name in text for name in rule.reserved) and not reserved & {*alone}:  # as where it drops what is between
        assert ids == alone


def test_added_tokens_that_stand_for_their_characters_are_text(tmp_path: Path) -> None:
    tokenizer, _ = special_token()
    tokenizer.add_tokens([AddedToken("    ", normalized=True), AddedToken("<|im_end|>"), AddedToken("<tool>")])
    rule = training_rule(loaded(tokenizer, tmp_path), "tokenizer.json")
    written = [rule.tokenizer.token_to_id(name) for name in ("    ", "<|im_end|>", "<tool>")]
    ids = rule.encode("if x:\n    <tool> <|im_end|>")
    assert written[0] in ids
    assert written[2] in ids
    assert written[1] not in ids  # a usual name of a separator
    assert rule.plain.decode(ids) == "if x:\n    <tool> <|im_end|>"


def words(*names: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({name: number for number, name in enumerate(["[UNK]", *names])}, "[UNK]"))


def test_usual_names_are_found_in_order() -> None:
    for name in SEPARATORS:
        assert training_rule(words("a", name), "here").separator == 2
    assert training_rule(words(*reversed(SEPARATORS)), "here").separator == len(SEPARATORS)
    tokenizer = words("</s>", "a")  # here a word of a markup language
    tokenizer.add_special_tokens(["<eos>"])
    assert training_rule(tokenizer, "here").record() == {"separator": "<eos>", "before": [], "after": ["<eos>"]}
    tokenizer = words("<|endoftext|>", "a")
    tokenizer.add_special_tokens(["</s>"])
    assert training_rule(tokenizer, "here").separator == 1
    with pytest.raises(DataError, match=r"here: has none of the usual tokens .*</s> .*; name another with data.tokeni"):
        training_rule(words("a"), "here")


def test_the_key_names_any_separator(tmp_path: Path) -> None:
    texts = [f"{text} ~~~ <|endoftext|>\n" for text in sentences(60)]
    (tmp_path / "t.jsonl").write_bytes(json_lines(texts))
    config = config_for(tmp_path / "cache", SourceConfig(files=[f"{tmp_path}/t.jsonl"]))
    given = train_bpe(iter(texts), 300)
    given.add_tokens([AddedToken("~~~", special=False)])
    given.save(str(tmp_path / "tokenizer.json"))
    usual, named, trained = (
        prepare_corpus(config_for(tmp_path / "cache", *config.sources, tokenizer=tokenizer, prepare_processes=2))
        for tokenizer in (
            TokenizerConfig(path=f"{tmp_path}/tokenizer.json"),
            TokenizerConfig(path=f"{tmp_path}/tokenizer.json", separator="~~~"),
            TokenizerConfig(vocab_size=300, separator="~~~"),
        )
    )
    assert len({corpus.fingerprint for corpus in (usual, named, trained)}) == 3
    for corpus, separator in ((usual, "<|endoftext|>"), (named, "~~~"), (trained, "~~~")):
        assert corpus.rule.record() == {"separator": separator, "before": [], "after": [separator]}
        assert sorted(all_documents(corpus)) == sorted(texts)
        assert corpus.facts()["text_rule"] == corpus.rule.record()


@pytest.mark.parametrize("verb", [train.main, prepare_data.main])
@pytest.mark.parametrize(
    ("separator", "message"),
    [("<none>", "data.tokenizer.separator: '<none>' is no token of "), ("a", "'a' is part of ordinary text")],
)
def test_a_separator_that_cannot_be_used_is_one_line_before_any_work(
    verb: Callable[[Sequence[str]], None], separator: str, message: str, tmp_path: Path
) -> None:
    train_bpe(iter(sentences(20)), 300).save(str(tmp_path / "tokenizer.json"))
    keys = [f"data.tokenizer.path={tmp_path}/tokenizer.json", f"data.tokenizer.separator={separator}"]
    keys += [f"output_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache", "wandb.mode=disabled"]
    with pytest.raises((DataError, ConfigError), match=message):
        verb(["--config", "configs/quickstart.yaml", *keys])
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match=r"data.tokenizer.separator: 'a' is part of ordinary text"):
        TokenizerConfig(separator="a")


TEMPLATES = {
    "template": processors.TemplateProcessing(
        single="<s> $A </s> <x>", special_tokens=[("<s>", 2), ("</s>", 3), ("<x>", 4)]
    ),
    "begin": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)]),
    "bert": processors.BertProcessing(("</s>", 3), ("<s>", 2)),
    "roberta": processors.RobertaProcessing(("</s>", 3), ("<s>", 2)),
    "sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]),
        ]
    ),
    "none": None,
}
EXPECTED = {"template": ((2,), (3, 4), 4), "begin": ((2,), (3,), 3), "none": ((), (3,), 3)}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_counts_for_imported_models_only(kind: str) -> None:
    tokenizer = words("a", "<s>", "</s>", "<x>")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TEMPLATES[kind]
    assert [*training_rule(tokenizer, "here").document("a a")] == [1, 1, 3]
    before, after, separator = EXPECTED.get(kind, ((2,), (3,), 3))
    rule = imported_rule(tokenizer, "here")
    assert (rule.before, rule.after, rule.separator) == (before, after, separator)
    assert rule.prompt("a a") == [*before, 1, 1]
    assert Encoder(rule)(["a", ""]).token_ids.tolist() == [*before, 1, *after, *before, *after]
    again = recorded_rule(tokenizer, "here", json.loads(json.dumps(rule.record())))
    assert (again.before, again.after, again.separator) == (before, after, separator)


def test_a_record_or_template_of_other_tokens_is_named() -> None:
    with pytest.raises(DataError, match=r"here: text_rule names '<s>', which is no token of the tokenizer; copy conf"):
        recorded_rule(words("a", "</s>"), "here", {"separator": "</s>", "before": ["<s>"], "after": []})
    tokenizer = words("a", "</s>")
    tokenizer.post_processor = TEMPLATES["begin"]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 9)])
    with pytest.raises(DataError, match=r"here: its post_processor puts id 9, which its vocabulary lacks"):
        imported_rule(tokenizer, "here")


def without_words(pre_tokenizer: pre_tokenizers.PreTokenizer | None, model: str) -> Tokenizer:
    """As SentencePiece vocabularies come: spaces are characters, and nothing splits text."""
    tokenizer = merged_entry()[0] if model == "bpe" else unigram_entry()[0]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace("\t", " ")])
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "pre_tokenizer", [None, pre_tokenizers.Metaspace(" ", split=False), pre_tokenizers.Split("\x1c", "isolated")]
)
def test_a_tokenizer_that_splits_no_words_gets_bounded_pieces_as_they_are(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None, model: str, tmp_path: Path
) -> None:
    made = without_words(pre_tokenizer, model)
    rule = training_rule(loaded(made, tmp_path), "tokenizer.json")
    prose = "a longer text of several words. " * 30  # in one line and one word
    assert len(prose) > WORD_CHARACTERS
    assert rule.encode(prose) == made.encode(prose, add_special_tokens=False).ids
    for text in ("a" * 300_000, "\n" * 300_000, " " * 300_000, "</s>" * 75_000):
        assert max(map(len, pieces(text))) <= PIECE_CHARACTERS
        assert "".join(pieces(text)) == text
        ids = rule.encode(text)  # linear in the length of a piece: seconds, where quadratic took hours
        assert len(ids) >= 150_000
        assert rule.separator not in ids
