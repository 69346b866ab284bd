"""The one exception for users' mistakes: what it is, and that every one of its texts is a line."""

import ast
from pathlib import Path

import pytest

from jaxft.core import processes
from jaxft.core.errors import UserError

PACKAGE = Path(__file__).resolve().parents[2] / "jaxft"


def test_it_is_a_value_error_that_commands_print_as_one_line(capsys):
    def fails(argv):
        raise UserError(f"{argv[0]} is wrong")

    with pytest.raises(ValueError, match="x is wrong"):
        fails(["x"])
    assert processes.command(fails, ["x"]) == 2
    assert capsys.readouterr() == ("", "jaxft: x is wrong\n")


def test_control_characters_of_foreign_names_are_escaped():
    assert str(UserError("a\nb\x1b[2J é \ud800")) == r"a\nb\x1b[2J é \ud800"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_text_has_a_line_break_or_is_empty(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
            assert len(node.args) in (1, 2), f"{path}:{node.lineno}"  # a text and an exit status
            constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            texts = [text for text in constants if isinstance(text, str)]
            assert not any("\n" in text for text in texts), f"{path}:{node.lineno}"


def fails(argv):
    raise ZeroDivisionError("a fault\nof jaxft")


def test_an_unexpected_error_is_one_line_with_the_file_of_its_traceback(capsys):
    assert processes.command(fails, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxft: unexpected ZeroDivisionError: a fault; the traceback is in ")
    file = Path(line.split(" is in ")[1].partition(",")[0])
    assert "in fails" in file.read_text() and "--debug" in line
    file.unlink()


def test_debug_raises_it(capsys):
    with pytest.raises(ZeroDivisionError):
        processes.command(fails, ["--debug"])
