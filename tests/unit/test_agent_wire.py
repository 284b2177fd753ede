"""Both ends of the agent's wire: they understand each other, and take anything from anybody calmly."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import AgentError, ProtocolError
from offloadd.guest.agent.wire import HEAD, MAX_PAYLOAD, MAX_SKIPPED, WINDOW, Decoder, Frame, Hello, encode
from tests.guest_modules import load_guest_module

guest = load_guest_module("guest_agent.wire")

channels = st.integers(0, (1 << 32) - 1)
FITTING = {b"O": (1, 300), b"E": (1, 300), b"W": (4, 4), b"x": (0, 300), b"A": (0, 300)}
guest_frames = st.sampled_from(sorted(FITTING)).flatmap(
    lambda kind: st.builds(Frame, st.just(kind), channels, st.binary(min_size=FITTING[kind][0], max_size=FITTING[kind][1]))
)
host_frames = st.tuples(st.sampled_from("RIiKXCW"), channels, st.binary(max_size=300))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[start:end] for start, end in pairwise(at)]


def question(*, after_loss: bool = False) -> bytes:
    return Hello().question(after_loss=after_loss)


@given(st.lists(guest_frames), st.lists(st.integers(0, 3000)))
def test_the_host_reads_what_the_guest_packs_in_whatever_pieces(frames: list[Frame], cuts: list[int]) -> None:
    packed = b"".join(guest.head(one.kind.decode(), one.channel, len(one.payload)) + one.payload for one in frames)
    decoder = Decoder()
    assert [frame for piece in pieces(packed, cuts) for frame in decoder.feed(piece)] == frames


@given(st.lists(host_frames), st.lists(st.integers(0, 3000)))
def test_the_guest_reads_what_the_host_sends_in_whatever_pieces(frames: list[tuple[str, int, bytes]], cuts: list[int]) -> None:
    hello = question()
    sent = hello + b"".join(encode(kind.encode(), channel, payload) for kind, channel, payload in frames)
    cutter = guest.Cutter()
    got = [frame for piece in pieces(sent, cuts) for frame in cutter.feed(piece)]
    assert got == [("H", 0, hello[HEAD:]), *frames]


@given(st.lists(st.binary(max_size=2000)))
def test_the_host_takes_any_bytes_calmly_and_keeps_few(data: list[bytes]) -> None:
    decoder = Decoder()
    for piece in data:
        try:
            frames = decoder.feed(piece)
        except (AgentError, ProtocolError):
            return
        assert all(len(frame.payload) <= MAX_PAYLOAD for frame in frames)
        assert sys.getsizeof(decoder._waiting) < 2 * (HEAD + MAX_PAYLOAD)


@given(st.lists(st.one_of(st.binary(max_size=300), st.sampled_from([guest.NAME, b"H", question(), bytes(70_000)]))))
def test_the_guest_takes_any_bytes_calmly_and_keeps_few(data: list[bytes]) -> None:
    cutter = guest.Cutter()
    for piece in data:
        assert all(kind in "HRIiKXCW" for kind, _, _ in cutter.feed(piece))
        assert len(cutter.waiting) <= HEAD + MAX_PAYLOAD


@pytest.mark.parametrize("kind", [b"O", b"E", b"x", b"A", b"W"])
def test_a_frame_that_is_too_long_is_refused_at_its_head(kind: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"'{kind.decode()}' of 65537 bytes"):
        Decoder().feed(kind + bytes(4) + (MAX_PAYLOAD + 1).to_bytes(4, "big"))


@pytest.mark.parametrize("kind", [b"H", b"R", b"I", b"Z", b"\xff"])
def test_a_frame_of_another_kind_is_refused_at_its_head(kind: bytes) -> None:
    with pytest.raises(ProtocolError, match="of unknown kind"):
        Decoder().feed(kind + bytes(8))


@pytest.mark.parametrize("frame", [encode(b"O", 1), encode(b"E", 1), encode(b"W", 1), encode(b"W", 1, bytes(5))])
def test_a_frame_that_says_nothing_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"bytes$"):
        Decoder().feed(frame)


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b"7", b'{"a": "\\ud800"}', b"\xff", b"[" * 16000, b'{"a": ' + b"9" * 6000 + b"}"]
)
def test_json_that_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"not JSON|not a JSON object"):
        Frame(b"A", 1, payload).json()


# Hello


@given(st.binary(max_size=300), st.binary(max_size=300), st.lists(st.integers(0, 900)))
def test_the_answer_is_found_behind_whatever_was_left_on_the_way(before: bytes, after: bytes, cuts: list[int]) -> None:
    hello = Hello()
    (_, _, payload), *_ = guest.Cutter().feed(hello.question(after_loss=False))
    answer = guest.answer_hello(payload)
    said = before + guest.head("h", 0, len(answer)) + answer + after
    found: bytes | None = None
    for piece in pieces(said, cuts):
        found = hello.search(piece) if found is None else found + piece
    assert found == after


@pytest.mark.parametrize("version", ["2", "10", "x"])
def test_an_agent_of_another_version(version: str) -> None:
    hello = Hello()
    session = hello.question(after_loss=False).rpartition(b" ")[2]
    with pytest.raises(ProtocolError, match=f"speaks version '{version}', this host 1") as caught:
        hello.search(b"h" + bytes(8) + b"offload-agent " + version.encode() + b" " + session)
    assert "offload image build" in caught.value.hint


def test_a_host_of_another_version_is_answered_so_that_it_sees_ours() -> None:
    cutter = guest.Cutter()
    ((_, _, payload),) = cutter.feed(encode(b"H", 0, b"offload-agent 12 some words and its-session"))
    assert guest.answer_hello(payload) == b"offload-agent 1 its-session"


def test_an_agent_that_says_other_things_for_ever() -> None:
    hello = Hello()
    with pytest.raises(ProtocolError, match="says other things"):
        for _ in range(2 + MAX_SKIPPED // 50_000):
            assert hello.search(b"h" * 50_000) is None
    assert len(hello._waiting) < 50_000


@given(host_frames, st.integers(0, HEAD + 300), st.integers(0, MAX_PAYLOAD))
def test_a_host_that_was_killed_in_the_middle_of_a_frame(frame: tuple[str, int, bytes], cut: int, more: int) -> None:
    kind, channel, payload = frame
    cutter = guest.Cutter()
    cutter.feed(question())
    cutter.feed(encode(kind.encode(), channel, payload + bytes([7]) * (more - len(payload)))[:cut])
    hello = question(after_loss=True)
    *_, last = cutter.feed(hello)
    assert last == ("H", 0, hello[2 * HEAD + MAX_PAYLOAD :])


@given(guest_frames, st.integers(1, HEAD + 300))
def test_an_agent_that_was_killed_in_the_middle_of_a_frame(frame: Frame, cut: int) -> None:
    decoder = Decoder()
    whole = encode(frame.kind, frame.channel, frame.payload)
    decoder.feed(whole[:cut])
    with pytest.raises((AgentError, ProtocolError)):
        decoder.feed(bytes(HEAD + MAX_PAYLOAD))


def test_a_guest_that_is_told_to_keep_to_the_window_keeps_frames_that_fit() -> None:
    assert guest.WINDOW == WINDOW
    assert guest.MAX_PAYLOAD == MAX_PAYLOAD
    assert guest.PIECE + guest.HEAD == MAX_PAYLOAD
