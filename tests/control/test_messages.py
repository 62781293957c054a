"""Every message survives the way over a socket."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transload.control import messages
from transload.control.messages import (
    Assignment,
    ControllerEvent,
    EngineEvent,
    EngineReport,
    Frame,
    KvData,
    Message,
    PeerFrame,
    TransferId,
    WorkerId,
)

KINDS = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
]


def some(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if hasattr(kind, "__supertype__"):
        return some(kind.__supertype__)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return instances(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of([some(part) for part in parts])
    if origin is tuple:
        if len(parts) == 2 and parts[1] is ...:
            return st.lists(some(parts[0]), max_size=3).map(tuple)
        return st.tuples(*(some(part) for part in parts))
    if origin is not None and str(origin).endswith("Literal"):
        return st.sampled_from(parts)
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=8),
        bytes: st.binary(max_size=16),
        bool: st.booleans(),
        type(None): st.none(),
    }[kind]


def instances(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{field.name: some(field.type) for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_message_comes_out_as_it_went_in(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(instances(kind))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind) == message


@pytest.mark.parametrize("union", [EngineEvent, EngineReport, ControllerEvent, Assignment, Frame])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_members_of_a_union_are_told_apart(union: Any, data: st.DataObject) -> None:
    message = data.draw(st.one_of([instances(kind) for kind in get_args(union)]))
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union)
    assert (type(decoded), decoded) == (type(message), message)


def test_a_frame_keeps_its_kind_inside_another_message() -> None:
    frame = KvData(TransferId(2**63 - 1), 1, 2, 0, 4, 3, 5, 8192, 2**64 - 1)
    event = PeerFrame(WorkerId("p0"), frame, 2**64 - 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=PeerFrame) == event


def test_what_is_sent_cannot_be_changed() -> None:
    frame = KvData(TransferId(1), 1, 2, 0, 4, 3, 5, 8192)
    with pytest.raises(AttributeError):
        frame.epoch = 2  # type: ignore[misc]
