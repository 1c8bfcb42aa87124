from pathlib import Path

import pytest

from qtool.modeling.licence import read_licence


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("README.md", "---\nlicense: mit\ntags: [x]\n---\n# Hi", {"license": "mit"}),
        ("README.md", "---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("README.md", "---\nlicense: [mit]\n---\n", {}),
        ("README.md", "---\nlicense: {\n---\n", {}),
        ("README.md", "---\n" + "[" * 5000 + "\n---\n", {}),
        ("README.md", "license: mit\n", {}),
        ("README.md", "---", {}),
        ("LICENSE", "   Apache License\n  Version 2.0, January 2004", {"license": "apache-2.0"}),
        ("LICENSE.md", "MIT License\n\nCopyright", {"license": "mit"}),
        ("LICENSE", "Some terms, unlike the MIT License", {}),
    ],
)
def test_licence_is_read_where_models_say_it(tmp_path: Path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_licence(tmp_path) == expected


def test_model_that_says_nothing_of_a_licence_has_none(tmp_path):
    assert read_licence(tmp_path) == {}
