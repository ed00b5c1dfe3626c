"""How the texts of a run become token ids: one rule for documents, prompts, samples and scored text.

Text is text: a token that stands for more than its characters, such as a separator, is never found in one, whether the
tokenizer has it as a special token, as another added token, or as an entry of its vocabulary. Only a rule puts them.

Importing this must stay cheap (no torch): every tokenizing process does.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, models

from src.errors import DataError

SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<EOS>",
    "[EOS]",
    "<end_of_text>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eod|>",
    "<eod>",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)
"""Usual names of the token that ends a document, in the order in which they are looked for."""
PIECE_CHARACTERS = 1 << 17
"""Longer texts are tokenized in pieces, cut at line ends: the library needs over 100 bytes per token. No longer word
reaches a tokenizer that does not split text into words; of the others, none longer than `WORD_CHARACTERS`."""
_NEEDED_BY_TEXT = re.compile(r".|<0x[0-9A-Fa-f]{2}>", re.DOTALL)
_NEVER_WRITTEN = "\uffff" * 256


@dataclass(frozen=True, eq=False)
class TextRule:
    """A tokenizer, and what a run puts before and after a text."""

    tokenizer: Tokenizer
    """As it was given: names and identity of the ids."""
    separator: int
    """The id that ends documents, and with them generation."""
    before: tuple[int, ...]
    """Ids in front of each text, also of a prompt."""
    after: tuple[int, ...]
    """Ids behind each document."""
    stops: tuple[int, ...] = ()
    """Further ids that end generation, such as the end of an answer in a chat."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end generation."""
        return self.separator, *self.stops

    @cached_property
    def reserved(self) -> dict[str, int]:
        """Tokens that stand for more than their characters, so that no text becomes them."""
        added = self.tokenizer.get_added_tokens_decoder().items()
        special = [token_id for token_id, token in added if token.special or token.content in SEPARATORS]
        placed = itertools.chain(self.stop_ids, self.before, self.after, *template(self.tokenizer))
        names = {self.tokenizer.id_to_token(token_id): token_id for token_id in (*placed, *special)}
        needed = _needed_by_text(self.tokenizer)
        return {name: token_id for name, token_id in names.items() if name is not None and name not in needed}

    @cached_property
    def plain(self) -> Tokenizer:
        """The tokenizer for text: it never gives a reserved id, and leaves reserved ids out when it decodes."""
        return _hide(self.reserved, self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return [token_id for piece in pieces(text) for token_id in self.plain.encode(piece).ids]

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued."""
        return [*self.before, *self.encode(text)]

    def document(self, text: str) -> Iterator[int]:
        """Yield the ids of a whole text."""
        yield from self.before
        for piece in pieces(text):
            yield from self.plain.encode(piece).ids
        yield from self.after

    @property
    def is_default(self) -> bool:
        """Whether it is the rule of a tokenizer trained here: nothing before, and the first of `SEPARATORS` after."""
        return not self.before and self.after == (self.separator,) == (self.tokenizer.token_to_id(SEPARATORS[0]),)

    def record(self) -> dict[str, Any]:
        """Return the tokens by name, as a run's `config.yaml` keeps them."""
        names = [self.tokenizer.id_to_token(token_id) for token_id in (*self.before, *self.after, self.separator)]
        stops = [self.tokenizer.id_to_token(token_id) for token_id in self.stops]
        return {
            "separator": names[-1],
            "before": names[: len(self.before)],
            "after": names[len(self.before) : -1],
            **({"stops": stops} if stops else {}),
        }


def training_rule(tokenizer: Tokenizer, where: str, separator: str | None = None) -> TextRule:
    """Return the rule of runs that are trained here: nothing before, the separator after, whatever the template.

    Args:
        tokenizer: encodes text.
        where: what messages call it.
        separator: a token; None looks for the first of `SEPARATORS` that the tokenizer has.

    Raises:
        DataError: the tokenizer lacks the token, or all of the usual ones.
    """
    found = find_separator(tokenizer, where, separator)
    return TextRule(tokenizer, found, (), (found,))


def imported_rule(tokenizer: Tokenizer, where: str) -> TextRule:
    """Return the rule of a model that was trained elsewhere: what its tokenizer's template (post-processor) says.

    The last token that the template puts behind a text separates documents. Where it puts none, a usual one does.

    Raises:
        DataError: as `training_rule`, or the template puts an id that the vocabulary lacks.
    """
    before, after = template(tokenizer)
    for token_id in (*before, *after):
        if tokenizer.id_to_token(token_id) is None:
            raise DataError(f"{where}: its post_processor puts id {token_id}, which its vocabulary lacks; correct it")
    after = after or (find_separator(tokenizer, where),)
    return TextRule(tokenizer, after[-1], before, after)


def recorded_rule(tokenizer: Tokenizer, where: str, record: Mapping[str, Any]) -> TextRule:
    """Return the rule that `TextRule.record` described; where it is empty, that of runs trained here.

    Raises:
        DataError: the tokenizer lacks one of its tokens.
    """
    if not record:
        return training_rule(tokenizer, where)

    def id_of(token: object) -> int:
        found = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            raise DataError(
                f"{where}: text_rule names {token!r}, which is no token of the tokenizer; copy config.yaml and "
                "tokenizer.json from the same run"
            )
        return found

    sides = [record.get(side) for side in ("before", "after", "stops")]
    before, after, stops = [tuple(map(id_of, side)) if isinstance(side, list) else () for side in sides]
    return TextRule(tokenizer, id_of(record.get("separator")), before, after, stops)


def find_separator(tokenizer: Tokenizer, where: str, named: str | None = None) -> int:
    """Return the id that ends documents: of the token `named`, else of the first of `SEPARATORS` that there is.

    Added tokens go before entries of the vocabulary, which may be text that is only called like a separator; but for
    the first name, which is the separator wherever it stands.

    Raises:
        DataError: there is no such token, or it is a character that text needs.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if named is None:
        names = [SEPARATORS[0], *(name for name in SEPARATORS if name in added), *SEPARATORS]
        named = next((name for name in names if tokenizer.token_to_id(name) is not None), None)
        if named is None:
            raise DataError(
                f"{where}: has none of the usual tokens that separate documents ({' '.join(SEPARATORS)}); name another "
                "with data.tokenizer.separator, or import it with a post_processor that puts one after texts"
            )
    found = tokenizer.token_to_id(named)
    if found is None:
        raise DataError(
            f"data.tokenizer.separator: {named!r} is no token of {where}; name one that it has, or null for a usual one"
        )
    if named in _needed_by_text(tokenizer):
        raise DataError(
            f"data.tokenizer.separator: {named!r} is part of ordinary text in {where}; name a token that text lacks"
        )
    return found


def pieces(text: str) -> list[str]:
    """Cut a text into what is tokenized at a time."""
    return cut_at_line_ends(text, PIECE_CHARACTERS)


def cut_at_line_ends(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most `limit` characters, after a line end where there is one."""
    found: list[str] = []
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]


