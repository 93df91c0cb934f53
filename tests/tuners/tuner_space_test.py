"""Hyperparameters: their values, their conditions, and Optuna's parameters for them."""

import itertools
import math
import sys

import hypothesis
import keras_tuner
import numpy as np
import pytest
from hypothesis import strategies as st
from optuna import distributions

from tfbig import errors
from tfbig.tuners import HyperParameters, _hyperparameters, _json, _space

# Equal in Python, and not the same.
ALIKE = [True, 1, 1.0]


def typed(value):
    """A value in a form that is equal only for the same type and bits."""
    if isinstance(value, float):
        return float, math.isnan(value) or value.hex()
    if isinstance(value, list | tuple):
        return type(value), [typed(v) for v in value]
    if isinstance(value, dict):
        return dict, {k: typed(v) for k, v in value.items()}
    return type(value), value


def only(hyperparameters):
    """The one hyperparameter of a space."""
    (found,) = hyperparameters.space
    return found


def one(kind, *args, **kwargs):
    """A hyperparameter of a kind, with the name "x"."""
    hp = HyperParameters()
    getattr(hp, kind)("x", *args, **kwargs)
    return only(hp)


# --- Texts -------------------------------------------------------------------

KEYS = st.sampled_from(["a", "__tuple__", "__dict__", "__float__"]) | st.text(max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=2)
    ),
    max_leaves=8,
)


@hypothesis.given(VALUES)
def test_a_value_survives_its_text_with_type_and_bits(value):
    assert typed(_json.loads(_json.dumps(value))) == typed(value)


@hypothesis.given(VALUES, VALUES)
def test_two_values_have_one_text_only_if_they_are_the_same(a, b):
    assert (_json.dumps(a) == _json.dumps(b)) == (typed(a) == typed(b))


@pytest.mark.parametrize(("a", "b"), itertools.combinations([*ALIKE, (1,), [1], "1", (True,)], 2))
def test_what_python_holds_for_equal_has_different_texts(a, b):
    assert _json.dumps(a) != _json.dumps(b)


def test_the_order_of_a_dictionary_does_not_matter():
    assert _json.dumps({"a": 1, "b": 2}) == _json.dumps({"b": 2, "a": 1})


def test_scalars_of_numpy_become_those_of_python():
    given = (np.float32(0.1), np.int64(3), np.bool_(True), np.float64(0.1), np.str_("a"))
    expected = (float(np.float32(0.1)), 3, True, 0.1, "a")
    assert typed(_json.canonical(given)) == typed(expected)


@pytest.mark.parametrize("value", [{1}, b"a", object(), 1j, {1: 2}, np.zeros(2)])
def test_what_is_no_json_is_refused_with_its_type(value):
    with pytest.raises(errors.InvalidOptionError, match=type(value).__name__):
        _json.dumps(value)


# --- Choice ------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [None, "a"],
        ["a", None],
        [None],
        [1, "a", 2.5, True],
        [(3, 3), (5, 5)],
        [[1, 2], (1, 2)],
        [{"rate": 0.1}, None],
        ALIKE,
    ],
    ids=str,
)
def test_a_choice_has_its_values_with_their_types(values):
    choice = one("Choice", values)
    assert typed(list(choice.values)) == typed(values)
    default = None if None in values else values[0]
    assert typed(choice.default) == typed(default)
    for value in values:
        assert typed(choice.prob_to_value(choice.value_to_prob(value))) == typed(value)


def test_a_choice_holds_each_value_once():
    assert typed(list(one("Choice", [1, 1, True, (1,), (1,), np.int64(1)]).values)) == typed(
        [1, True, (1,)]
    )


@pytest.mark.parametrize("default", ALIKE, ids=str)
def test_a_default_is_among_the_values_by_type(default):
    assert typed(one("Choice", ALIKE, default=default).default) == typed(default)


def test_none_is_the_default_only_where_it_is_not_told_otherwise():
    assert one("Choice", ["a", None]).default is None
    assert one("Choice", [None, "a"], default="a").default == "a"
    assert one("Choice", ["a", "b"]).default == "a"


