# SPDX-License-Identifier: Apache-2.0
"""Redacts secrets from logs and reports, and keeps what an operator needs.

Two sources: text that looks like a secret (`redact`), and values of environment variables whose names suggest a secret (`Redactor.of`).
Every pattern is bounded or can't start twice at the same characters, so the time is linear in the text's length.
"""

from __future__ import annotations

import functools
import os
import re

from dynamo_mpi.common.credentials import held
from dynamo_mpi.common.failure import in_short
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

MASK = "<redacted>"


class _Pattern:
    """A pattern that is compiled when it is first needed: few lines hold a word that it needs.

    Args:
        text: the regular expression.
        flags: its flags.
        words: one of them is in every text that it matches, in small letters; none for a pattern without such words.
    """

    def __init__(self, text: str, flags: int = 0, words: tuple[str, ...] = ()) -> None:
        self._text, self._flags, self._words = text, flags, words

    @functools.cached_property
    def compiled(self) -> re.Pattern[str]:
        """The compiled pattern."""
        return re.compile(self._text, self._flags)

    def sub(self, replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
        """Replace all matches in ``text``."""
        return self.compiled.sub(replacement, text) if self.may_match(text) else text

    def may_match(self, text: str) -> bool:
        """Return whether ``text`` holds one of the words."""
        # a pattern that ignores case also takes some other characters for letters, such as the Kelvin sign
        return not self._words or not text.isascii() or any(map(text.lower().__contains__, self._words))


_LEAST_ANYWHERE = 6  # a shorter value may be part of a word
_LEAST = 3

_PEM = r"(?:[A-Z0-9 ]{0,40}PRIVATE KEY|NATS USER JWT|USER NKEY SEED)"
_PEM_BLOCK = _Pattern(rf"-{{5,6}}BEGIN {_PEM}-{{5,6}}.*?(?:-{{5,6}}END {_PEM}-{{5,6}}|\Z)", re.DOTALL)
_PEM_END = _Pattern(rf"-{{5,6}}END {_PEM}-{{5,6}}")
_PEM_LINE = _Pattern(r"[\w+/=-]{16,}")

_KEY = r"(?:api|access|private|hmac|signing|encryption|auth|account|session|shared|master)[_-]?key"
_NAME = rf"pass(?:word|wd|phrase)|secret(?:[_-]?(?:access[_-]?)?key)?|{_KEY}|token|credentials?"
_WORDS = ("pass", "secret", "key", "token", "credential")
_SUFFIX = r"(?:[_-]?(?:base64|b64|hex|value|[0-9]{1,2}))?"
_VALUE = (
    r"(?:Some\()?"
    r"(?:(?P<quote>\\{0,4}[\"'])(?P<quoted>(?:(?!(?P=quote))(?:\\.|[^\n]))*)|(?P<bare>[^\s\"'&]*[^\s\"'&,;)\]}\\]))"
)
_NAMED = _Pattern(
    rf"(?P<name>{_NAME}){_SUFFIX}(?P<equals>\\{{0,4}}[\"']?[ \t]{{0,4}}(?:=>|:=|==?|:)[ \t]{{0,4}}){_VALUE}",
    re.IGNORECASE,
    _WORDS,
)
_OPTION = _Pattern(
    rf"(?<!-)--[a-z0-9_.-]{{0,40}}(?P<name>{_NAME})(?P<equals>\\{{0,4}}[\"'],[ \t]{{0,4}}|[ \t]{{1,4}}){_VALUE}",
    re.IGNORECASE,
    _WORDS,
)
# harmless values of such names
NO_SECRET = _Pattern(
    "none|null|nil|true|false|yes|no|auto|required|optional|missing|unset|empty|some|<unset>|<none>", re.IGNORECASE
)
# words that follow a flag in prose
_PROSE = _Pattern("a|and|are|as|by|for|from|has|in|is|may|must|needs|of|on|or|that|the|to|was|with")
_NUMBER = _Pattern(r"[-+~]?[0-9][0-9.,_]*(?:e[-+]?[0-9]+)?(?:/?[a-z%]{1,4})?", re.IGNORECASE)
_PATH = _Pattern(r"[~.]{0,2}/[^\s:=]*")
# tokens of a vocabulary and counters of an engine are not credentials
_OF_TEXT = _Pattern(
    r"(?<![A-Za-z])(?:(?:eos|bos|pad|unk|cls|sep|mask|image|video|audio|special|stop|draft|end|start|think|bad|max|min|num|output|input"
    r"|prompt|first|last|next|per)[_.-]{1,2}|(?:first|last|next|per|each|unexpected) )\Z",
    re.IGNORECASE,
)
_LEAST_TOKEN = 8

_HEADER = _Pattern(
    r"(?P<kept>\b(?:proxy-)?authorization[\"']?[ \t]{0,4}[:=][ \t]{0,4}[\"']?(?:(?:bearer|basic|token|digest)[ \t]{1,4})?)"
    r"(?P<value>[^\s\"']+)",
    re.IGNORECASE,
    ("authorization",),
)
_SCHEME = _Pattern(
    r"(?P<kept>\b(?:bearer|basic)[ \t]{1,4})(?![A-Z]?[a-z]+(?![\w+/=]))(?P<value>[\w.~+/=-]{6,})",
    re.IGNORECASE,
    ("bearer", "basic"),
)
# a port is not a password
_URL = _Pattern(
    r"(?<=://)(?:[^\s/?#\"'@:]{0,256}:(?!\d{1,5}[/?#])[^\s\"'@]{0,1024}|[^\s/?#\"'@]{1,1024})(?:@[^\s/?#\"'@]{0,256})*@",
    words=("://",),
)

_LOOKS = _Pattern(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|npm_[A-Za-z0-9]{30,}|dckr_pat_[\w-]{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|nvapi-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|S[ANOUCX][A-Z2-7]{56}(?![A-Za-z0-9]))"
    r"|(?<![\w-])(?:"
    r"eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{30,})",
    words=(
        *(
            "hf_",
            "npm_",
            "dckr_pat_",
            "k_live_",
            "k_test_",
            "nvapi-",
            "akia",
            "asia",
            "ghp_",
            "gho_",
            "ghu_",
            "ghs_",
            "ghr_",
        ),
        *("sa", "sn", "so", "su", "sc", "sx", "eyj", "github_pat_", "glpat-", "sk-", "xox", "aiza"),
    ),
)

_SECRET_VARIABLE = _Pattern(
    rf"(?:{_NAME}|_key|nkey|jwt|(?<!\A)(?<!\Aold)pwd){_SUFFIX}\Z",
    re.IGNORECASE,
    (*_WORDS, "jwt", "pwd"),
)
_USERINFO = _Pattern(r"://(?P<user>[^\s/?#:@]{0,256}):(?P<password>[^\s@]{1,1024})@", words=("://",))


def redact(text: str) -> str:
    """Redact what looks like a secret: named values, headers, keys by their form, private keys, credentials in URLs.

    Pure and idempotent.
    """
    return _until_stable(text, None)


class Redactor:
    """Redacts what looks like a secret, and known secret values.

    Args:
        values: the secrets; one of less than six characters is redacted only as a separate word, one of less than three never.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        spellings = {spelling for value in values for spelling in _spellings(value) if len(spelling) >= _LEAST}
        # longer ones first: a secret may be a prefix of another
        parts = [
            re.escape(value) if len(value) >= _LEAST_ANYWHERE else rf"(?<!\w){re.escape(value)}(?!\w)"
            for value in sorted(spellings, key=lambda value: (-len(value), value))
        ]
        self._values = re.compile("|".join(parts)) if parts else None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Redactor:
        """Create one for the secrets of an environment: values of variables with secret names, and passwords in URLs."""
        return cls(secret_values(environ))

    def redact(self, text: str) -> str:
        """Redact a text. Idempotent."""
        return _until_stable(text, self._values)


def process_redactor() -> Redactor:
    """Return the redactor for this process's environment at the time of the first call, and for the secrets that it holds besides."""
    return _redactor(tuple(held().items()))


@functools.lru_cache(maxsize=1)
def _redactor(secrets: tuple[tuple[str, str], ...]) -> Redactor:
    return Redactor.of({**os.environ, **dict(secrets)})


def secret_values(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the secrets of an environment."""
    for name, value in environ.items():
        if _USERINFO.may_match(value):
            yield from (found["password"] for found in _USERINFO.compiled.finditer(value))
        secret = _SECRET_VARIABLE.may_match(name) and _SECRET_VARIABLE.compiled.search(name)
        if secret and not NO_SECRET.compiled.fullmatch(value) and not _OF_TEXT.compiled.search(name[: secret.start()]):
            may_be_path = not secret[0].lower().startswith(("pass", "secret"))
            if not (may_be_path and _PATH.compiled.fullmatch(value)):
                yield value


def _spellings(value: str) -> Iterator[str]:
    """Yield a secret's forms in texts, in JSON and in URLs."""
    value = value.strip()
    yield value
    yield value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    yield "".join(
        c if c.isalnum() or c in "-._~" else "".join(f"%{b:02X}" for b in c.encode("utf-8", "replace")) for c in value
    )
    if "\n" in value:
        yield from (line.strip() for line in value.splitlines() if len(line.strip()) >= _LEAST_ANYWHERE)


def _until_stable(text: str, values: re.Pattern[str] | None) -> str:
    # the result of a round may look like a secret again; each round leaves less unmasked text
    while (after := _round(text, values)) != text:
        text = after
    return text


def _round(text: str, values: re.Pattern[str] | None) -> str:
    if values is not None:
        # a secret may be part of the mask
        text = MASK.join(values.sub(MASK, piece) for piece in text.split(MASK))
    if "----" in text:
        text = _without_tails(_PEM_BLOCK.sub(MASK, text))
    text = _LOOKS.sub(MASK, text)
    text = _URL.sub(f"{MASK}@", text)
    text = _HEADER.sub(_keep, text)
    text = _SCHEME.sub(_keep, text)
    text = _OPTION.sub(functools.partial(_without_value, in_prose=True), text)
    return _NAMED.sub(_without_value, text)


def _keep(found: re.Match[str]) -> str:
    return found["kept"] + MASK


def _without_value(found: re.Match[str], *, in_prose: bool = False) -> str:
    group = "bare" if found["quoted"] is None else "quoted"
    value = found[group]
    if _is_harmless(found["name"].lower(), value, in_prose, found):
        return found[0]
    start = found.start(group) - found.start()
    return found[0][:start] + MASK + found[0][start + len(value) :]


def _is_harmless(name: str, value: str, in_prose: bool, found: re.Match[str]) -> bool:
    """Return whether the value after a secret's name is harmless."""
    plain = value.strip(" \t\\.,;:()[]{}").lower()
    if (
        not plain
        or NO_SECRET.compiled.fullmatch(plain)
        or (in_prose and (_PROSE.compiled.fullmatch(plain) or value.startswith("--")))
    ):
        return True
    is_bare_text = found["quoted"] is None and ":" in found["equals"]
    if name == "token":
        before = found.string[max(0, found.start("name") - 14) : found.start("name")]
        short = is_bare_text and len(plain) < _LEAST_TOKEN
        return short or _OF_TEXT.compiled.search(before) is not None or _NUMBER.compiled.fullmatch(plain) is not None
    if name.startswith("credential"):
        # after "without credentials:" comes prose
        return is_bare_text or _PATH.compiled.fullmatch(value) is not None
    return name.startswith("private") and _PATH.compiled.fullmatch(value) is not None


def _without_tails(text: str) -> str:
    """Redact private keys without their first line: often only the last lines of a program's output are kept."""
    if not _PEM_END.compiled.search(text):
        return text
    kept: list[str] = []
    for line in text.splitlines(keepends=True):
        *_, end = [0, *(found.end() for found in _PEM_END.compiled.finditer(line))]
        if not end:
            kept.append(line)
            continue
        while kept and _PEM_LINE.compiled.fullmatch(kept[-1].strip().removesuffix("\\n")):
            kept.pop()
        kept.append(MASK + line[end:])
    return "".join(kept)


def safe_first_line(text: str) -> str:
    """Return an error as one line that is safe to publish."""
    return process_redactor().redact(in_short(text))
