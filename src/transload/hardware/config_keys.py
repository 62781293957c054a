"""Typed access to the keys of a config file. Every complaint names file, key, what it got and what it wanted."""

from __future__ import annotations

from typing import Any

from transload.errors import DeploymentError

LARGEST = 1 << 24
"""No dimension of a model is larger; it keeps a damaged file from becoming a number to believe."""


class Keys:
    """The keys of one file. Several names of one thing are tried in order."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def size(self, *names: str, limit: int = LARGEST) -> int:
        """A dimension from 1 to `limit`. Raises `DeploymentError`."""
        found = self.optional_size(*names, limit=limit)
        if found is None:
            other = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            raise DeploymentError(f"{self.where}: {names[0]}{other} is missing; wanted a whole number")
        return found

    def optional_size(self, *names: str, smallest: int = 1, limit: int = LARGEST) -> int | None:
        """The same, or None where no such key has a value."""
        for name in names:
            value = self.values.get(name)
            if value is None or (value == 0 and smallest == 1):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= limit:
                raise DeploymentError(
                    f"{self.where}: {name} is {value!r}, wanted a whole number from {smallest} to {limit}"
                )
            return value
        return None

    def flag(self, name: str, default: bool) -> bool:
        """True or false; a missing key or null means the default. Raises `DeploymentError`."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise DeploymentError(f"{self.where}: {name} is {value!r}, wanted true or false")
        return value
