import errno

from hypothesis import given
from hypothesis import strategies as st

from qtool import wording

VALUES = st.text() | st.integers() | st.floats() | st.lists(st.text()) | st.none()


def test_foreign_errors_become_one_short_line():
    assert wording.reason(ValueError("a\n  b\tc.")) == "a b c"
    assert wording.reason(ValueError()) == "ValueError"
    assert wording.reason(OSError(errno.EIO, "Input/output error", "/a")) == "Input/output error"
    assert wording.reason(ValueError("x" * 1000)).endswith("...")


@given(VALUES)
def test_whatever_is_shown_is_printable_and_short(value):
    for text in (wording.shown(value), wording.quoted(value), wording.reason(ValueError(value))):
        assert text.isprintable()
        assert text.strip()
        assert 0 <= len(text) <= wording.LONGEST_REASON + len("...")


def test_huge_number_is_quoted_too():
    assert wording.quoted(10**5000) == "a huge int"


def test_names_beyond_the_third_are_counted():
    assert wording.list_names("abc") == "a, b, c"
    assert wording.list_names("abcde") == "a, b, c and 2 more"


@given(st.floats(1, 1e16))
def test_a_size_has_no_power_of_ten_and_three_digits_that_count(num_bytes):
    number, unit = wording.gigabytes(num_bytes).split()
    assert "e" not in number
    assert unit == "GB" or float(number) < 1000
    size = float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert abs(size - num_bytes) <= 0.00501 * num_bytes


def test_sizes_just_below_a_unit_are_of_that_unit():
    told = [wording.gigabytes(size) for size in (999.4e3, 999.6e3, 999.6e6, 999.6e9, 2.5e12)]
    assert told == ["999 kB", "1 MB", "1 GB", "1000 GB", "2500 GB"]
