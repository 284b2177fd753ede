from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ProtocolError
from offloadd.guest.frames import MAX_PAYLOAD, Decoder, Frame, encode

frames = st.one_of(
    st.builds(Frame, st.sampled_from([b"E", b"L", b"O"]), st.binary(max_size=300)),
    st.just(Frame(b"o")),
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


@given(st.lists(frames), st.lists(st.integers(min_value=0)), st.booleans())
def test_frames_survive_any_cutting(sent: list[Frame], cuts: list[int], done: bool) -> None:
    sent = [*sent, Frame(b"D")] if done else sent
    data = b"".join(encode(frame.kind, frame.payload) for frame in sent)
    decoder = Decoder()
    received = [frame for piece in pieces(data, cuts) for frame in decoder.feed(piece)]
    decoder.end()
    assert received == sent


@given(st.binary(max_size=2000), st.lists(st.integers(min_value=0)))
def test_garbage_is_a_protocol_error_or_frames_of_known_kinds(data: bytes, cuts: list[int]) -> None:
    decoder, seen = Decoder(), b""
    try:
        for piece in pieces(data, cuts):
            for frame in decoder.feed(piece):
                seen += encode(frame.kind, frame.payload)
        decoder.end()
    except ProtocolError:
        assert data.startswith(seen)
    else:
        assert seen == data


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"X", "unknown kind b'X'"),
        (b"B", "unknown kind b'B'"),
        (b"L\xff\xff\xff\xff", "of 4294967295 bytes"),
        (b"L" + (MAX_PAYLOAD + 1).to_bytes(4, "big"), "of 1048577 bytes"),
        (b"o\0\0\0\1", "of 1 bytes"),
        (encode(b"D") + b"L", "after its last frame"),
    ],
)
def test_refused_as_soon_as_it_can_be_seen(data: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        Decoder().feed(data)


def test_the_largest_frame() -> None:
    data = encode(b"L", bytes(MAX_PAYLOAD))
    assert Decoder().feed(data) == [Frame(b"L", bytes(MAX_PAYLOAD))]
    with pytest.raises(ValueError, match="too many"):
        encode(b"L", bytes(MAX_PAYLOAD + 1))


@pytest.mark.parametrize(("kind", "payload"), [(b"X", b""), (b"", b""), (b"LL", b""), (b"s", b"x")])
def test_what_is_not_a_frame_is_not_encoded(kind: bytes, payload: bytes) -> None:
    with pytest.raises(ValueError, match="frame"):
        encode(kind, payload)


def test_an_end_within_a_frame() -> None:
    decoder = Decoder()
    assert decoder.feed(encode(b"L", b"abc")[:-1]) == []
    with pytest.raises(ProtocolError, match="in the middle"):
        decoder.end()


def test_json() -> None:
    assert Frame(b"E", b'{"event": "exit"}').json() == {"event": "exit"}


@pytest.mark.parametrize("payload", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 100_000])
def test_json_that_is_no_object(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="not"):
        Frame(b"E", payload).json()