@pytest.mark.parametrize(
    ("values", "is_ordered"),
    [([1, 2], True), ([1, 2.5], True), ([True, False], False), ([None, 1], False), (["a"], False)],
)
def test_only_numbers_have_an_order(values, is_ordered):
    assert one("Choice", values).ordered is is_ordered
    if not is_ordered:
        with pytest.raises(errors.InvalidOptionError, match="`ordered` of 'x'"):
            one("Choice", values, ordered=True)


@pytest.mark.parametrize("values", [[], "abc", {"a": 1}, ()])
def test_a_choice_of_nothing_or_of_no_list_is_refused(values):
    with pytest.raises(errors.InvalidOptionError, match="`values` of 'x'"):
        one("Choice", values)


@pytest.mark.parametrize(("values", "default"), [([1, 2], True), (["a"], "b"), ([0.5], 1)])
def test_a_default_that_is_no_value_is_refused(values, default):
    with pytest.raises(errors.InvalidOptionError, match="`default` of 'x'"):
        one("Choice", values, default=default)


def test_a_choice_of_what_is_no_json_is_refused():
    with pytest.raises(errors.InvalidOptionError, match="set"):
        one("Choice", [{1}])


# --- Fixed and Boolean -------------------------------------------------------


@pytest.mark.parametrize("value", [None, True, 1, 1.0, "a", (1, 2), [None]], ids=str)
def test_a_fixed_value_is_any_value(value):
    hp = HyperParameters()
    assert typed(hp.Fixed("x", value)) == typed(value)
    assert typed(hp.get("x")) == typed(value)
    assert typed(only(HyperParameters.of(hp)).default) == typed(value)
    assert _space.parameter_of(only(hp)) is None


def test_a_boolean_has_both_values_and_a_default():
    assert sorted(one("Boolean").values) == [False, True]
    assert one("Boolean").default is False
    assert one("Boolean", default=True).default is True


@pytest.mark.parametrize("default", [1, "True", None])
def test_a_default_of_a_boolean_that_is_none_is_refused(default):
    with pytest.raises(ValueError, match="`default`"):
        one("Boolean", default=default)


# --- Ranges ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "low", "high", "step", "expected"),
    [
        ("Float", 0, 1, 0.1, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("Float", 0.1, 0.7, 0.2, [0.1, 0.3, 0.5, 0.7]),
        ("Float", -0.3, 0.3, 0.1, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]),
        ("Float", 0, 1, 0.3, [0.0, 0.3, 0.6, 0.9]),
        ("Float", 1, 1, 0.5, [1.0]),
        ("Float", 0, 3, 1, [0.0, 1.0, 2.0, 3.0]),
        ("Float", 0, 0.3, np.float64(0.1), [0.0, 0.1, 0.2, 0.3]),
        ("Int", 0, 3, None, [0, 1, 2, 3]),
        ("Int", 6, 13, 3, [6, 9, 12]),
        ("Int", 5, 5, None, [5]),
    ],
)
def test_a_stepped_range_is_what_is_written_with_both_ends(kind, low, high, step, expected):
    hp = one(kind, low, high, step=step)
    assert typed(list(hp.values)) == typed(expected)
    assert typed(list(_space.all_values(hp))) == typed(expected)


@pytest.mark.parametrize(
    ("kind", "sampling", "low", "high", "step", "expected"),
    [
        ("Float", "log", 0.001, 10, 10, [0.001, 0.01, 0.1, 1.0, 10.0]),
        ("Float", "log", 1e-5, 0.5, 10, [1e-5, 1e-4, 1e-3, 1e-2, 0.1]),
        ("Int", "log", 2, 32, 2, [2, 4, 8, 16, 32]),
        ("Int", "log", 1, 1000, 10, [1, 10, 100, 1000]),
        ("Int", "reverse_log", 1, 100, 10, [100, 91, 1]),
    ],
)
def test_geometric_steps_are_what_is_written(kind, sampling, low, high, step, expected):
    hp = one(kind, low, high, step=step, sampling=sampling)
    assert typed(list(hp.values)) == typed(expected)
    assert typed(list(_space.all_values(hp))) == typed(expected)


