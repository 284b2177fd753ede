"""The benchmark's own logic: what a row says, what is drawn, and that what cannot be measured is told and no failure."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.compiling import read_took, write_project
from bench.loads import check_and_remove, make_big, make_small
from bench.login import make_login
from bench.measure import BenchError, Budget, Row, Series
from bench.others import common_options, plain_argv
from bench.picture import Bar, Scale, choose_scale, draw
from bench.program import find_program, time_to_end
from bench.report import table, write_report
from bench.throughput import carrier_rows
from bench.ways import Point, Way, go_in_turn, way_rows
from offloadd.plan.machine import plan_vm
from tests.unit import plans

SVG = "{http://www.w3.org/2000/svg}"


def silent(text: str, fraction: float | None) -> None: ...


def rounds(count: int) -> Budget:
    return Budget(0, least=count, most=count)


def way(name: str, *times: float, foreign: bool = False, fails_at: int | None = None) -> Way:
    """A way with one point that takes these times, and fails in one round."""
    numbers = itertools.count()

    async def go() -> Sequence[float]:
        number = next(numbers)
        if number == fails_at:
            raise BenchError("not installed: apt-get install it\nand more")
        return [times[number]]

    return Way(name=name, points=(Point(series=Series(name), what=f"to {name}"),), go=go, foreign=foreign)


# Rows


def test_a_rate_is_told_as_how_many_a_minute() -> None:
    row = Row(name="r", compares="c", ours=Series("s", [1.5, 2.0, 3.0]), relation="rate")
    assert row.value == 30
    assert "| 30.0 a minute |" in table([row])


def test_a_row_that_could_not_be_measured_is_in_the_table_and_in_the_json(tmp_path: Path) -> None:
    missing = Row(name="r", compares="a | b", ours=Series("s"), base=Series("t", [1.0]), target=0.5, why_not="no\ntool | here")
    assert missing.value is None
    assert missing.met is None
    write_report([missing], {"fact": "x"}, tmp_path)
    line = next(line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| r |"))
    assert line == r"| r | a \| b | not measured: no tool \| here | 1.00 s (1.00-1.00, n=1) |  | at most 0.50x |  |"
    values = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert (values["why_not"], values["met"], values["ours"]["median"]) == ("no\ntool | here", None, None)


def test_a_small_ratio_keeps_its_digits() -> None:
    row = Row(name="r", compares="c", ours=Series("s", [0.2]), base=Series("t", [10.0]), target=1 / 40)
    assert "| 0.0200x | at most 0.0250x | yes |" in table([row])


def test_a_report_without_anything_to_draw_has_no_picture(tmp_path: Path) -> None:
    write_report([Row(name="r", compares="c", ours=Series("s", [1.0]))], {}, tmp_path)
    assert not (tmp_path / "results.svg").exists()
    assert "results.svg" not in (tmp_path / "results.md").read_text()


def test_the_picture_has_the_drawn_rows_and_their_base_once_the_fastest_first(tmp_path: Path) -> None:
    base = Series("the base", [10.0])
    rows = [
        Row(name="missing", compares="c", ours=Series("missing"), base=base, why_not="not here", drawn=True),
        Row(name="slow", compares="c", ours=Series("slow", [20.0]), base=base, drawn=True),
        Row(name="our fast", compares="c", ours=Series("our fast", [1.0]), base=base, drawn=True),
        Row(name="not drawn", compares="c", ours=Series("not drawn", [2.0]), base=base),
    ]
    write_report(rows, {}, tmp_path)
    svg = ElementTree.fromstring((tmp_path / "results.svg").read_text())  # noqa: S314 - we wrote it
    labels = [text.text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert labels == ["our fast", "the base", "slow", "missing"]
    assert "(results.svg)" in (tmp_path / "results.md").read_text()


# Ways


async def test_ways_are_gone_in_turn_and_compared_with_the_base() -> None:
    ours, base = way("ours", 1.0, 3.0), way("base", 10.0, 10.0)
    await go_in_turn([ours, base], rounds(2), silent)
    (row,) = way_rows([ours, base], base.points[0], drawn=True)
    assert (row.name, row.compares, row.drawn) == ("ours", "to ours : to base", True)
    assert row.value == pytest.approx(0.2)


@pytest.mark.parametrize("fails_at", [0, 1])
async def test_a_foreign_way_that_fails_is_a_row_that_says_why(fails_at: int) -> None:
    calls = []
    other, base = way("other", 1.0, 1.0, 1.0, foreign=True, fails_at=fails_at), way("base", 10.0, 10.0, 10.0)
    await go_in_turn([other, base], rounds(3), lambda text, fraction: calls.append(text))
    (row,) = way_rows([other, base], base.points[0], drawn=True)
    assert row.why_not == "not installed: apt-get install it and more"
    assert row.ours.seconds == []
    assert row.value is None
    # It is not tried again.
    assert sum("other" in call for call in calls) == fails_at + 2


async def test_one_of_our_own_ways_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(BenchError, match="not installed"):
        await go_in_turn([way("ours", fails_at=0)], rounds(1), silent)


async def test_a_limit_is_a_row_of_its_own_that_is_not_drawn() -> None:
    base, series = way("base", 10.0), Series("ours", [0.3])
    await go_in_turn([base], rounds(1), silent)
    point = Point(series=series, what="to ours", target=0.05, limit_s=0.25)
    rows = way_rows([Way(name="ours", points=(point,), go=base.go)], base.points[0], drawn=True)
    assert [(row.relation, row.met, row.drawn) for row in rows] == [("ratio", True, True), ("time", False, False)]
    assert [row.value for row in rows] == pytest.approx([0.03, 0.3])


# Programs


def test_a_program_that_is_missing_says_how_to_get_it() -> None:
    with pytest.raises(BenchError, match=r"^not installed: apt-get install debvm$"):
        find_program("no-such-program-anywhere", "apt-get install debvm")


async def test_a_program_that_is_missing_is_a_bench_error() -> None:
    with pytest.raises(BenchError, match="not installed"):
        await time_to_end(["/no/such/program-anywhere"], limit_s=5)


def test_plain_qemu_has_what_makes_it_comparable_and_leaves_the_disks_alone() -> None:
    plan = plan_vm(plans.machine(), plans.facts(), plans.BOOT)
    argv = plain_argv(plan, plan.boot, "word", Path("/a,b"))
    assert argv[argv.index("-smp") + 1] == str(plan.cpu_count)
    assert argv[argv.index("-m") + 1] == f"{plan.memory_mib}M"
    assert argv[argv.index("-cpu") + 1] == plan.cpu
    assert argv[argv.index("-accel") + 1] == "tcg"
    assert "-snapshot" in common_options(plan)
    assert argv[-1] == "root=/dev/vda console=ttyS0 word"
    assert [word for word in argv if word.startswith("file=")] == [
        "file=/i/root.ext4,if=virtio,format=raw",
        "file=/a,,b,if=virtio,format=raw",
    ]


def test_scp_logs_in_as_ssh_does(tmp_path: Path) -> None:
    machine = {"name": "m", "ssh_port": 2222, "client_key": "/key", "host_keys": ["ssh-ed25519 AAAA comment"]}
    login = make_login(machine, tmp_path)
    assert login.ssh[-2:] == ("--", "offloading@127.0.0.1")
    assert (tmp_path / "known-hosts-m").read_text() == "m ssh-ed25519 AAAA\n"
    scp = list(login.scp)
    assert scp[scp.index("-P") + 1] == "2222"
    assert {"-p", "-T", "--", "offloading@127.0.0.1"}.isdisjoint(scp)
    assert {word for word in login.ssh if "=" in word} == {word for word in scp if "=" in word}


# Loads


def test_loads_have_the_size_that_they_say_and_are_the_same_every_time(tmp_path: Path) -> None:
    big, small = make_big(tmp_path / "big", (3 << 20) + 5), make_small(tmp_path / "small", 250, size=100)
    assert (tmp_path / "big/big").stat().st_size == big.size == (3 << 20) + 5
    files = [path for path in (tmp_path / "small").rglob("*") if path.is_file()]
    assert len(files) == small.files == 250
    assert sum(path.stat().st_size for path in files) == small.size == 25_000
    assert make_small(tmp_path / "again", 1, size=100).files == 1
    assert (tmp_path / "again/00/000000").read_bytes() == (tmp_path / "small/00/000000").read_bytes()


def test_a_copy_that_is_not_whole_is_noticed(tmp_path: Path) -> None:
    load = make_small(tmp_path / "load", 3, size=10)
    check_and_remove(load, make_small(tmp_path / "same", 3, size=10).folder)
    assert not (tmp_path / "same").exists()
    for name, files, size in (("fewer", 2, 15), ("smaller", 3, 9)):
        with pytest.raises(BenchError, match="came back"):
            check_and_remove(load, make_small(tmp_path / name, files, size=size).folder)


async def nothing(*arguments: object) -> None: ...


def test_a_carrier_that_failed_is_a_row_for_each_direction() -> None:
    def there_and_back(name: str, why_not: str = "") -> Way:
        points = tuple(Point(series=Series(f"{way} {name}", [] if why_not else [2.0]), what=name) for way in ("in", "out"))
        return Way(name=name, points=points, go=nothing, why_not=why_not)  # type: ignore[arg-type]

    rows = carrier_rows(there_and_back("scp", "too slow"), there_and_back("tar"), 1.0)
    assert [(row.name, row.why_not, row.value) for row in rows] == [("in scp", "too slow", None), ("out scp", "too slow", None)]


# The compile


def test_the_compiles_time_is_read_from_what_the_guest_says(tmp_path: Path) -> None:
    said = "[ 1.0] kernel\noffload-bench: compiled 10.25 14.25\noffload-bench: compiled 20 23.5\n"
    assert read_took(f"{said}offload-bench: compiled 30 39\n") == 3.5
    for early in (said, "gcc: not found"):
        with pytest.raises(BenchError, match="the compile said"):
            read_took(early)
    write_project(tmp_path / "a")
    write_project(tmp_path / "b")
    assert (tmp_path / "a/big.c").read_bytes() == (tmp_path / "b/big.c").read_bytes()


# The picture


@pytest.mark.parametrize(
    ("times", "low", "high"),
    [([0.24, 12.0], 0.1, 20.0), ([2.0, 5.0], 1.0, 5.0), ([0.0099], 0.002, 0.01), ([], 0.5, 10.0)],
)
def test_the_scale_has_all_times_between_its_ends(times: list[float], low: float, high: float) -> None:
    assert choose_scale(times) == Scale(low=pytest.approx(low), high=pytest.approx(high))  # type: ignore[arg-type]


def test_the_scale_has_a_mark_at_both_ends() -> None:
    assert Scale(low=0.1, high=20.0).ticks() == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10, 20])


def test_nothing_in_the_picture_lies_outside_of_it_or_on_something_else() -> None:
    bars = [
        Bar("our <b> & a label that is much too long for the room that it has there", (0.2, 0.3)),
        Bar("slow", (19.0, 12.0, 20.0)),
        Bar("missing", (), "because " * 40),
    ]
    svg = ElementTree.fromstring(draw("A & B", bars))  # noqa: S314 - we wrote it
    width, height = (float(number) for number in svg.attrib["viewBox"].split()[2:])
    lines: dict[float, list[tuple[float, float]]] = {}
    for text in svg.iter(f"{SVG}text"):
        x, room = float(text.attrib["x"]), 7.2 * len(text.text or "")
        left = {"end": x - room, "middle": x - room / 2}.get(text.get("text-anchor", "start"), x)
        lines.setdefault(float(text.attrib["y"]), []).append((left, left + room))
    for bar in svg.iter(f"{SVG}rect"):
        if bar.get("class") != "paper":
            middle = float(bar.attrib["y"]) + float(bar.attrib["height"]) / 2
            lines[middle + 4.5].append((float(bar.attrib["x"]), float(bar.attrib["x"]) + float(bar.attrib["width"])))
    for y, pieces in lines.items():
        assert 0 < y < height
        assert all(left >= 0 and right <= width for left, right in pieces)
        ordered = sorted(pieces)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ordered)), (y, ordered)
    assert "…" in "".join(svg.itertext())
    assert re.search(r"prefers-color-scheme: dark", draw("t", bars))
