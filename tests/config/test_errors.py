"""`first_line` of an error, for any message."""

import pytest

from simpo.config.errors import ConfigError, DataError, RunError, SimpoError, Stopped, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n\n  two  \nthree"), "two"),
        (ValueError("field 'a':\n\n  wants int\nthree"), "field 'a': wants int"),
        (ValueError("one:"), "one:"),
        (ValueError(""), "ValueError"),
        (KeyError(), "KeyError"),
        (OSError("\n"), "OSError"),
    ],
)
def test_first_line(error, line):
    assert first_line(error) == line


def test_exit_codes():
    errors = (SimpoError(), ConfigError(["a", "b"]), DataError("x"), RunError("x"))
    assert [error.exit_code for error in errors] == [1, 2, 2, 1]
    assert str(errors[1]) == "a\nb"
    assert Stopped("x", 75).exit_code == 75
