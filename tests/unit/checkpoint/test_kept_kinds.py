"""Weights that are alike are one line, and no weight is lost on the way."""

from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st

from qtool.checkpoint.kept_kinds import kept_kinds

NAMES = st.lists(st.sampled_from(["layers", "0", "1", "23", "mlp", "gate", "a*"]), min_size=1)


@given(st.dictionaries(NAMES.map(".".join), st.sampled_from(["skipped", "a table"])))
def test_every_weight_is_of_one_kind_that_says_its_reason(reasons):
    kinds = kept_kinds(reasons)
    assert sorted(name for kind in kinds for name in kind.names) == sorted(reasons)
    for kind in kinds:
        for name in kind.names:
            assert reasons[name] == kind.why
            assert fnmatchcase(name, kind.kind)
    assert len({(kind.kind, kind.why) for kind in kinds}) == len(kinds)


def test_numbers_that_differ_are_a_star_and_others_stay():
    reasons = {f"layers.{i}.mlp.2.gate.weight": "router" for i in range(12)}
    (kind,) = kept_kinds(reasons)
    assert kind.kind == "layers.*.mlp.2.gate"
    assert len(kind.names) == 12
    (alone,) = kept_kinds({"layers.0.conv1d.weight": "small"})
    assert alone.kind == "layers.0.conv1d"
