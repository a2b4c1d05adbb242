"""Ranges of configuration values: each message begins with the key, so that its line is found."""

from __future__ import annotations

from moshi_ttt.errors import UserError


def check(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`; the message begins with the key it is about."""
    if not ok:
        raise UserError(message)


def at_least(args: object, minimum: float, *names: str) -> None:
    """Each attribute is None or not below `minimum`."""
    for name in names:
        value = getattr(args, name)
        check(value is None or value >= minimum, f"{name} must be at least {minimum}, got {value}")


def positive(args: object, *names: str) -> None:
    """Each attribute is None or above 0."""
    for name in names:
        value = getattr(args, name)
        check(value is None or value > 0, f"{name} must be positive, got {value}")


def one_of(args: object, name: str, choices: tuple[str, ...]) -> None:
    """The attribute is one of `choices`."""
    value = getattr(args, name)
    check(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
