"""Tables and pictures between results replace those of an earlier run, and nothing else."""

import pytest

from qtool.checkpoint.many_results import check_collection, check_table, held
from qtool.errors import OutputError


@pytest.mark.parametrize(
    ("table", "picture", "is_free"),
    [
        (None, None, True),
        ('{"sizes": [], "failures": {}}', None, True),
        ('{"sizes": [], "failures": {}}', "drawn", True),
        (None, "mine", False),
        ('{"sizes": []}', None, False),
        ("[1]", "mine", False),
        ("", None, False),
    ],
)
def test_what_an_earlier_run_has_not_written_is_kept(table, picture, is_free, tmp_path):
    for name, content in (("t.json", table), ("t.png", picture)):
        if content is not None:
            (tmp_path / name).write_text(content)
    if is_free:
        check_table(tmp_path / "t.json", ("sizes", "failures"), drawn=("t.png",))
    else:
        with pytest.raises(OutputError, match=r"isn't of an earlier run .* Move it away"):
            check_table(tmp_path / "t.json", ("sizes", "failures"), drawn=("t.png",))


def test_a_folder_of_that_name_or_a_link_to_nowhere_is_no_table(tmp_path):
    (tmp_path / "t.json").mkdir()
    (tmp_path / "u.json").symlink_to("nowhere")
    for name in ("t.json", "u.json"):
        with pytest.raises(OutputError, match=name):
            check_table(tmp_path / name, ())


def test_one_run_at_a_time_writes_there(tmp_path):
    check_collection(tmp_path / "new/er", "a grid")
    assert list(tmp_path.iterdir()) == []
    with (
        held(tmp_path / "new/er"),
        pytest.raises(OutputError, match="Another run is writing"),
        held(tmp_path / "new/er"),
    ):
        pytest.fail("two at once")
    with held(tmp_path / "new/er"):
        pass


def test_a_checkpoint_takes_no_others(checkpoint):
    with pytest.raises(OutputError, match="is a checkpoint, and a sweep writes"):
        check_collection(checkpoint, "a sweep")
