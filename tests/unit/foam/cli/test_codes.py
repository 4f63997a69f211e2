import pytest

from capability_schemas.errors import (
    BrokerUnavailable,
    ConfigurationError,
    Conflict,
    ErrorCode,
    FoamError,
    NotFound,
    Overloaded,
    TaskCancelled,
    TooLarge,
    error_from_wire,
)
from foam.cli.codes import CODES_EPILOG, exit_code


def test_every_wire_code_has_its_own_exit_code() -> None:
    codes = {code: exit_code(error_from_wire(code, "x", False, {})) for code in ErrorCode}
    assert len(set(codes.values())) == len(ErrorCode)
    assert codes[ErrorCode.CANCELLED] == 130
    assert codes[ErrorCode.NO_CAPABLE_NODE] == 11
    assert not {0, 2} & set(codes.values())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("x"), 20),
        (Conflict("x"), 21),
        (BrokerUnavailable("x"), 22),
        (NotFound("x"), 23),
        (TooLarge("task", size_bytes=2, limit_bytes=1), 14),
        (Overloaded("x"), 15),
        (TaskCancelled("x"), 130),
        (FoamError("x"), 1),
    ],
)
def test_errors_found_here_tell_what_to_mend(error: FoamError, code: int) -> None:
    assert exit_code(error) == code


def test_help_lists_every_code() -> None:
    for code in ("10 ", "17 ", "22 ", "130 "):
        assert code in CODES_EPILOG
