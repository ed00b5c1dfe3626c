"""Tokenizers of the `tokenizers` library: trained here or loaded, identified, measured in bytes."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from src.data.text_rule import SEPARATORS, TextRule, imported_rule, recorded_rule
from src.errors import DataError

WORD_CHARACTERS = 128
"""Longer words of a pre-tokenizer (DNA, white space) are cut: training takes time quadratic in a word. A tokenizer that
does not split text at spaces gets words of up to `PIECE_CHARACTERS`: encoding takes time linear in them."""
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece vocabularies write for a space."""
_FIELDS = {
    "": "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model",
    "added_tokens": "id content single_word lstrip rstrip normalized special",
    "BPE": "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges "
    "vocab merges",
    "WordPiece": "type unk_token continuing_subword_prefix max_input_chars_per_word vocab prefix cleanup",
    "WordLevel": "type vocab unk_token",
    "Unigram": "type unk_id vocab byte_fallback",
    "Sequence": "type normalizers pretokenizers processors decoders id type_id",
    "SpecialToken": "id type_id",
    "BertNormalizer": "type clean_text handle_chinese_chars strip_accents lowercase",
    "Precompiled": "type precompiled_charsmap",
    "Prepend": "type prepend",
    "Replace": "type pattern content",
    "Strip": "type strip_left strip_right content start stop",
    "ByteLevel": "type add_prefix_space trim_offsets use_regex",
    "CharDelimiterSplit": "type delimiter",
    "Digits": "type individual_digits",
    "FixedLength": "type length",
    "Metaspace": "type replacement prepend_scheme split",
    "Punctuation": "type behavior",
    "Split": "type pattern behavior invert",
    "BertProcessing": "type sep cls",
    "RobertaProcessing": "type sep cls trim_offsets add_prefix_space",
    "TemplateProcessing": "type single pair special_tokens",
    "BPEDecoder": "type suffix",
    "CTC": "type pad_token word_delimiter_token cleanup",
}
"""Fields of each part of a tokenizer, as version 0.23 of the library writes them; other parts have only a type."""


def train_bpe(texts: Iterator[str], vocab_size: int, separator: str = SEPARATORS[0]) -> Tokenizer:
    """Train a byte-level BPE; any text can be encoded, and id 0 is the `separator` of documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _cut_long_words(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`; DataError when it is missing or unreadable."""
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library ({error})") from error
    return _without_limits(tokenizer)


def load_run_rule(path: Path, recorded: Mapping[str, str], text_rule: Mapping[str, Any] | None) -> TextRule:
    """Load the tokenizer of a run, and the rule by which the run encodes text.

    Args:
        path: its `tokenizer.json`.
        recorded: fingerprints of the tokenizers that its model and tables were made with, by where they are recorded.
        text_rule: the rule as the run recorded it; None in an import that was made before runs did.

    Raises:
        DataError: the file is missing or unreadable, or something was made with another tokenizer.
    """
    tokenizer = load_tokenizer(path)
    expected = fingerprint(tokenizer)
    for where, found in recorded.items():
        require_same(found, where, expected, str(path))
    if text_rule is None:
        return imported_rule(tokenizer, str(path))
    return recorded_rule(tokenizer, str(path.parent), text_rule)


def load_hub_tokenizer(name: str) -> Tokenizer:
    """Download a tokenizer from the Hugging Face Hub, or read it from the local cache; DataError when that fails."""
    try:
        tokenizer = Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.tokenizer.hub: could not download {name} from the Hugging Face Hub: {reason}; check the name, your "
            "network or HF_TOKEN, or set data.tokenizer.path to a tokenizer.json"
        ) from error
    return _without_limits(tokenizer)


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's canonical JSON: binds data, model and table to one vocabulary."""
    return hashlib.sha256(canonical_json(tokenizer.to_str()).encode()).hexdigest()


class _Number(str):
    """A number as the library wrote it; Python would write some in another way."""

    __slots__ = ()


def canonical_json(text: str) -> str:
    """Write a tokenizer's JSON in one way, whichever release of the library wrote `text`.

    The cut of long words is left out, since other words keep their ids. Fields come in the order of `_FIELDS`. Fields
    that are not listed there are left out if the library makes the same tokenizer without them, so that a new field
    with its default value changes nothing. For releases up to 0.23 the result is what the library itself writes, whose
    hash is recorded in runs, tables and caches.
    """
    whole = json.loads(text, parse_float=_Number)
    whole["pre_tokenizer"] = _uncut(whole["pre_tokenizer"])
    full, known = _written(whole, "", with_unlisted=True), _written(whole, "", with_unlisted=False)
    return known if full != known and _same_tokenizer(known, full) else full


