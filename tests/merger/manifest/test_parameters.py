"""Gradients, filters and scopes: mergekit's rules as a table."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import ManifestError
from merger.manifest import ParameterValue, layer_position, parse_parameter_value, resolve_parameter
from merger.manifest.parameters import ParameterValueError
from merger.methods import METHODS, ParameterSpec, Scalar


def declared(name: str) -> ParameterSpec:
    spec = METHODS["ties"].parameter(name)
    assert spec is not None
    return spec


WEIGHT = declared("weight")
DENSITY = declared("density")
RESCALE = declared("rescale")
NORMALIZE = declared("normalize")
ATTENTION, MLP = "model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"


def number_at(plain: Any, t: float) -> float:
    found = value_at(plain, t)
    assert isinstance(found, float)
    return found


def value_at(plain: Any, t: float = 0.0, name: str = ATTENTION, spec: ParameterSpec = WEIGHT) -> Scalar | None:
    return parse_parameter_value(plain, spec).at(name, t)


@pytest.mark.parametrize(
    "plain, t, expected",
    [
        (2, 0.7, 2.0),
        ("1e-4", 0.0, 1e-4),
        ([5], 0.3, 5.0),
        ([0, 1], 0.25, 0.25),
        ([0, 1], 1.0, 1.0),
        ([0, 1, 0], 0.75, 0.5),
        ([0, 0.5, 0.3, 0.7, 1], 0.0, 0.0),
        ([0, 0.5, 0.3, 0.7, 1], 0.25, 0.5),
        ([0, 0.5, 0.3, 0.7, 1], 0.875, 0.85),
        ({"value": [0, 4]}, 0.5, 2.0),
        ([{"value": 3}], 0.5, 3.0),
    ],
)
def test_gradient(plain: Any, t: float, expected: Any) -> None:
    assert math.isclose(number_at(plain, t), expected, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("t, expected", [(0.0, True), (0.5, False), (0.99, False), (1.0, True)])
def test_words_and_truths_are_picked_not_mixed(t: float, expected: Any) -> None:
    assert value_at([True, False, True], t, spec=NORMALIZE) is expected


def test_synonyms_are_normalised() -> None:
    assert value_at([True, "inverse"], 0.0, spec=RESCALE) == "l1"


@pytest.mark.parametrize("index, layers, expected", [(0, 4, 0.0), (3, 4, 1.0), (1, 3, 0.5), (0, 1, 1.0)], ids=str)
def test_layer_position(index: int, layers: int, expected: Any) -> None:
    assert layer_position(index, layers) == expected


def test_first_filter_that_matches_decides() -> None:
    plain = [{"filter": "self_attn", "value": 1}, {"filter": "q_proj", "value": 2}, {"filter": "*", "value": 3}]
    assert value_at(plain, name=ATTENTION) == 1
    assert value_at(plain, name=MLP) == 3
    assert parse_parameter_value({"filter": "mlp", "value": 1}).at(ATTENTION, 0) is None


def resolve(
    spec: ParameterSpec, *scopes: Any, names: list[str] | None = None, t: float = 0.0, is_adapter: bool = False
) -> Scalar:
    values = [{spec.name: parse_parameter_value(s, spec)} if s is not None else {} for s in scopes]
    return resolve_parameter(spec, scopes=values, names=names or [ATTENTION] * len(scopes), t=t, is_adapter=is_adapter)


def test_scopes_innermost_first() -> None:
    only_mlp = [{"filter": "mlp", "value": 1}]
    assert resolve(WEIGHT, only_mlp, None, 2.0) == 2.0
    assert resolve(WEIGHT, 5, 2.0) == 5.0
    assert resolve(WEIGHT, only_mlp, 2.0, names=[MLP, ATTENTION]) == 1.0, "each scope has its own tensor name"


def test_defaults() -> None:
    assert resolve(DENSITY, None) == 1.0
    assert resolve(WEIGHT, None, is_adapter=True) == 1.0
    with pytest.raises(ManifestError, match="weight has no value"):
        resolve(WEIGHT, {"filter": "mlp", "value": 1}, is_adapter=False)


@pytest.mark.parametrize(
    "plain, places",
    [
        ([], [("", False)]),
        (None, [("", False)]),
        (1.5, [("", True)]),
        ([0.1, 1.5, -1], [("[1]", True), ("[2]", True)]),
        ([0.1, math.nan, math.inf], [("[1]", False), ("[2]", False)]),
        ([0.1, [0.2]], [("[1]", False)]),
        ([{"value": 0.1}, 0.2], [("[1]", False)]),
        ([{"filter": "a"}], [("[0].value", False)]),
        ([{"filter": "a", "value": [0, 7]}], [("[0].value[1]", True)]),
        ({"filter": 3, "value": 0.1, "valeu": 1}, [(".valeu", False), (".filter", False)]),
        ("many", [("", False)]),
        (True, [("", False)]),
    ],
)
def test_refused_at_every_anchor(plain: Any, places: Any) -> None:
    with pytest.raises(ParameterValueError) as caught:
        parse_parameter_value(plain, DENSITY)
    assert [(path, bounds) for path, _, bounds in caught.value.places] == places


def test_counts_are_picked() -> None:
    spec = ParameterSpec(name="n", kind="int", scope="global", doc="", default=1)
    assert value_at([1, 4], 0.9, spec=spec) == 1


_number = st.floats(-5, 5, allow_nan=False)
_anchors = _number | st.lists(_number, min_size=1, max_size=4)
_clause = st.fixed_dictionaries({"value": _anchors}, optional={"filter": st.sampled_from(["*", "mlp", "attn"])})
plain_values = _anchors | _clause | st.lists(_clause, min_size=1, max_size=3)


@given(plain_values)
def test_plain_form_parses_back(plain: Any) -> None:
    value = parse_parameter_value(plain, WEIGHT)
    assert parse_parameter_value(value.as_plain(), WEIGHT) == value


@given(st.lists(_number, min_size=1, max_size=6), st.floats(0, 1))
def test_gradient_equals_the_definition(anchors: list[float], t: float) -> None:
    """Straight lines through (i / (n - 1), anchor i)."""
    expected = anchors[0]
    for i in range(len(anchors) - 1):
        left, right = i / (len(anchors) - 1), (i + 1) / (len(anchors) - 1)
        if left <= t <= right:
            expected = anchors[i] + (anchors[i + 1] - anchors[i]) * (t - left) / (right - left)
    assert ParameterValue.of(1.0).at("", t) == 1.0
    assert math.isclose(number_at(anchors, t), expected, rel_tol=1e-9, abs_tol=1e-9)
