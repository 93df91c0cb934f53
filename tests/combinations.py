"""Which combinations of values are tested in the ordinary run; the slow one has all of them."""

import itertools

import pytest


def pairwise(others=(), **dimensions):
    """A list of combinations in which, or in others, every pair of values occurs.

    Greedy: takes a pair that is missing, then the values that make up most missing
    pairs with it.
    """
    names = list(dimensions)
    pairs = itertools.combinations(names, 2)
    # A dictionary, for its order: the list must be the same in every process.
    missing = dict.fromkeys(
        frozenset(pair)
        for a, b in pairs
        for pair in itertools.product(
            [(a, value) for value in dimensions[a]], [(b, value) for value in dimensions[b]]
        )
    )
    for row in others:
        for pair in itertools.combinations(zip(names, row, strict=True), 2):
            missing.pop(frozenset(pair), None)
    rows, counts = [], dict.fromkeys(((n, v) for n in names for v in dimensions[n]), 0)
    while missing:
        chosen = dict(next(iter(missing)))
        for name in sorted(set(names) - set(chosen), key=names.index):

            def gain(value, name=name, chosen=chosen):
                new = sum(frozenset([(name, value), c]) in missing for c in chosen.items())
                return new, -counts[name, value]

            chosen[name] = max(dimensions[name], key=gain)
        for pair in itertools.combinations(chosen.items(), 2):
            missing.pop(frozenset(pair), None)
        for item in chosen.items():
            counts[item] += 1
        rows.append(tuple(chosen[name] for name in names))
    return rows


def in_turn(dimensions, slow=()):
    """Parametrizes a test with all combinations of values, of which most are slow.

    Of two dimensions, the values of the longer one meet those of the other in turn. Of more,
    every pair of values occurs in the ordinary run. Four replicas meet the same values as two.

    Args:
        dimensions: A dictionary from the argument of the test to a list of values, or to a
            dictionary from ids to values. Of several arguments, "a, b", a value is a tuple.
        slow: Ids that the ordinary run leaves out.
    """
    values = {
        n: v if isinstance(v, dict) else {str(x): x for x in v} for n, v in dimensions.items()
    }
    keys = {n: [k for k in v if k not in ("mirrored_4", *slow)] for n, v in values.items()}
    if len(keys) > 2:
        ordinary = pairwise(**keys)
    else:
        first, second = keys.values()
        count = max(len(first), len(second))
        ordinary = [(first[i % len(first)], second[i % len(second)]) for i in range(count)]
    params = []
    for row in itertools.product(*values.values()):
        as_two = tuple("mirrored_2" if key == "mirrored_4" else key for key in row)
        arguments = []
        for name, key in zip(values, row, strict=True):
            value = values[name][key]
            arguments += value if "," in name else [value]
        marks = [] if as_two in ordinary else [pytest.mark.slow]
        params.append(pytest.param(*arguments, id="-".join(row), marks=marks))
    return pytest.mark.parametrize(", ".join(values), params)
