"""Which function simulates which claim. A claim that is not listed here is not checkable, and its record says why."""

from __future__ import annotations

from transload.study.claims.setting import Setting

SETTINGS: dict[str, Setting] = {}