@pytest.mark.parametrize(("low", "high"), [(1, 3), (2, 1000), (7, 7), (1, 2**20), (3, 10)])
@pytest.mark.parametrize("sampling", ["linear", "log", "reverse_log"])
def test_an_int_never_exceeds_its_ends(low, high, sampling):
    hp = one("Int", low, high, sampling=sampling)
    values = [hp.prob_to_value(p) for p in (0, 0.1, 0.5, 0.99, np.nextafter(1, 0), 1.0)]
    assert all(type(v) is int for v in values)
    assert min(values) >= low
    assert max(values) == high


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("Float", (0.0, 1.0)),
        ("Float", (1e-4, 1.0, None, "log")),
        ("Float", (1e-4, 1.0, None, "reverse_log")),
        ("Int", (1, 1000, None, "log")),
    ],
)
def test_a_range_without_steps_has_ten_values_in_a_grid(kind, args):
    hp = one(kind, *args)
    values = list(_space.grid_values(hp))
    assert values == sorted(set(values))
    assert len(values) == 10
    assert hp.min_value <= values[0] <= values[-1] <= hp.max_value


def test_what_is_endless_is_known_to_be():
    assert _space.all_values(one("Float", 0, 1)) is None
    assert _space.all_values(one("Float", 1e-3, 1, sampling="log")) is None
    assert list(_space.all_values(one("Int", 1, 20, sampling="log"))) == list(range(1, 21))


@pytest.mark.parametrize("step", [None, 2])
def test_a_wide_range_of_ints_is_not_written_out(step):
    values = _space.all_values(one("Int", 0, 300_000, step=step))
    assert len(values) == 300_000 // (step or 1) + 1
    assert sys.getsizeof(values) < 1000


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        ("Float", (1, 0), "min_value"),
        ("Int", (1, 0), "min_value"),
        ("Int", (0.5, 2), "min_value"),
        ("Float", (0, 1, None, "log"), "min_value"),
        ("Float", (1, 2, 0.5, "log"), "step"),
        ("Float", (0, 1, None, "cubic"), "sampling"),
        ("Float", (0, 1, 0), "step"),
        ("Float", (0, 1, -0.1), "step"),
        ("Int", (0, 5, 0), "step"),
        ("Int", (0, 5, -1), "step"),
    ],
)
def test_a_range_that_is_none_is_refused_where_it_is_defined(kind, args, words):
    with pytest.raises(ValueError, match=words):
        one(kind, *args)


# --- Conditions and names ----------------------------------------------------


def test_a_hyperparameter_under_a_condition_is_there_only_where_it_holds():
    hp = HyperParameters()
    hp.Choice("kind", ["a", "b"])
    with hp.conditional_scope("kind", ["a"]):
        assert hp.Int("size", 1, 9) == 1
    with hp.conditional_scope("kind", "b"):
        assert hp.Int("depth", 1, 9) is None
    assert hp.values == {"kind": "a", "size": 1}
    assert "depth" not in hp
    hp.values = {"kind": "b"}
    hp.ensure_active_values()
    assert hp.values == {"kind": "b", "depth": 1}
    with pytest.raises(ValueError, match="inactive"):
        hp.get("size")


@pytest.mark.parametrize("parent", [None, True, 1, 1.0, (1,), "1"], ids=repr)
def test_a_condition_holds_for_a_value_of_its_type_alone(parent):
    hp = HyperParameters()
    choices = [None, *ALIKE, (1,), "1"]
    hp.Choice("kind", choices)
    hp.Int("child", 0, 9, parent_name="kind", parent_values=[parent])
    for value in choices:
        copy = hp.copy()
        copy.values = {"kind": value}
        copy.ensure_active_values()
        assert ("child" in copy.values) == (typed(value) == typed(parent))


