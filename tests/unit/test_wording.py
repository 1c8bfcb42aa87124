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
