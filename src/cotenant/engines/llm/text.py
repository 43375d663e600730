"""Text to tokens and back, by the tokenizer that comes with a model.

Known are byte-level BPE (GPT-2 and after) and SentencePiece's BPE and Unigram with byte fallback
(Llama 2, Gemma). Encoding is done by Hugging Face's tokenizers. Decoding is done here: a token is
its bytes, an answer is the bytes of its tokens; so a stream and the whole always say the same.

Nothing in a file is believed: what is wrong is a ModelError that names the key.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cotenant.domain.errors import ModelError, TooLarge
from cotenant.engines.llm.keys import read_json

MOST_TOKENS: Final = 1 << 20
"""In a vocabulary."""
SHRINK: Final = 4
"""Characters that Unicode's normal form C makes one of, at most."""
UNKNOWN, CONTROL, DEFINED = 2, 3, 4
"""Types of tokens in GGUF files; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
ENDINGS: Final = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn> <EOT> "  # noqa: SIM905
    "<|eot|> <|END_OF_TURN_TOKEN|>".split()
)
"""Control tokens that end a turn, whether or not a GGUF file says so."""

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_FOUR = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Cut(NamedTuple):
    """How text is cut into words before merging: by one pattern after the other. ``whole``: a
    word that is a token is that token, whatever the merges say."""

    patterns: tuple[str, ...]
    whole: bool = False
    composed: bool = False
    """Whether text is brought to Unicode's normal form C before."""
    begins: bool = False
    """Whether BOS is added if the file does not say."""


_DIGITS = Cut((r"\p{N}", _WORDS))
CUTS: Final[Mapping[str, Cut]] = {
    "gpt-2": Cut((_WORDS,)),
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "smollm": _DIGITS,
    "refact": _DIGITS,
    "starcoder": _DIGITS,
    "qwen2": Cut((_FOUR % "",), composed=True),
    "llama-bpe": Cut((_FOUR % "{1,3}",), whole=True, begins=True),
    "llama3": Cut((_FOUR % "{1,3}",), whole=True, begins=True),
    "tekken": Cut((_TEKKEN,), whole=True, begins=True),
}
"""By the name that GGUF files use (``tokenizer.ggml.pre``)."""


class Facts(NamedTuple):
    """What is to be known of a tokenizer beside how it encodes. ``pieces``: each token's bytes;
    ``prefixed``: whether a text begins with a space that is not part of it."""

    pieces: list[bytes]
    prefixed: bool
    begin: int | None
    begins: bool
    end: int | None
    ends: frozenset[int]
    special: frozenset[int]
    template: str


class Text:
    """The tokenizer of one model. ``vocabulary``: how many tokens there are; ``begin``: the token
    (BOS) before each text, and ``begins`` whether it is added by default; ``end``: the one (EOS)
    behind it; ``ends``: tokens that end an answer; ``special``: tokens that are no text;
    ``template``: the chat template, or ""."""

    def __init__(self, tokenizer: Tokenizer, facts: Facts) -> None:
        self._tokenizer = tokenizer
        self._pieces = facts.pieces
        self._prefixed = facts.prefixed
        self._longest = max(map(len, facts.pieces), default=1)
        self._plain: Tokenizer | None = None
        self._lock = threading.Lock()
        self.vocabulary = len(facts.pieces)
        self.begin, self.begins = facts.begin, facts.begins
        self.end, self.ends, self.special = facts.end, facts.ends, facts.special
        self.template = facts.template
        given = (facts.begin, facts.end, *facts.ends, *facts.special)
        ids = [i for i in given if i is not None]
        for each in ids:
            if not 0 <= each < self.vocabulary:
                raise ModelError(
                    f"token {each} (BOS, EOS or special) is not from 0 to {self.vocabulary - 1}"
                )

    @classmethod
    def from_gguf(cls, keys: Mapping[str, Any]) -> Text:
        """By the keys of a GGUF file. Raises ModelError."""
        return _from_gguf(keys)

    @classmethod
    def from_folder(cls, folder: Path) -> Text:
        """By ``tokenizer.json`` and the files beside it. Raises ModelError."""
        return _from_folder(folder)

    def encode(
        self, text: str, special: bool, begin: bool | None = None, most: int | None = None
    ) -> list[int]:
        """The tokens of a text. ``special``: whether text such as ``<|im_start|>`` is the special
        token; ``begin``: whether BOS goes first (None: as the model has it).

        Raises TooLarge for more than ``most`` tokens. No token stands for more characters than
        the longest has bytes, times four for normalization; a text too long for that is refused
        unread. Surrogates without a partner are U+FFFD."""
        if most is not None and len(text) > most * self._longest * SHRINK:
            raise TooLarge(f"{len(text)} characters cannot be {most} tokens or fewer")
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokenizer = self._tokenizer if special else self._without_special()
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        begins = self.begins if begin is None else begin
        if begins and self.begin is not None and tokens[:1] != [self.begin]:
            tokens.insert(0, self.begin)  # unless a template has written it already
        if most is not None and len(tokens) > most:
            raise TooLarge(f"the text has {len(tokens)} tokens; at most {most} are allowed here")
        return tokens

    def decode(self, tokens: Iterable[int], continued: bool = False) -> str:
        """The text of tokens; special ones are left out. ``continued``: it goes on from a prompt,
        so a space that it begins with is part of it."""
        decoder = self.stream(continued)
        return "".join([decoder.feed(token) for token in tokens]) + decoder.finish()

    def stream(self, continued: bool = False) -> Decoder:
        """As ``decode``, token by token."""
        return Decoder(self, self._prefixed and not continued)

    def piece(self, token: int) -> bytes:
        """A token's own bytes; none if there is no such token."""
        return self._pieces[token] if 0 <= token < self.vocabulary else b""

    def differs(self, other: Text) -> str:
        """What makes the tokens of another tokenizer other tokens than these; "" if nothing."""
        if self.vocabulary != other.vocabulary:
            return f"it has {other.vocabulary} tokens, not {self.vocabulary}"
        for token, (own, theirs) in enumerate(zip(self._pieces, other._pieces, strict=True)):
            if own != theirs:
                return f"token {token} is {theirs[:32]!r} there, not {own[:32]!r}"
        return ""

    def _without_special(self) -> Tokenizer:
        with self._lock:
            if self._plain is None:
                self._plain = Tokenizer.from_str(self._tokenizer.to_str())
                self._plain.encode_special_tokens = True
            return self._plain


