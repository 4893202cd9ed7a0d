"""NBD negotiation, option by option, without a socket."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.negotiation import (
    BASE_ALLOCATION_ID,
    HANDLERS,
    OPTION_COUNT_MAX,
    OPTION_DATA_BYTES_MAX,
    Answer,
    Export,
    ExportTable,
    Negotiated,
    Negotiator,
)
from tests.engine import nbd_messages as nbd

SIZE = 64 * 1024 * 1024
MAIN = Export("main", SIZE, read_only=False, description="the volume")
SNAPSHOT = Export("main@monday", SIZE, read_only=True, description="")
TABLE = ExportTable([MAIN, SNAPSHOT])

# HAS_FLAGS SEND_FLUSH SEND_FUA SEND_TRIM SEND_WRITE_ZEROES CAN_MULTI_CONN SEND_CACHE SEND_FAST_ZERO
WRITABLE_FLAGS = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048
READ_ONLY_FLAGS = 1 | 2 | 4 | 8 | 256 | 1024
DF = 128
EXPORT_INFO = struct.pack(">HQH", 0, SIZE, WRITABLE_FLAGS)
BLOCK_SIZE_INFO = struct.pack(">HIII", 3, 512, 4096, 32 * 1024 * 1024)


def negotiator(*, flags: int = 3, structured: bool = False) -> Negotiator:
    fresh = Negotiator(TABLE)
    assert fresh.on_client_flags(flags) == Answer()
    if structured:
        assert kinds(fresh.on_option(nbd.STRUCTURED_REPLY, b"")) == [nbd.ACK]
    return fresh


def kinds(answer: Answer) -> list[int]:
    return [reply.type for reply in nbd.parse_replies(answer.reply)]


def goes_on(answer: Answer) -> bool:
    return not answer.close and answer.negotiated is None


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_client_flags_that_were_offered_are_accepted(flags: int) -> None:
    assert Negotiator(TABLE).on_client_flags(flags) == Answer()


@pytest.mark.parametrize("flags", [4, 7, 0x80000001, 0xFFFFFFFF])
def test_client_flags_that_were_not_offered_end_the_connection(flags: int) -> None:
    assert Negotiator(TABLE).on_client_flags(flags).close


@pytest.mark.parametrize("name", [b"", b"main"])
def test_go_by_any_name_of_the_default_export_begins_transmission(name: bytes) -> None:
    answer = negotiator().on_option(nbd.GO, nbd.info_data(name))
    replies = nbd.parse_replies(answer.reply)
    assert [(r.option, r.type) for r in replies] == [
        (nbd.GO, nbd.REP_INFO),
        (nbd.GO, nbd.REP_INFO),
        (nbd.GO, nbd.ACK),
    ]
    assert [r.data for r in replies] == [EXPORT_INFO, BLOCK_SIZE_INFO, b""]
    assert answer.negotiated == Negotiated(structured=False, meta_context=0, read_only=False, export="main")


def test_info_answers_like_go_and_stays_in_negotiation() -> None:
    go = negotiator().on_option(nbd.GO, nbd.info_data(b"main", [0, 1, 2, 3]))
    info = negotiator().on_option(nbd.INFO, nbd.info_data(b"main", [0, 1, 2, 3]))
    assert [r.data for r in nbd.parse_replies(info.reply)] == [r.data for r in nbd.parse_replies(go.reply)]
    assert goes_on(info)


@pytest.mark.parametrize(
    ("name", "wanted", "infos"),
    [
        (b"", [1], [EXPORT_INFO, b"\0\1main", BLOCK_SIZE_INFO]),
        (b"main", [2], [EXPORT_INFO, b"\0\2the volume", BLOCK_SIZE_INFO]),
        (b"main", [3], [EXPORT_INFO, BLOCK_SIZE_INFO]),
        (b"main", [3, 2, 1, 0], [EXPORT_INFO, b"\0\1main", b"\0\2the volume", BLOCK_SIZE_INFO]),
        (b"main", [1, 1, 1], [EXPORT_INFO, b"\0\1main", BLOCK_SIZE_INFO]),
        (b"main", [9, 0xFFFF], [EXPORT_INFO, BLOCK_SIZE_INFO]),
        (
            b"main@monday",
            [1, 2],
            [struct.pack(">HQH", 0, SIZE, READ_ONLY_FLAGS), b"\0\1main@monday", BLOCK_SIZE_INFO],
        ),
    ],
)
def test_info_sends_what_was_asked_for(name: bytes, wanted: list[int], infos: list[bytes]) -> None:
    answer = negotiator().on_option(nbd.INFO, nbd.info_data(name, wanted))
    assert [r.data for r in nbd.parse_replies(answer.reply)] == [*infos, b""]


def test_a_read_only_export_offers_no_command_that_it_would_refuse() -> None:
    answer = negotiator(structured=True).on_option(nbd.GO, nbd.info_data(b"main@monday"))
    flags = struct.unpack(">HQH", nbd.parse_replies(answer.reply)[0].data)[2]
    assert flags == READ_ONLY_FLAGS | DF
    assert answer.negotiated is not None and answer.negotiated.read_only


def test_dont_fragment_is_offered_only_with_structured_replies() -> None:
    for structured in (False, True):
        answer = negotiator(structured=structured).on_option(nbd.GO, nbd.info_data())
        flags = struct.unpack(">HQH", nbd.parse_replies(answer.reply)[0].data)[2]
        assert flags == WRITABLE_FLAGS | (DF if structured else 0)
        assert answer.negotiated is not None and answer.negotiated.structured is structured


@pytest.mark.parametrize("option", [nbd.INFO, nbd.GO])
def test_an_unknown_export_is_refused_and_the_client_may_ask_again(option: int) -> None:
    client = negotiator()
    refused = client.on_option(option, nbd.info_data(b"other"))
    assert kinds(refused) == [nbd.ERR_UNKNOWN]
    assert goes_on(refused)
    assert client.on_option(nbd.GO, nbd.info_data()).negotiated is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\0",  # no count
        b"\0\0\0\0\0",
        b"\0\0\0\0\0\1",  # one request promised, none sent
        b"\0\0\0\0\0\1\0",
        nbd.info_data() + b"\0",  # a byte too many
        nbd.info_data(b"main", [1]) + b"\0\3",
        struct.pack(">I", 0xFFFFFFFF) + b"main\0\0",
        struct.pack(">I", 100) + b"main\0\0",
        nbd.info_data(b"\xff\xfe"),
        nbd.info_data(b"ma\0in"),
        nbd.info_data(b"x" * 4097),
    ],
)
@pytest.mark.parametrize("option", [nbd.INFO, nbd.GO])
def test_malformed_info_is_told_so(option: int, data: bytes) -> None:
    answer = negotiator().on_option(option, data)
    assert kinds(answer) == [nbd.ERR_INVALID]
    assert goes_on(answer)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (1, 124), (2, 0), (3, 0)])
@pytest.mark.parametrize("name", [b"", b"main"])
def test_export_name_begins_transmission(flags: int, padding: int, name: bytes, structured: bool) -> None:
    structured = structured and bool(flags & 1)  # else the client could not have asked
    answer = negotiator(flags=flags, structured=structured).on_option(nbd.EXPORT_NAME, name)
    flags_sent = WRITABLE_FLAGS | (DF if structured else 0)
    assert answer.reply == struct.pack(">QH", SIZE, flags_sent) + bytes(padding)
    assert answer.negotiated is not None and answer.negotiated.structured is structured


@pytest.mark.parametrize("name", [b"other", b"\xff", b"ma\0in", b"x" * 4097])
def test_export_name_without_such_an_export_ends_the_connection(name: bytes) -> None:
    assert negotiator().on_option(nbd.EXPORT_NAME, name) == Answer(close=True)


@pytest.mark.parametrize("option", [n for n in range(16) if n != nbd.EXPORT_NAME])
def test_a_client_without_fixed_newstyle_may_only_name_its_export(option: int) -> None:
    assert negotiator(flags=0).on_option(option, b"") == Answer(close=True)


@pytest.mark.parametrize("data", [b"", b"bye"])
def test_abort_is_acknowledged_and_ends_the_connection(data: bytes) -> None:
    answer = negotiator().on_option(nbd.ABORT, data)
    assert kinds(answer) == [nbd.ACK]
    assert answer.close


def test_list_names_every_export() -> None:
    answer = negotiator().on_option(nbd.LIST, b"")
    assert [(r.type, r.data) for r in nbd.parse_replies(answer.reply)] == [
        (nbd.SERVER, nbd.string(b"main") + b"the volume"),
        (nbd.SERVER, nbd.string(b"main@monday")),
        (nbd.ACK, b""),
    ]
    assert goes_on(answer)


@pytest.mark.parametrize("option", [nbd.LIST, nbd.STRUCTURED_REPLY])
def test_an_option_without_data_refuses_data(option: int) -> None:
    assert kinds(negotiator().on_option(option, b"x")) == [nbd.ERR_INVALID]


def test_structured_replies_may_be_asked_for_twice() -> None:
    client = negotiator(structured=True)
    assert kinds(client.on_option(nbd.STRUCTURED_REPLY, b"")) == [nbd.ACK]


@pytest.mark.parametrize("option", [0, nbd.PEEK_EXPORT, nbd.STARTTLS, nbd.EXTENDED_HEADERS, 12, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"x" * 100])
def test_an_unknown_option_is_unsupported_and_the_client_goes_on(option: int, data: bytes) -> None:
    client = negotiator()
    answer = client.on_option(option, data)
    assert kinds(answer) == [nbd.ERR_UNSUP]
    assert nbd.parse_replies(answer.reply)[0].option == option
    assert client.on_option(nbd.GO, nbd.info_data()).negotiated is not None


# queries, what LIST_META_CONTEXT finds, what SET_META_CONTEXT selects
META_QUERIES = [
    ([], True, False),
    ([b"base:allocation"], True, True),
    ([b"base:"], True, False),
    ([b"base:allocation", b"base:allocation"], True, True),
    ([b"qemu:dirty-bitmap:b0", b"base:allocation"], True, True),
    ([b"qemu:dirty-bitmap:b0"], False, False),
    ([b"base:allocations"], False, False),
    ([b"base"], False, False),
    ([b""], False, False),
    ([b"BASE:allocation"], False, False),
]


@pytest.mark.parametrize(("queries", "listed", "_selected"), META_QUERIES)
@pytest.mark.parametrize("name", [b"", b"main"])
def test_list_meta_context(name: bytes, queries: list[bytes], listed: bool, _selected: bool) -> None:
    client = negotiator(structured=True)
    replies = nbd.parse_replies(client.on_option(nbd.LIST_META_CONTEXT, nbd.meta_data(name, queries)).reply)
    expected = [(nbd.META_CONTEXT, b"\0\0\0\0base:allocation")] if listed else []
    assert [(r.type, r.data) for r in replies] == [*expected, (nbd.ACK, b"")]
    assert client.on_option(nbd.GO, nbd.info_data()).negotiated == Negotiated(True, 0, False, "main")


@pytest.mark.parametrize(("queries", "_listed", "selected"), META_QUERIES)
@pytest.mark.parametrize("name", [b"", b"main"])
def test_set_meta_context(name: bytes, queries: list[bytes], _listed: bool, selected: bool) -> None:
    client = negotiator(structured=True)
    replies = nbd.parse_replies(client.on_option(nbd.SET_META_CONTEXT, nbd.meta_data(name, queries)).reply)
    context = struct.pack(">I", BASE_ALLOCATION_ID) + b"base:allocation"
    expected = [(nbd.META_CONTEXT, context)] if selected else []
    assert [(r.type, r.data) for r in replies] == [*expected, (nbd.ACK, b"")]
    context_id = BASE_ALLOCATION_ID if selected else 0
    assert client.on_option(nbd.GO, nbd.info_data()).negotiated == Negotiated(True, context_id, False, "main")


@pytest.mark.parametrize("option", [nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
def test_meta_contexts_need_structured_replies(option: int) -> None:
    client = negotiator()
    assert kinds(client.on_option(option, nbd.meta_data(b"", [b"base:allocation"]))) == [nbd.ERR_INVALID]
    begun = client.on_option(nbd.GO, nbd.info_data()).negotiated
    assert begun is not None and begun.meta_context == 0


@pytest.mark.parametrize("option", [nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
def test_meta_contexts_of_an_unknown_export_are_refused(option: int) -> None:
    client = negotiator(structured=True)
    assert kinds(client.on_option(option, nbd.meta_data(b"other"))) == [nbd.ERR_UNKNOWN]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\0\0\0\0",
        b"\0\0\0\0\0\0\0\1",  # one query promised, none sent
        b"\0\0\0\0\xff\xff\xff\xff",
        b"\0\0\0\0\0\0\0\1\0\0\0\x09base",
        b"\0\0\0\0\0\0\0\1\xff\xff\xff\xffbase:allocation",
        nbd.meta_data(b"", [b"base:allocation"]) + b"x",
        nbd.meta_data(b"\xff"),
        nbd.meta_data(b"", [b"x" * 4097]),
    ],
)
def test_malformed_meta_contexts_are_told_so_and_select_nothing(data: bytes) -> None:
    client = negotiator(structured=True)
    client.on_option(nbd.SET_META_CONTEXT, nbd.meta_data(b"", [b"base:allocation"]))
    assert kinds(client.on_option(nbd.LIST_META_CONTEXT, data)) == [nbd.ERR_INVALID]
    assert kinds(client.on_option(nbd.SET_META_CONTEXT, data)) == [nbd.ERR_INVALID]
    begun = client.on_option(nbd.GO, nbd.info_data()).negotiated
    assert begun is not None and begun.meta_context == 0, "a failed SET replaces the selection too"


def test_a_failed_list_of_meta_contexts_leaves_the_selection_alone() -> None:
    client = negotiator(structured=True)
    client.on_option(nbd.SET_META_CONTEXT, nbd.meta_data(b"", [b"base:allocation"]))
    client.on_option(nbd.LIST_META_CONTEXT, b"")
    begun = client.on_option(nbd.GO, nbd.info_data()).negotiated
    assert begun is not None and begun.meta_context == BASE_ALLOCATION_ID


def test_a_selection_counts_only_for_the_export_that_it_named() -> None:
    client = negotiator(structured=True)
    client.on_option(nbd.SET_META_CONTEXT, nbd.meta_data(b"main@monday", [b"base:allocation"]))
    begun = client.on_option(nbd.GO, nbd.info_data(b"main")).negotiated
    assert begun is not None and begun.meta_context == 0


@pytest.mark.parametrize("option", sorted(set(range(16)) - {nbd.EXPORT_NAME}))
def test_an_oversized_option_is_refused_and_the_client_goes_on(option: int) -> None:
    client = negotiator(structured=True)
    answer = client.on_oversized_option(option)
    assert kinds(answer) == [nbd.ERR_TOO_BIG if option in HANDLERS else nbd.ERR_UNSUP]
    assert client.on_option(nbd.GO, nbd.info_data()).negotiated is not None


def test_an_oversized_selection_selects_nothing() -> None:
    client = negotiator(structured=True)
    client.on_option(nbd.SET_META_CONTEXT, nbd.meta_data(b"", [b"base:allocation"]))
    client.on_oversized_option(nbd.SET_META_CONTEXT)
    begun = client.on_option(nbd.GO, nbd.info_data()).negotiated
    assert begun is not None and begun.meta_context == 0


def test_an_oversized_export_name_ends_the_connection() -> None:
    assert negotiator().on_oversized_option(nbd.EXPORT_NAME) == Answer(close=True)


@pytest.mark.parametrize("oversized", [False, True])
def test_a_flood_of_options_ends_the_connection(oversized: bool) -> None:
    client = negotiator()
    for _ in range(OPTION_COUNT_MAX):
        answer = client.on_oversized_option(99) if oversized else client.on_option(99, b"")
        assert goes_on(answer)
    assert client.on_option(nbd.GO, nbd.info_data()) == Answer(close=True)


def test_an_empty_table_has_no_default_export() -> None:
    client = Negotiator(ExportTable([]))
    client.on_client_flags(3)
    assert kinds(client.on_option(nbd.GO, nbd.info_data())) == [nbd.ERR_UNKNOWN]


names = st.sampled_from([b"", b"main", b"main@monday", b"other"]) | st.binary(max_size=40)
well_formed = st.one_of(
    st.builds(nbd.info_data, names, st.lists(st.integers(0, 0xFFFF), max_size=6)),
    st.builds(nbd.meta_data, names, st.lists(names | st.just(b"base:allocation"), max_size=6)),
    names,
    st.just(b""),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound option's data with one byte changed, or an end cut off, or bytes added."""
    data = bytearray(draw(well_formed))
    match draw(st.integers(0, 2)):
        case 0 if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case 1:
            del data[draw(st.integers(0, len(data))) :]
        case _:
            data += draw(st.binary(max_size=20))
    return bytes(data)