def _uncut(pre_tokenizer: Any) -> Any:
    """Return a pre-tokenizer of a tokenizer's JSON without the cut of long words."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [inner, {"type": "FixedLength", "length": length}]}:
            return inner if length == WORD_CHARACTERS else pre_tokenizer
        case _:
            return pre_tokenizer


def _same_tokenizer(one: str, other: str) -> bool:
    try:
        return Tokenizer.from_str(one).to_str() == Tokenizer.from_str(other).to_str()
    except Exception:  # noqa: BLE001 - the library raises bare Exception, here for a field that it requires
        return False


def _written(value: Any, place: str, *, with_unlisted: bool) -> str:
    """Write a value that was found at the key `place` as JSON without spaces."""
    if isinstance(value, _Number):  # not quoted
        return value
    if place == "merges" or not isinstance(value, dict | list):
        return _compact(value)
    if isinstance(value, list):
        return f"[{','.join([_written(item, place, with_unlisted=with_unlisted) for item in value])}]"
    if place == "vocab":
        return _compact({token: value[token] for token in sorted(value, key=value.__getitem__)})
    if place == "special_tokens":  # its keys are tokens, not fields
        return _compact(value, sort_keys=True)
    kind = value.get("type", place)
    listed = _FIELDS[kind].split() if kind in _FIELDS else ["type"] if "type" in value else sorted(value)
    fields = [field for field in listed if field in value]
    fields += sorted(value.keys() - listed) if with_unlisted else []
    written = [f'"{field}":{_written(value[field], field, with_unlisted=with_unlisted)}' for field in fields]
    return f"{{{','.join(written)}}}"


def _compact(value: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of ids a model needs: the largest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def require_room(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError when the tokenizer has ids that a model of `vocab_size` lacks."""
    if (size := vocabulary_size(tokenizer)) > vocab_size:
        raise DataError(
            f"model.vocab_size: {vocab_size}, but the tokenizer has {size} ids; set model.vocab_size={size} or more"
        )


def require_same(found: str | None, found_at: str, expected: str | None, expected_at: str) -> None:
    """Raise DataError when two fingerprints differ, naming where each comes from; an unknown one (None) passes."""
    if found is not None and expected is not None and found != expected:
        raise DataError(
            f"{found_at}: made with tokenizer {found[:12]}, but {expected_at} has tokenizer {expected[:12]}; "
            "their ids mean different text, so use the two that belong together"
        )


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Return (V,) int64: UTF-8 bytes of text that each id decodes to; 0 for special tokens and padding ids."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    added, kinds = tokenizer.get_added_tokens_decoder(), _decoder_kinds(json.loads(tokenizer.to_str())["decoder"])
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id not in added:
            lengths[token_id] = _num_bytes(token, kinds)
        elif not added[token_id].special:
            lengths[token_id] = len(token.encode())
    return lengths


def _decoder_kinds(decoder: Any) -> set[str]:
    """Return the types of a decoder, and of those it is made of, in a tokenizer's JSON."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


def _num_bytes(token: str, kinds: set[str]) -> int:
    """Count the bytes of text that a token of the vocabulary stands for, as its kind of decoder writes it."""
    if "ByteLevel" in kinds:
        return len(token)  # one character of the vocabulary is one byte
    if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1
    if "WordPiece" in kinds:
        return len(token[2:].encode()) if token.startswith("##") else len(token.encode()) + 1  # and a space
    return len(token.replace(_METASPACE, " ").encode())


def _without_limits(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()  # a tokenizer.json may carry limits of the model it was made for
    tokenizer.no_padding()
    _cut_long_words(tokenizer)
    return tokenizer


def _cut_long_words(tokenizer: Tokenizer) -> None:
    """Bound the words of a tokenizer that splits text at spaces; others get whole pieces, which stay as they are."""
    found: Any = tokenizer.pre_tokenizer
    is_cut = _uncut(written := json.loads(tokenizer.to_str())["pre_tokenizer"]) is not written
    if found is not None and not is_cut and len(found.pre_tokenize_str("a a")) > 1:
        cut = pre_tokenizers.FixedLength(WORD_CHARACTERS)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, cut])


def num_ids(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id that decodes; a model's vocabulary may be larger."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
