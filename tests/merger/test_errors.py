"""The error tree: its shape in print and in JSON, and its way between processes."""

from __future__ import annotations

import importlib
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import merger.errors
from merger.errors import Problem, RaymergeError, RefusedError, StoppedError, escape, grouped, nearest

ROOT = Path(__file__).parents[2]


def every_error() -> list[type[RaymergeError]]:
    """The base and all that is derived from it, in whichever file of the three packages it is defined."""
    names = "|".join(name for name, value in vars(merger.errors).items() if isinstance(value, type))
    derived = re.compile(rf"^class \w+\((?:errors\.)?(?:{names})\)", re.MULTILINE)
    for path in sorted(p for package in ("jobs", "cluster", "merger") for p in (ROOT / package).rglob("*.py")):
        if derived.search(path.read_text()):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = [RaymergeError]
    for kind in found:
        found += [sub for sub in kind.__subclasses__() if sub not in found]
    return found


PROBLEM = Problem(
    "bad-key",
    "the key densty is unknown",
    where="merge.yaml: parameters.densty",
    why="no such key",
    fix="write density",
)
OTHER = Problem("bad-shape", "shapes differ")


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(kind: type[RaymergeError], protocol: int) -> None:
    error = kind([PROBLEM, OTHER])
    error.add_note("while planning unit 7")
    error.worker = "node-3"  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert copy.problems == (PROBLEM, OTHER)
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert copy.__notes__ == ["while planning unit 7"]
    assert vars(copy)["worker"] == "node-3"


def test_a_stop_remembers_its_signal_between_processes() -> None:
    error = StoppedError.of("stopped", "stopped by SIGTERM")
    error.signal_number = 15
    assert pickle.loads(pickle.dumps(error)).signal_number == 15
    assert StoppedError.of("stopped", "").signal_number == 2


def test_one_problem_is_a_list_of_one() -> None:
    assert RefusedError(PROBLEM).problems == RefusedError([PROBLEM]).problems == (PROBLEM,)
    assert RefusedError.of("bad-shape", "shapes differ").problems == (OTHER,)


def test_what_is_wrong_with_many_tensors_is_said_once() -> None:
    def of(name: str, why: str) -> tuple[str, Problem]:
        return name, Problem("odd", f"{name} cannot be kept", name, why, "drop it")

    found = grouped([*(of(f"layers.{i}.w", "it is odd") for i in range(60)), of("head", "it is a head")])
    assert [(p.where, p.why) for p in found] == [("layers.0.w", "it is odd"), ("head", "it is a head")]
    assert found[0].what == (
        "layers.0.w cannot be kept; and so with 59 more, such as layers.1.w, layers.2.w, layers.3.w"
    )
    assert grouped([]) == []
    one = of("a", "b")
    assert grouped([one, one]) == [one[1]]


def test_the_four_parts_are_printed_and_empty_ones_left_out() -> None:
    assert str(PROBLEM) == (
        "bad-key: the key densty is unknown\n"
        "  where  merge.yaml: parameters.densty\n"
        "  why    no such key\n"
        "  fix    write density"
    )
    assert str(OTHER) == "bad-shape: shapes differ"
    assert str(RefusedError([PROBLEM, OTHER])) == f"{PROBLEM}\n{OTHER}"


def test_json_has_every_part() -> None:
    assert OTHER.as_json() == {"code": "bad-shape", "what": "shapes differ", "where": "", "why": "", "fix": ""}


@pytest.mark.parametrize(
    "text, safe",
    [
        ("plain", "plain"),
        ("ΔW · 模型", "ΔW · 模型"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x07\x00\x7f", "\\x07\\x00\\x7f"),
        ("right\u202eleft", "right\\u202eleft"),
        ("\ud800", "\\ud800"),
    ],
)
def test_escape_makes_control_characters_visible(text: str, safe: str) -> None:
    assert escape(text) == safe


@given(st.text(alphabet=st.characters()))
def test_an_escaped_text_is_one_printable_line(text: str) -> None:
    assert escape(text).isprintable()
    assert escape(escape(text)) == escape(text)


def test_a_hostile_name_cannot_forge_a_line_of_the_report() -> None:
    problem = Problem("x", "tensor \r\n  fix    run me", where="\x1b]0;title\x07")
    assert str(problem).splitlines() == ["x: tensor \\r\\n  fix    run me", "  where  \\x1b]0;title\\x07"]


@pytest.mark.parametrize(
    "name, known, expected",
    [
        ("densty", ["weight", "density", "seed"], "density"),
        ("merge_metod", ["merge_method", "merge_methods"], "merge_method"),
        ("zzz", ["weight", "density"], None),
        ("anything", [], None),
    ],
)
def test_nearest_finds_the_likely_slip(name: str, known: list[str], expected: str | None) -> None:
    assert nearest(name, iter(known)) == expected
