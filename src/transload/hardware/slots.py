"""Numbers by path: `memory.hbm.bandwidth` of a chip, `latency` of a link. Finds, lists, refuses and assumes them.

A slot is a field that may hold a number. A slot that is empty is unknown, and asking for it is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

import msgspec

from transload.errors import DeploymentError
from transload.hardware.nearest import did_you_mean
from transload.hardware.quantity import Assumption, Figure, Quantity, Slug, Text, Unknown, parse_amount

ANY_UNIT = ""


class Slots(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of slots. Units are checked when it is made."""

    def __post_init__(self) -> None:
        units = self.slot_units()
        for name, unit in units.items():
            quantity = getattr(self, name)
            if quantity is not None and quantity.unit != unit:
                raise ValueError(f"{name} is in {quantity.unit}, wanted {unit}")

    @classmethod
    def slot_units(cls) -> dict[str, str]:
        """Names of the slots of this group and the base unit of each."""
        return {}

    @property
    def key(self) -> str:
        """The name of this group where several stand in a list."""
        raise AssertionError(f"{type(self).__name__} stands in no list")


class Described(Slots, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chips and links have in common: a name, and numbers of which some are unknown."""

    id: Slug
    name: Text
    aliases: tuple[Slug, ...] = ()
    status: str = ""
    unknown: tuple[Unknown, ...] = ()
    notes: tuple[Text, ...] = ()

    def quantities(self) -> Iterator[tuple[str, Quantity]]:
        """Every known number with its path, in the order of the file."""
        for path, quantity, _ in _walk(self, ""):
            if quantity is not None:
                yield path, quantity

    def missing(self) -> list[str]:
        """Paths of the slots that are empty."""
        return [path for path, quantity, _ in _walk(self, "") if quantity is None]

    def get(self, path: str) -> Quantity | None:
        """The number, or None if it is unknown. Raises `DeploymentError` if there is no such slot."""
        found = {slot: quantity for slot, quantity, _ in _walk(self, "")}
        if path not in found:
            known = list(found)
            raise DeploymentError(
                f"{self.id}: it has no quantity {path}{did_you_mean(path, known)}; there are: {', '.join(known)}"
            )
        return found[path]

    def need(self, path: str) -> Quantity:
        """The number. Raises `DeploymentError` if it is unknown, saying why and how to assume one."""
        quantity = self.get(path)
        if quantity is not None:
            return quantity
        why = [entry.why for entry in self.unknown if path == entry.quantity or path.startswith(f"{entry.quantity}.")]
        unit = next(unit for slot, _, unit in _walk(self, "") if slot == path)
        raise DeploymentError(
            f"{self.id}: {path} is unknown{': ' + ' '.join(why) if why else ''}. To go on with a value of your own: "
            f'--assume "{self.id}.{path}=NUMBER {unit}" (it is printed with the result), or put it into a file of '
            "your own and name that file instead"
        )

    def assuming(self, assumptions: Iterable[Assumption]) -> Self:
        """With the user's numbers in place, each of class `assumption`. Those about others are left alone.

        Raises `DeploymentError` for a slot that does not exist or a number in the wrong unit.
        """
        result = self
        for assumption in assumptions:
            if assumption.subject == self.id or assumption.subject in self.aliases:
                result = result._assume(assumption)
        return result

    def assumptions(self) -> list[Assumption]:
        """What the user assumed, to be listed with every result."""
        return [
            Assumption(subject=self.id, quantity=path, value=quantity.value, unit=quantity.unit)
            for path, quantity in self.quantities()
            if quantity.kind == "assumption"
        ]

    def _assume(self, assumption: Assumption) -> Self:
        path = assumption.quantity
        slots = {slot: (quantity, unit) for slot, quantity, unit in _walk(self, "")}
        if path not in slots:
            raise DeploymentError(
                f"--assume {assumption}: {self.id} has no quantity {path}{did_you_mean(path, list(slots))}; "
                f"there are: {', '.join(slots)}"
            )
        known, unit = slots[path]
        if assumption.unit not in (None, unit):
            raise DeploymentError(f"--assume {assumption}: that is in {assumption.unit}; {path} is in {unit}")
        note = "" if known is None else f"instead of the catalog's {known} ({known.kind})"
        assumed = Quantity(
            value=assumption.value, unit=unit, source="assumed by the user", kind="assumption", note=note
        )
        changed: Self = _put(self, path.split("."), assumed)
        return changed


Thing = TypeVar("Thing", bound=Described)


def parse_assumption(text: str) -> Assumption:
    """`rubin_cpx.dense_flops.fp4=20 PFLOP/s`. Raises `DeploymentError`."""
    target, equals, amount = text.partition("=")
    subject, dot, quantity = target.strip().partition(".")
    if not (equals and dot and subject and quantity):
        raise DeploymentError(
            f'--assume {text}: wanted ID.QUANTITY=VALUE, such as "rubin_cpx.dense_flops.fp4=20 PFLOP/s"'
        )
    try:
        value, unit = parse_amount(amount)
    except ValueError as error:
        raise DeploymentError(f"--assume {text}: {error}") from None
    if value < 0:
        raise DeploymentError(f"--assume {text}: wanted a number that is not below 0")
    return Assumption(subject=subject, quantity=quantity, value=value, unit=unit)


def with_assumptions(described: Iterable[Thing], texts: Iterable[str]) -> list[Thing]:
    """Chips or links with the numbers of `--assume` in place.

    Raises `DeploymentError` for text that is no assumption and for one about something that is not among them: it
    would change nothing.
    """
    assumptions = [parse_assumption(text) for text in texts]
    things = list(described)
    known = [name for thing in things for name in (thing.id, *thing.aliases)]
    for assumption in assumptions:
        if assumption.subject not in known:
            raise DeploymentError(
                f"--assume {assumption}: nothing here is called {assumption.subject}"
                f"{did_you_mean(assumption.subject, known)}"
            )
    return [thing.assuming(assumptions) for thing in things]


def _walk(part: Slots, prefix: str) -> Iterator[tuple[str, Quantity | None, str]]:
    """Every slot below `part`: path, number or None, base unit."""
    units = part.slot_units()
    for name in part.__struct_fields__:
        value = getattr(part, name)
        path = f"{prefix}{name}"
        if name in units:
            yield path, value, units[name]
        elif isinstance(value, Slots):
            yield from _walk(value, f"{path}.")
        elif isinstance(value, tuple):
            for entry in value:
                if isinstance(entry, Figure):
                    yield f"{path}.{entry.name}", entry, entry.unit
                elif isinstance(entry, Slots):
                    yield from _walk(entry, f"{path}.{entry.key}.")


def _put(part: Any, steps: list[str], quantity: Quantity) -> Any:
    """A copy in which the slot at `steps` holds the number. The path is known to exist."""
    name = steps[0]
    if len(steps) == 1:
        return msgspec.structs.replace(part, **{name: quantity})
    value = getattr(part, name)
    if isinstance(value, Slots):
        return msgspec.structs.replace(part, **{name: _put(value, steps[1:], quantity)})
    entries = []
    for entry in value:
        if isinstance(entry, Figure) and entry.name == ".".join(steps[1:]):
            entry = msgspec.structs.replace(
                entry, value=quantity.value, source=quantity.source, kind=quantity.kind, note=quantity.note
            )
        elif isinstance(entry, Slots) and entry.key == steps[1]:
            entry = _put(entry, steps[2:], quantity)
        entries.append(entry)
    return msgspec.structs.replace(part, **{name: tuple(entries)})
