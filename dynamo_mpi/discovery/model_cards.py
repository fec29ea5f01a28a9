# SPDX-License-Identifier: Apache-2.0
"""Model cards in etcd: what Dynamo's frontends know of a model, written by each of its workers.

A frontend takes one worker's card for all workers of a model's name in a namespace. Where another's differs, Dynamo 1.4 logs a checksum error
and sends it requests that were made by the first one's template and limits all the same; 1.6 never sends it any.
"""

from __future__ import annotations

import json

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple
from dynamo_mpi.layout.format import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.discovery.etcd import KeyValue

_ROOT = "v1/mdc/"
_ALGORITHM = "blake3:"
# a worker's card names it if it is there
_TEMPLATE = "chat_template.jinja"
_SHOWN = 20
_MAX_BYTES = 1 << 28


class CardFile(NamedTuple):
    """A file of the model.

    Args:
        size: in bytes; None if it isn't known.
        checksum: ``blake3:`` and hexadecimal digits; empty if it isn't known.
    """

    size: int | None
    checksum: str


@dataclass(frozen=True)
class ModelCard:
    """What counts of a card: the rest differs between equal workers, or frontends don't care.

    Args:
        model: the name that clients ask for.
        worker: ``COMPONENT/INSTANCE`` of the worker; empty before it is registered.
        kind: ``aggregated``, ``prefill`` or ``decode``: frontends compare cards of one kind.
        files: the model's files, by name.
        context_length: tokens of a request; None if it isn't known.
        kv_block_size: tokens of a KV block; None if it isn't known.
        model_context: the model's own context; None if it isn't known.
    """

    model: str
    worker: str
    kind: str
    files: Mapping[str, CardFile]
    context_length: int | None = None
    kv_block_size: int | None = None
    model_context: int | None = None


def cards_of(namespace: str) -> str:
    """Return the prefix of the cards of a namespace; of all namespaces without one."""
    return f"{_ROOT}{namespace}/" if namespace else _ROOT


