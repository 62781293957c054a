"""What a virtual cluster is told of each of its workers. Data only."""

from __future__ import annotations

import msgspec

from transload.control.engine_config import EngineConfig
from transload.control.messages import Role


class VirtualWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker to be simulated."""

    engine: EngineConfig
    pool: str
    role: Role
    layers_per_frame: int
    one_sided: bool = True
    """Whether its links write straight into the peer's memory, as shared memory does."""
    in_place: bool = False
    """Whether its steps can work in the blocks of peers that can work in its own: then nothing crosses. One-sided."""
    most_windows: int | None = None
    """How many links it has addresses for to do so; after that cells are copied. None: enough."""