def test_conditions_within_conditions_must_all_hold():
    hp = HyperParameters()
    hp.Choice("a", [1, 2])
    with hp.conditional_scope("a", [2]):
        hp.Choice("b", [1, 2])
        with hp.conditional_scope("b", [2]):
            hp.Choice("c", [1, 2])
    found = list(_space.combinations(hp, _space.grid_values))
    assert found == [
        {"a": 1},
        {"a": 2, "b": 1},
        {"a": 2, "b": 2, "c": 1},
        {"a": 2, "b": 2, "c": 2},
    ]


def two_conditions():
    """The same name under two conditions, with different ranges."""
    hp = HyperParameters()
    hp.Choice("kind", ["a", "b"])
    with hp.conditional_scope("kind", ["a"]):
        hp.Int("size", 1, 2)
    with hp.conditional_scope("kind", ["b"]):
        hp.Int("size", 10, 11)
    return hp


def test_a_name_under_two_conditions_has_the_range_of_the_one_that_holds():
    hp = two_conditions()
    assert list(_space.combinations(hp, _space.all_values)) == [
        {"kind": "a", "size": 1},
        {"kind": "a", "size": 2},
        {"kind": "b", "size": 10},
        {"kind": "b", "size": 11},
    ]
    for kind, high in (("a", 2), ("b", 11)):

        def highest(name, distribution, kind=kind):
            return kind if name == "kind" else distribution.high

        assert _space.suggested(highest, hp, {}) == {"kind": kind, "size": high}
    names = {_space.parameter_of(found).name for found in hp.space}
    assert len(names) == 3


def test_a_scope_of_names_is_part_of_the_name():
    hp = HyperParameters()
    with hp.name_scope("encoder"):
        hp.Choice("kind", [None, "a"])
        with hp.conditional_scope("kind", [None]):
            hp.Int("size", 3, 4)
        assert hp.get("size") == 3
    assert hp.values == {"encoder/kind": None, "encoder/size": 3}
    assert [c.name for c in hp.space[1].conditions] == ["encoder/kind"]


def test_a_condition_on_what_is_not_defined_is_refused():
    hp = HyperParameters()
    with pytest.raises(errors.InvalidOptionError, match="'nothing'"):
        hp.Int("x", 0, 1, parent_name="nothing", parent_values=[1])


def rich():
    """Hyperparameters of every kind."""
    hp = HyperParameters()
    hp.Choice("kind", [None, True, 1, 1.0, (1, 2)])
    hp.Choice("default", ["a", None], default="a")
    hp.Float("rate", 1e-5, 1e-1, sampling="log", default=1e-3)
    hp.Float("stepped", 0, 1, step=0.1)
    hp.Float("reversed", 0.1, 0.9, sampling="reverse_log")
    hp.Int("size", 1, 64, step=2, sampling="log")
    hp.Int("width", 6, 13, step=3)
    hp.Int("long", 1, 1000, sampling="log")
    hp.Boolean("flag", default=True)
    hp.Fixed("fixed", (1, None))
    with hp.conditional_scope("kind", [None]):
        hp.Float("child", 0, 1)
    with hp.conditional_scope("kind", [(1, 2), True]):
        hp.Int("child", 0, 1)
    return hp


def test_a_space_survives_its_config():
    hp = rich()
    found = HyperParameters.from_config(_json.loads(_json.dumps(hp.get_config())))
    assert typed(found.get_config()) == typed(hp.get_config())
    assert typed(found.values) == typed(hp.values)
    assert found._exists("child", hp.space[-1].conditions)


def test_a_copy_does_not_change_the_original():
    hp = rich()
    copy = hp.copy()
    copy.values["flag"] = False
    copy.Int("new", 0, 1)
    assert hp.get("flag") is True
    assert "new" not in hp


def test_hyperparameters_of_keras_tuner_become_those_of_tfbig():
    given = keras_tuner.HyperParameters()
    given.Choice("c", ["a", "b"], default="b")
    given.Float("f", 0, 1, step=0.1)
    given.Int("i", 1, 9, parent_name="c", parent_values=["b"])
    given.Boolean("b")
    given.Fixed("x", 3)
    hp = HyperParameters.of(given)
    assert hp.values == given.values
    assert all(type(p).__module__ == _hyperparameters.__name__ for p in hp.space)
    assert list(hp.space[1].values)[3] == 0.3
    hp.values["c"] = "a"
    assert not hp.is_active("i")