option_numbers = st.integers(0, 12) | st.integers(0, 0xFFFFFFFF)
option_data = well_formed | damaged() | st.binary(max_size=OPTION_DATA_BYTES_MAX)


@given(
    flags=st.sampled_from([0, 1, 2, 3]),
    options=st.lists(st.tuples(option_numbers, option_data), max_size=20),
)
def test_whatever_a_client_sends_gets_replies_to_that_option_and_one_verdict(
    flags: int, options: list[tuple[int, bytes]]
) -> None:
    client = negotiator(flags=flags)
    for number, data in options:
        answer = client.on_option(number, data)
        assert not (answer.close and answer.negotiated)
        if number == nbd.EXPORT_NAME:
            assert answer.close or answer.negotiated
        else:
            replies = nbd.parse_replies(answer.reply)
            assert all(reply.option == number for reply in replies)
            # Exactly one reply ends the option, and it is the last: an ACK or an error.
            final = [reply.type == nbd.ACK or reply.is_error for reply in replies]
            assert final == [False] * (len(final) - 1) + [True] * bool(final)
            assert replies or answer.close
            assert len(answer.reply) <= 64 * 1024
        if answer.negotiated is not None:
            assert answer.negotiated.export in {"main", "main@monday"}
            assert answer.negotiated.structured or answer.negotiated.meta_context == 0
        if not goes_on(answer):
            return
