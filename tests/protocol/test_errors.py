"""Errors: every class renders, travels, and comes back as itself."""

from __future__ import annotations

import string

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import (
    MESSAGE_CHARS_MAX,
    BadRequest,
    DiskError,
    ReplicaDamaged,
    StaleEpoch,
    StorageError,
    all_error_classes,
    from_wire,
)

CLASSES = [StorageError, *all_error_classes().values()]


def fields_of(cls: type[StorageError]) -> dict[str, str]:
    return {name: f"<{name}>" for _, name, _, _ in string.Formatter().parse(cls.template()) if name}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_a_message_is_the_first_paragraph_filled_with_the_fields(cls: type[StorageError]) -> None:
    error = cls(**fields_of(cls))
    message = str(error)
    assert message
    assert "{" not in message and "\n" not in message and "  " not in message
    for value in fields_of(cls).values():
        assert value in message


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_an_error_with_missing_fields_still_renders(cls: type[StorageError]) -> None:
    assert str(cls())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_an_error_travels_and_comes_back_as_itself(cls: type[StorageError]) -> None:
    error = cls(**fields_of(cls))
    back = from_wire(msgpack.unpackb(msgpack.packb(error.to_wire())))
    assert type(back) is cls
    assert str(back) == str(error)
    assert back.retryable == error.retryable
    assert {name: back.fields[name] for name in error.fields} == error.fields


def test_codes_are_unique_lower_case_words() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(code == code.lower() and code.replace("_", "").isalpha() for code in codes)


def test_a_paragraph_of_several_lines_is_one_message() -> None:
    assert str(ReplicaDamaged(path="/d", reason="torn")) == (
        "The replica at /d cannot be opened: torn. Its files are left as they are, and the volume's "
        "other replicas serve; `dolmen replica rebuild` throws it away and fills it from them."
    )
    assert str(StaleEpoch(volume="v", offered=1, current=2)) == "volume v: epoch 1 is older than 2"


def test_fields_that_cannot_travel_become_text() -> None:
    error = BadRequest(reason=frozenset({"a"}), cause=OSError(5, "x"), big=2**80, path="\udcff", inner=[{1}])
    wire = msgpack.unpackb(msgpack.packb(error.to_wire()))
    assert wire["fields"]["reason"] == ["a"]
    assert wire["fields"]["cause"] == "[Errno 5] x"
    assert wire["fields"]["big"] == str(2**80)
    assert wire["fields"]["path"] == "?"
    assert wire["fields"]["inner"] == [[1]]


def test_a_path_that_is_no_text_does_not_stop_a_message() -> None:
    msgpack.packb(DiskError(path="/\udc80", reason="x").to_wire())


def test_an_unknown_code_stays_readable_and_is_not_retried() -> None:
    error = from_wire({"code": "from_the_future", "message": "sorry", "fields": {"a": 1}})
    assert type(error) is StorageError
    assert (str(error), error.fields, error.retryable) == (
        "sorry",
        {"a": 1, "code": "from_the_future"},
        False,
    )


def test_a_message_from_a_peer_is_bounded() -> None:
    assert len(str(from_wire({"code": "bad_request", "message": "x" * 10**6}))) == MESSAGE_CHARS_MAX


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(plain | st.fixed_dictionaries({"code": plain, "message": plain, "fields": plain}))
def test_whatever_a_peer_sends_as_an_error_becomes_one(wire: object) -> None:
    error = from_wire(wire)
    assert isinstance(error, StorageError)
    msgpack.packb(error.to_wire())