def _needed_by_text(tokenizer: Tokenizer) -> set[str]:
    """Return single characters of the vocabulary, and the bytes that other characters are made of."""
    return {token for token in tokenizer.get_vocab(with_added_tokens=False) if _NEEDED_BY_TEXT.fullmatch(token)}


def template(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer's post-processor puts before and after a text."""
    probe = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    probe.post_processor = tokenizer.post_processor
    found = probe.encode("x")
    text = found.special_tokens_mask.index(0)
    return tuple(found.ids[:text]), tuple(found.ids[text + 1 :])


def _hide(reserved: Mapping[str, int], tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer of the same ids whose tokens `reserved` no text can hold, and which adds none to a text."""

    def name_of(token: str) -> str:
        return token + _NEVER_WRITTEN if token in reserved else token

    whole = json.loads(tokenizer.to_str())
    model, prefix = whole["model"], whole["model"].get("continuing_subword_prefix") or ""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name_of(token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[name_of(token), score] for token, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = name_of(model["unk_token"])
    if "merges" in model:
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if reserved.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    added = {token["content"]: token for token in whole["added_tokens"]}
    for name in reserved:
        if name not in added:
            added[name] = {"id": reserved[name], "single_word": False, "lstrip": False, "rstrip": False}
        added[name] |= {"content": name_of(name), "special": True, "normalized": False}
    whole["added_tokens"], whole["post_processor"] = list(added.values()), None
    plain = Tokenizer.from_str(json.dumps(whole))
    plain.encode_special_tokens = True
    return plain