class Decoder:
    """Text as soon as it is certain: a character cut in two waits for its end."""

    def __init__(self, text: Text, prefixed: bool) -> None:
        self._text = text
        self._prefixed = prefixed
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """One more token; what is certain now."""
        piece = b"" if token in self._text.special else self._text.piece(token)
        if piece and self._prefixed:
            self._prefixed = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """There is no more: a character without its end is U+FFFD."""
        return self._utf8.decode(b"", final=True)


# --- GGUF -------------------------------------------------------------------------------------

T = TypeVar("T")


def _get(keys: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    found = keys.get(name, default)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        what = "is missing" if found is None else f"is a {type(found).__name__}"
        raise ModelError(f"{name} {what}; it must be a {kind.__name__}")
    return found


def _list(keys: Mapping[str, Any], name: str, kind: type[T], length: int | None = None) -> list[T]:
    found = _get(keys, name, list)
    if not all(isinstance(each, kind) for each in found):
        raise ModelError(f"{name}: each must be a {kind.__name__}")
    if length is not None and len(found) != length:
        raise ModelError(f"{name} has {len(found)} values; there are {length} tokens")
    return found


def _from_gguf(keys: Mapping[str, Any]) -> Text:
    kind = _get(keys, "tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"tokenizer.ggml.model is {kind!r}; known are 'gpt2' and 'llama'")
    tokens = _list(keys, "tokenizer.ggml.tokens", str)
    if not 0 < len(tokens) <= MOST_TOKENS or len(set(tokens)) < len(tokens):
        raise ModelError(
            f"tokenizer.ggml.tokens: {len(tokens)} tokens; they must be 1 to {MOST_TOKENS}, "
            "and each only once"
        )
    types = [1] * len(tokens)
    if "tokenizer.ggml.token_type" in keys:
        types = _list(keys, "tokenizer.ggml.token_type", int, len(tokens))
    bytewise = kind == "gpt2"
    if bytewise:
        cut = CUTS.get(name := _get(keys, "tokenizer.ggml.pre", str, "default"))
        if cut is None:
            raise ModelError(f"tokenizer.ggml.pre is {name!r}; known are {', '.join(CUTS)}")
        tokenizer = _byte_level(keys, tokens, cut)
        prefixed, begins = False, cut.begins
    else:
        prefixed = _get(keys, "tokenizer.ggml.add_space_prefix", bool, True)
        tokenizer = _sentencepiece(keys, tokens, prefixed)
        begins = True
    special = frozenset(i for i, of in enumerate(types) if of in (UNKNOWN, CONTROL))
    added = {i for i, of in enumerate(types) if of in (CONTROL, DEFINED)}
    tokenizer.add_special_tokens(_added(tokens, (i for i in sorted(added) if i in special)))
    tokenizer.add_tokens(_added(tokens, (i for i in sorted(added) if i not in special)))
    literal = added | special
    pieces = [_piece(token, bytewise, i in literal) for i, token in enumerate(tokens)]
    ends = {i for i in special if tokens[i] in ENDINGS}
    named = {
        which: _get(keys, name, int)
        for which in ("bos", "eos", "eot", "eom")
        if (name := f"tokenizer.ggml.{which}_token_id") in keys
    }
    begin, end = named.pop("bos", None), named.get("eos")
    ends.update(named.values())
    begins = _get(keys, "tokenizer.ggml.add_bos_token", bool, begins)
    template = _get(keys, "tokenizer.chat_template", str, "")
    return Text(
        tokenizer, Facts(pieces, prefixed, begin, begins, end, frozenset(ends), special, template)
    )


def _added(tokens: list[str], ids: Iterable[int]) -> list[AddedToken]:
    return [AddedToken(tokens[i], normalized=False) for i in ids if tokens[i]]


def _byte_level(keys: Mapping[str, Any], tokens: list[str], cut: Cut) -> Tokenizer:
    merges = []
    for merge in _list(keys, "tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    tokenizer = _bpe(tokens, merges, ignore_merges=cut.whole)
    if cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(keys: Mapping[str, Any], tokens: list[str], prefixed: bool) -> Tokenizer:
    """SentencePiece joins what makes the token with the best score; so each way to cut a token in
    two is a merge, and the best token's come first."""
    scores = _list(keys, "tokenizer.ggml.scores", float, len(tokens))
    known = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in sorted(tokens, key=lambda token: -scores[known[token]]):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in known and right in known]
        merges += sorted(cuts, key=lambda cut: (known[cut[0]], known[cut[1]]))
    unknown = keys.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ModelError(f"tokenizer.ggml.unknown_token_id {unknown!r} is no token")
    tokenizer = _bpe(tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=tokens[unknown])
    steps: list[Any] = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    return tokenizer


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:
        raise ModelError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (Radford et al., 2019): itself if
    it is visible, else the next one from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES: Final = _alphabet()
_FALLBACK: Final = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def _piece(token: str, bytewise: bool, literal: bool) -> bytes:
    if not literal and bytewise and all(char in _BYTES for char in token):
        return bytes(_BYTES[char] for char in token)
    if not literal and not bytewise:
        return _FALLBACK.get(token) or token.replace("▁", " ").encode()
    return token.encode("utf-8", "replace")


# --- tokenizer.json ---------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON; empty if there is none."""
    return read_json(path) if path.exists() else {}


def _from_folder(folder: Path) -> Text:
    described = read_json(folder / "tokenizer.json")
    config = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    generation = _read(folder / "generation_config.json")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(described))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        known = tokenizer.get_vocab()
        added = tokenizer.get_added_tokens_decoder()
        first = tokenizer.encode("", add_special_tokens=True).ids
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"tokenizer.json is not understood: {error}") from error
    size = max(known.values(), default=-1) + 1
    if not 0 < size <= MOST_TOKENS:
        raise ModelError(f"tokenizer.json has {size} tokens; they must be 1 to {MOST_TOKENS}")
    parts = json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
    model = described["model"]
    bytewise = '"ByteLevel"' in parts
    if not bytewise and not model.get("byte_fallback"):
        raise ModelError(
            f"tokenizer.json: model {model.get('type')} is neither byte-level nor has byte_fallback"
        )
    pieces = [b""] * size
    for token, i in known.items():
        pieces[i] = _piece(token, bytewise, i in added)
    special = frozenset(i for i, token in added.items() if token.special)
    begin, end = (_named(config, name, known) for name in ("bos_token", "eos_token"))
    ends = _ends(end, generation)
    begins = config.get("add_bos_token")
    if not isinstance(begins, bool):
        begins = begin is not None and first[:1] == [begin]
    prefixed = not bytewise and ('"Strip"' in parts or '"Metaspace"' in parts)
    prefixed = prefixed and '"prepend_scheme": "never"' not in parts
    template = _template(folder, config)
    return Text(
        tokenizer, Facts(pieces, prefixed, begin, begins, end, frozenset(ends), special, template)
    )


def _ends(end: int | None, generation: Mapping[str, Any]) -> set[int]:
    """EOS, and what else ends an answer."""
    ends = set() if end is None else {end}
    more = generation.get("eos_token_id")
    more = more if isinstance(more, list) else [] if more is None else [more]
    for each in more:
        if not isinstance(each, int) or isinstance(each, bool):
            raise ModelError(f"generation_config.json: eos_token_id {each!r} is no whole number")
        ends.add(each)
    return ends


def _named(config: Mapping[str, Any], name: str, known: Mapping[str, int]) -> int | None:
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    if not isinstance(token, str) or token not in known:
        raise ModelError(f"tokenizer_config.json: {name} {token!r} is not in the vocabulary")
    return known[token]


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.name} cannot be read: {error}") from error
    found = config.get("chat_template", "")
    if isinstance(found, list):
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get("default", "")
    if not isinstance(found, str):
        raise ModelError("tokenizer_config.json: chat_template must be text, or a list of named")
    return found
