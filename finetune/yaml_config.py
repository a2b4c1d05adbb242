"""A yaml file and command line overrides into nested dataclasses; every mistake is located."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from moshi_ttt.errors import UserError

T = TypeVar("T")
_NOTHING = (None, "", "null", "none", "None")
_NONE_IS_A_VALUE = ("ttt.polynomial",)
"""Keys of which the word `none` is a value; of all others it is null."""
_FALSE, _TRUE = (False, "false", "False", "off"), (True, "true", "True", "on")


class Values:
    """Nested plain values and where each came from.

    Attributes:
        tree: nested dictionaries of what was given.
        origins: dotted key -> `"file:line"` or `"--key"`; the empty key is the file.
    """

    def __init__(self, tree: dict[str, Any], origins: dict[str, str]) -> None:
        self.tree = tree
        self.origins = origins

    @classmethod
    def read(cls, path: Path) -> Values:
        """Read a yaml file.

        Raises:
            UserError: the file is missing, not yaml, not a mapping, or has a key twice.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such config file")
        origins = {"": str(path)}
        try:
            text = path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            tree = yaml.safe_load(text)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not text in UTF-8: {error}") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{path}{line}: not yaml: {error.problem}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not yaml: {error}") from error
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:1: a config is a mapping of keys to values, got {tree!r}")
        _mark_lines(node, "", path, origins)
        return cls(tree, origins)

    def override(self, key: str, value: object) -> None:
        """Set a dotted key, as `--key value` does; sections on its way are made."""
        *sections, last = key.split(".")
        tree = self.tree
        for section in sections:
            if not isinstance(tree.get(section), dict):
                tree[section] = {}
            tree = tree[section]
        tree[last] = value
        self.origins[key] = f"--{key}"

    def where(self, key: str) -> str:
        """The place of a dotted key, else of the section around it, else the file."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins[key]

    def build(self, cls: type[T]) -> T:
        """The dataclass `cls` of these values.

        Raises:
            UserError: unknown or missing key, wrong type, or what `__post_init__` refused.
        """
        return self._dataclass(cls, self.tree, "")

    def _dataclass(self, cls: type[T], tree: Mapping[str, Any], prefix: str) -> T:
        hints = get_type_hints(cls)
        known = {f.name: f for f in fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
        for key, value in tree.items():
            if key not in known:
                raise UserError(
                    f"{self.where(prefix + str(key))}: unknown key '{prefix}{key}' "
                    f"(value {value!r}){self._nearest(str(key), list(known), prefix, cls)}"
                )
        for name, field in known.items():
            if name not in tree and field.default is field.default_factory is MISSING:
                raise UserError(f"{self.where(prefix)}: the key '{prefix}{name}' is missing")
        given = {k: self._convert(v, hints[k], prefix + k) for k, v in tree.items()}
        try:
            return cls(**given)
        except ValueError as error:  # its message begins with the name of the key
            key = str(error).split(" ", 1)[0]
            raise UserError(f"{self.where(prefix + key)}: {prefix}{error}") from error

    def _nearest(self, key: str, known: list[str], prefix: str, cls: type) -> str:
        """A key of that name in a section here, else the one spelled most like it."""
        names = [
            f"{section}.{key}"
            for section, hint in get_type_hints(cls).items()
            for arm in (get_args(hint) or (hint,))
            if is_dataclass(arm) and key in {f.name for f in fields(arm)}
        ]
        names += difflib.get_close_matches(key, known, n=1)
        return f"; did you mean '{prefix}{names[0]}'?" if names else f"; known: {', '.join(known)}"

    def _convert(self, value: Any, hint: Any, key: str) -> Any:
        try:
            return self._typed(value, hint, key)
        except _WrongType as error:
            raise UserError(
                f"{self.where(key)}: {key} must be {error.wanted}, got {value!r}"
            ) from error

    def _typed(self, value: Any, hint: Any, key: str) -> Any:
        if get_origin(hint) in (Union, types.UnionType):
            return self._union(value, get_args(hint), key)
        if get_origin(hint) is tuple:
            return self._tuple(value, get_args(hint), key)
        if is_dataclass(hint):
            if value in _NOTHING:
                value = {}
            if not isinstance(value, Mapping):
                raise _WrongType("a section of keys")
            return self._dataclass(hint, value, f"{key}.")  # pyright: ignore[reportArgumentType]
        return _SCALARS[hint](value)

    def _union(self, value: Any, arms: tuple[Any, ...], key: str) -> Any:
        section = any(is_dataclass(a) for a in arms)
        if key in _NONE_IS_A_VALUE and value in ("none", "None"):
            return "none"
        if type(None) in arms and (value in _NOTHING or (section and value in _FALSE)):
            return None
        if section and value in _TRUE:
            value = {}
        wanted = []
        rest = [a for a in arms if a is not type(None)]
        for arm in sorted(rest, key=lambda a: a is str):  # text takes the most: it comes last
            try:
                if arm is str and len(rest) > 1 and not isinstance(value, str):
                    raise _WrongType("text")
                return self._typed(value, arm, key)
            except _WrongType as error:
                wanted.append(error.wanted)
        raise _WrongType(" or ".join(wanted + ["null"] * (type(None) in arms)))

    def _tuple(self, value: Any, items: tuple[Any, ...], key: str) -> tuple[Any, ...]:
        if isinstance(value, str) and value.startswith("["):
            value = yaml.safe_load(value)
        if not isinstance(value, (list, tuple)):
            raise _WrongType("a list")
        hints = [items[0]] * len(value) if items[1:] == (...,) else items
        if len(hints) != len(value):
            raise _WrongType(f"a list of {len(hints)}")
        return tuple(self._typed(v, h, key) for v, h in zip(value, hints, strict=True))


class _WrongType(Exception):
    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


def _mark_lines(node: yaml.MappingNode, prefix: str, path: Path, origins: dict[str, str]) -> None:
    for key_node, value_node in node.value:
        key, where = f"{prefix}{key_node.value}", f"{path}:{key_node.start_mark.line + 1}"
        if key in origins:
            raise UserError(f"{where}: the key '{key}' stands here a second time")
        origins[key] = where
        if isinstance(value_node, yaml.MappingNode):
            _mark_lines(value_node, f"{key}.", path, origins)


def _bool(value: Any) -> bool:
    if isinstance(value, (bool, str)) and value in _FALSE + _TRUE:
        return value in _TRUE
    raise _WrongType("true or false")


def _float(value: Any) -> float:
    # yaml 1.1 reads 2e-6 as text
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _WrongType("a number")
    return number


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        number = _float(value)
    except _WrongType:
        number = math.nan
    if not number.is_integer():
        raise _WrongType("a whole number")
    return int(number)


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # fire reads `--run_dir 7` as a number
    raise _WrongType("text")


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}
