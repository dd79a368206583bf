import re

import trainer.errors
from trainer.errors import RecordError, TailstreamError

DRAWN_LINE = re.compile(r"^(?P<branches>(?:│   )*)(?P<leaf>[├└]── )?(?P<name>[A-Z]\w+)\b(?P<rest>.*)$", re.MULTILINE)


def drawn() -> dict[str, tuple[str | None, int | None]]:
    """Name -> parent and exit code, as the module's docstring draws them."""
    tree: dict[str, tuple[str | None, int | None]] = {}
    path: list[str] = []
    assert trainer.errors.__doc__
    for line in DRAWN_LINE.finditer(trainer.errors.__doc__.partition("\n\n")[2].partition("\n\n")[2]):
        depth = len(line["branches"]) // 4 + bool(line["leaf"])
        path[depth:] = [line["name"]]
        code = re.search(r"exit (\d+)$", line["rest"])
        tree[line["name"]] = (path[depth - 1] if depth else None, int(code[1]) if code else None)
    return tree


def classes(base: type[TailstreamError] = TailstreamError) -> set[type[TailstreamError]]:
    return {base}.union(*(classes(child) for child in base.__subclasses__()))


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    assert {name: parent for name, (parent, _) in drawn().items()} == {
        error.__name__: None if error is TailstreamError else error.__bases__[0].__name__ for error in classes()
    }


def test_exit_codes_are_those_in_the_docstring_and_children_end_as_their_parents_do() -> None:
    tree = drawn()
    codes = {name: code for name, (_, code) in tree.items() if code is not None}
    assert len(set(codes.values())) == len(codes)
    for error in classes():
        name: str | None = error.__name__
        while name is not None and name not in codes:
            name = tree[name][0]
        assert error.exit_code == (codes[name] if name else 1), error


def test_every_error_is_described_and_raised_errors_keep_their_message() -> None:
    for error in classes() - {RecordError}:
        assert error.__doc__
        assert str(error("what happened")) == "what happened"


def test_a_record_error_says_reason_and_field() -> None:
    error = RecordError("wrong_type", "size: not a number", "size")
    assert (error.reason, error.field, str(error)) == ("wrong_type", "size", "size: not a number")