def test_what_is_no_hyperparameter_is_refused():
    class Odd(keras_tuner.engine.hyperparameters.HyperParameter):
        pass

    with pytest.raises(errors.InvalidOptionError, match="must be one of"):
        HyperParameters()._retrieve(Odd("x"))


# --- Optuna's parameters -----------------------------------------------------


def edges(distribution):
    """Values of a distribution, among them both of its ends."""
    if isinstance(distribution, distributions.CategoricalDistribution):
        return distribution.choices
    low, high = distribution.low, distribution.high
    middle = (low + high) / 2
    return [low, int(middle) if isinstance(low, int) else middle, high]


@pytest.mark.parametrize("index", range(len(rich().space)))
def test_a_value_becomes_a_parameter_and_the_same_value_again(index):
    hp = rich().space[index]
    parameter = _space.parameter_of(hp)
    if parameter is None:
        assert type(hp).__name__ == "Fixed"
        return
    for value in _space.grid_values(hp):
        told = parameter.encode(value)
        assert parameter.distribution._contains(parameter.distribution.to_internal_repr(told))
        if hp.name == "reversed":
            # A sum of two floats is rounded.
            assert parameter.decode(told) == pytest.approx(value, rel=1e-12)
        else:
            assert typed(parameter.decode(told)) == typed(value)


@pytest.mark.parametrize(
    "hp",
    [
        one("Float", 0, 1, step=0.1),
        one("Float", 0.001, 10, step=10, sampling="log"),
        one("Int", 1, 1000, sampling="log"),
        one("Int", 6, 13, step=3),
        one("Int", 1, 100, step=10, sampling="reverse_log"),
        one("Int", 3, 90, sampling="reverse_log"),
        one("Float", 0.1, 0.7, sampling="reverse_log"),
        one("Float", 0.1, 0.7),
        one("Choice", [None, 1, True, (1, 2)]),
    ],
    ids=repr,
)
def test_what_optuna_suggests_is_in_the_range_and_reaches_both_ends(hp):
    parameter = _space.parameter_of(hp)
    values = [parameter.decode(v) for v in edges(parameter.distribution)]
    wanted = list(hp.values)
    if getattr(hp, "step", 1) is None:
        wanted = [hp.min_value, hp.max_value]
        assert all(hp.min_value <= v <= hp.max_value for v in values)
    found = [typed(v) for v in values]
    assert typed(wanted[0]) in found
    assert typed(wanted[-1]) in found


def test_plain_values_stay_readable_in_the_study():
    assert _space.parameter_of(one("Choice", [None, 1, "a"])).distribution.choices == (None, 1, "a")
    assert _space.parameter_of(one("Float", 1e-4, 1, sampling="log")) == _space.Parameter(
        "x",
        distributions.FloatDistribution(1e-4, 1, log=True),
        _space._unchanged,
        _space._unchanged,
    )


def test_values_that_optuna_holds_for_equal_are_told_apart():
    parameter = _space.parameter_of(one("Choice", ALIKE))
    assert len(set(parameter.distribution.choices)) == 3
    assert typed([parameter.decode(c) for c in parameter.distribution.choices]) == typed(ALIKE)


def test_a_range_that_moved_keeps_its_name_and_other_choices_get_a_new_one():
    known = {"x": distributions.FloatDistribution(0, 1)}
    assert _space.parameter_of(one("Float", 0, 5), known).name == "x"
    assert _space.parameter_of(one("Int", 0, 5), known).name == "x #2"
    known = {
        "x": distributions.CategoricalDistribution([1, 2]),
        "x #2": distributions.CategoricalDistribution([3, 4]),
    }
    assert _space.parameter_of(one("Choice", [1, 2]), known).name == "x"
    assert _space.parameter_of(one("Choice", [3, 4]), known).name == "x #2"
    assert _space.parameter_of(one("Choice", ["a", "b", "c"]), known).name == "x #3"