def read_cards(entries: Iterable[KeyValue]) -> list[tuple[str, ModelCard]]:
    """Return the cards and their namespaces, oldest first; what can't be read, or belongs to an adapter, is left out."""
    found = []
    for entry in sorted(entries, key=lambda entry: entry.create_revision):
        words = entry.key.split("/")
        # …/NAMESPACE/COMPONENT/ENDPOINT/INSTANCE; LoRA adapters have a word more
        if len(words) != len(_ROOT.split("/")) + 3:
            continue
        namespace, component, _, instance = words[-4:]
        try:
            content = json.loads(entry.value)["card_json"]
            card = _card(content, sanitize(f"{component}/{instance}"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        found.append((namespace, card))
    return found


def _card(content: Mapping[str, Any], worker: str) -> ModelCard:
    if not isinstance(name := content["display_name"], str):
        raise TypeError("no name")
    # cards of earlier releases have no type of worker
    kind = content.get("worker_type") or ("prefill" if "Prefill" in str(content.get("model_type")) else "aggregated")
    numbers = (
        content.get(name) for name in ("context_length", "kv_cache_block_size", "architectural_max_context_length")
    )
    return ModelCard(
        name,
        worker,
        str(kind).lower(),
        dict(_files(content)),
        *(each if type(each) is int else None for each in numbers),
    )


def _files(content: object) -> Iterator[tuple[str, CardFile]]:
    """Find the files in a card: they are objects with a path, which may be a URL, and a checksum."""
    if not isinstance(content, dict):
        return
    if isinstance(path := content.get("path"), str) and isinstance(checksum := content.get("checksum"), str):
        size = content.get("size")
        yield path.rstrip("/").rpartition("/")[2], CardFile(size if type(size) is int else None, checksum)
        return
    for value in content.values():
        yield from _files(value)


@dataclass(frozen=True)
class PlannedCard:
    """The card that a worker will have, as far as it is known before the load.

    Args:
        model: the name that clients ask for.
        kind: as in `ModelCard`.
        folder: the model folder.
        template: a chat template that replaces the folder's; None for none.
        context_length: tokens of a request; None for the model's own context.
        kv_block_size: tokens of a KV block; None if it isn't known.
    """

    model: str
    kind: str
    folder: Path
    template: Path | None = None
    context_length: int | None = None
    kv_block_size: int | None = None

    def beside(self, other: ModelCard) -> ModelCard:
        """Return this card with the files that ``other`` names, and the chat template."""
        template = self.template or self.folder / _TEMPLATE
        paths = {name: self.folder / name for name in other.files} | {template.name: template}
        files = {name: file for name, path in paths.items() if (file := _read(path)) is not None}
        return ModelCard(
            self.model,
            "",
            self.kind,
            files,
            self.context_length or other.model_context,
            self.kv_block_size,
        )

    def unlike(self, others: Iterable[ModelCard]) -> list[tuple[ModelCard, list[str]]]:
        """Return the cards of the same model and kind that differ from this one, and in what."""
        # first, as the model's files are read for each that is left
        alike = [card for card in others if (card.model, card.kind) == (self.model, self.kind)]
        return [each for card in alike for each in unlike(self.beside(card), (card,))]


def _read(path: Path) -> CardFile | None:
    try:
        size = path.stat().st_size
        # a card that names the weights isn't Dynamo's
        return CardFile(size, _checksum(path.read_bytes()) if size <= _MAX_BYTES else "")
    except OSError:
        return None


def _checksum(data: bytes) -> str:
    try:
        from blake3 import blake3
    except ImportError:  # sizes are compared alone
        return ""
    return _ALGORITHM + str(blake3(data).hexdigest())


def differences(own: ModelCard, other: ModelCard, here: str = "here", there: str = "there") -> list[str]:
    """Return in what two cards of a model differ, with both values.

    Args:
        own: a worker's.
        other: another worker's; both are of one kind.
        here: follows a value of the first.
        there: follows a value of the other.
    """
    lines = []
    for name in sorted({*own.files, *other.files}):
        file, others = own.files.get(name), other.files.get(name)
        if file is None or others is None or not _is_same(file, others):
            lines.append(f"{name} {_shown(file)} {here}, {_shown(others)} {there}")
    for label, mine, theirs in (
        ("context length", own.context_length, other.context_length),
        ("KV block size", own.kv_block_size, other.kv_block_size),
    ):
        if mine is not None and theirs is not None and mine != theirs:
            lines.append(f"{label} {mine} {here}, {theirs} {there}")
    return lines


def _is_same(one: CardFile, other: CardFile) -> bool:
    if one.size is not None and other.size is not None and one.size != other.size:
        return False
    both = one.checksum, other.checksum
    return one.checksum == other.checksum or not all(text.startswith(_ALGORITHM) for text in both)


def _shown(file: CardFile | None) -> str:
    if file is None:
        return "missing"
    digest = file.checksum.removeprefix(_ALGORITHM)[:8]
    return " ".join(filter(None, (digest, "" if file.size is None else f"({file.size} bytes)"))) or "another one"


def unlike(own: ModelCard, others: Iterable[ModelCard]) -> list[tuple[ModelCard, list[str]]]:
    """Return the cards of the same model and kind that differ from ``own``, and in what."""
    alike = [card for card in others if (card.model, card.kind) == (own.model, own.kind)]
    pairs = [(card, differences(own, card)) for card in alike if card.worker != own.worker]
    return [(card, found) for card, found in pairs if found]


def describe_unlike(model: str, found: Sequence[tuple[ModelCard, list[str]]]) -> str:
    """Describe the result of `unlike`: "here" is this worker, "there" each of the others."""
    lines = [f"    {card.worker}: {sanitize('; '.join(what))}" for card, what in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"    and {counted(len(found) - _SHOWN, 'other')}")
    return "\n".join(
        [f"the model card of {sanitize(model)} differs from that of workers that serve it already:", *lines]
    )


class UnlikeModel(NamedTuple):
    """A model of which frontends don't know all workers right.

    Args:
        namespace: Dynamo's.
        model: the name that clients ask for.
        kind: as in `ModelCard`.
        text: in what the workers' cards differ.
    """

    namespace: str
    model: str
    kind: str
    text: str


def unlike_models(cards: Iterable[tuple[str, ModelCard]]) -> list[UnlikeModel]:
    """Return the models of each namespace whose workers' cards differ."""
    groups: dict[tuple[str, str, str], list[ModelCard]] = {}
    for namespace, card in cards:
        groups.setdefault((namespace, card.model, card.kind), []).append(card)
    models = []
    for (namespace, model, kind), group in groups.items():
        first = group[0]
        if found := unlike(first, group[1:]):
            other = found[0][0]
            what = differences(first, other, f"at {first.worker}", f"at {other.worker}")
            more = f"; {counted(len(found) - 1, 'more card')} unlike the first" if len(found) > 1 else ""
            text = (
                f"the cards of {sanitize(model)} in {sanitize(namespace)} differ, and frontends take one for all: "
                f"{sanitize('; '.join(what))}{more}"
            )
            models.append(UnlikeModel(namespace, model, kind, text))
    return models