def test_values_with_an_order_are_searched_by_their_index():
    parameter = _space.parameter_of(one("Choice", [16, 64, 256]))
    assert parameter.name == "x (index in 16, 64, 256)"
    assert parameter.distribution == distributions.IntDistribution(0, 2)
    assert [parameter.decode(i) for i in range(3)] == [16, 64, 256]
    assert [parameter.encode(v) for v in (256, 16)] == [2, 0]
    # In whatever order they are listed.
    assert _space.parameter_of(one("Choice", [64, 256, 16])).decode(1) == 64
    # Other values are another parameter, also if there are as many of them, or very many.
    assert _space.parameter_of(one("Choice", [1, 2, 3])).name != parameter.name
    many = [_space.parameter_of(one("Choice", list(range(i, i + 500)))).name for i in (0, 1)]
    assert many[0] != many[1]
    assert max(map(len, many)) < 50
    # Two values are neighbours in any case, and some have no order.
    for values in ([1, 2], ["a", "b", "c"]):
        distribution = _space.parameter_of(one("Choice", values)).distribution
        assert distribution == distributions.CategoricalDistribution(values)
    hp = HyperParameters()
    hp.Choice("x", [16, 64, 256], ordered=False)
    distribution = _space.parameter_of(hp.space[0]).distribution
    assert distribution == distributions.CategoricalDistribution([16, 64, 256])


def test_values_are_told_to_the_study_unless_they_are_outside():
    hp = HyperParameters()
    hp.Float("rate", 0, 1, default=7.0)
    hp.Float("stepped", 0, 1, step=0.1)
    hp.Choice("kind", ["a", (1,)])
    hp.Fixed("fixed", 3)
    with hp.conditional_scope("kind", ["a"]):
        hp.Int("size", 1, 3)
    values = {"rate": 7.0, "stepped": 0.3, "kind": (1,), "fixed": 3}
    params, by_name = _space.parameters_of(hp, values, {})
    assert params == {"stepped (step)": 3, "kind": _json.dumps((1,))}
    assert params.keys() == by_name.keys()
    params, _ = _space.parameters_of(hp, values | {"kind": "a", "size": 2, "rate": 0.5}, {})
    assert params.keys() == {"kind", 'size [kind: "a"]', "rate", "stepped (step)"}


def test_a_suggestion_asks_for_what_is_active_alone():
    asked = []

    def first(name, distribution):
        asked.append(name)
        return edges(distribution)[0]

    values = _space.suggested(first, rich(), {})
    assert typed(values) == typed(
        {
            "kind": None,
            "default": "a",
            "rate": 1e-5,
            "stepped": 0.0,
            "reversed": 0.9,
            "size": 1,
            "width": 6,
            "long": 1,
            "flag": False,
            "fixed": (1, None),
            "child": 0.0,
        }
    )
    assert len(asked) == len(set(asked)) == 10


# --- Combinations ------------------------------------------------------------


def test_combinations_are_all_of_them_once_the_defaults_first():
    hp = HyperParameters()
    hp.Choice("a", [None, True, 1], default=1)
    hp.Float("b", 0, 0.2, step=0.1, default=0.1)
    hp.Fixed("c", "c")
    found = list(_space.combinations(hp, _space.all_values))
    assert typed(found[0]) == typed({"a": 1, "b": 0.1, "c": "c"})
    assert typed(_space.default_values(hp)) == typed(found[0])
    expected = {_json.dumps([a, b, "c"]) for a in (None, True, 1) for b in (0.0, 0.1, 0.2)}
    assert len(found) == 9
    assert {_json.dumps(list(f.values())) for f in found} == expected


def test_a_default_outside_of_the_grid_is_a_point_of_its_own():
    hp = HyperParameters()
    hp.Float("a", 0, 1, step=0.5, default=0.25)
    assert [f["a"] for f in _space.combinations(hp, _space.grid_values)] == [0.25, 0.0, 0.5, 1.0]


def test_no_hyperparameters_have_one_combination():
    assert list(_space.combinations(HyperParameters(), _space.grid_values)) == [{}]
