"""Frozen typed dataclasses from nested plain data (what YAML gives), and back. Knows nothing of what they mean.

Types it reads: int, float, str, bool, None-able, Literal, tuple[X, ...], nested dataclasses. Everything else about the
data is refused with one sentence that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml
from etils import epath

from popo_jax.types import UserError


def read_mapping(path: epath.PathLike) -> dict[str, Any]:
    """Nested plain data of a YAML file. Errors: UserError if it cannot be read, is not YAML, or holds no mapping."""
    try:
        data = yaml.safe_load(epath.Path(path).read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} must be a readable config file: {getattr(e, 'strerror', None) or e}") from e
    except yaml.YAMLError as e:
        raise UserError(f"{path} must be YAML: {' '.join(str(e).split())}") from e
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold settings as a mapping, got {type(data).__name__ if data is not None else 'nothing'}")
    return data


def to_plain(x: Any) -> Any:
    """A dataclass, or anything nested in one, as mappings, lists and scalars; `build` reads it back."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: to_plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    return [to_plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def dotted(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings flattened to dotted keys; lists of mappings count their entries."""
    out: dict[str, Any] = {}
    for k, v in data.items():
        if isinstance(v, Mapping) and v:
            out |= dotted(v, f"{prefix}{k}.")
        elif isinstance(v, (list, tuple)) and v and all(isinstance(x, Mapping) for x in v):
            for i, x in enumerate(v):
                out |= dotted(x, f"{prefix}{k}.{i}.")
        else:
            out[prefix + k] = v
    return out


def build(cls: type, data: Mapping[str, Any], where: str, path: str = "") -> Any:
    """An instance of dataclass `cls`. `where` names the data in errors (UserError): unknown key, wrong type."""
    hints, names = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise UserError(f"{where}: unknown key {path}{key}{nearest(key, names)}")
    return cls(**{k: _value(hints[k], v, where, path + k) for k, v in data.items()})


def _value(hint: Any, v: Any, where: str, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = UserError(f"{where}: {path} must be {_spell(hint)}, got {v!r}")
    if origin in (typing.Union, types.UnionType):
        return None if v is None else _one_of([a for a in args if a is not type(None)], v, where, path, wrong)
    if origin is Literal:
        if v not in args:
            raise UserError(f"{wrong}{nearest(str(v), [str(a) for a in args])}")
        return v
    if origin is tuple:
        if not isinstance(v, (list, tuple)):
            raise wrong
        return tuple(_value(args[0], x, where, f"{path}.{i}") for i, x in enumerate(v))
    if dataclasses.is_dataclass(hint):
        if not isinstance(v, Mapping):
            raise wrong
        return build(typing.cast(type, hint), v, where, path + ".")
    if hint is float and isinstance(v, str):  # YAML reads 1e-6 as text
        try:
            return float(v)
        except ValueError:
            raise wrong from None
    if hint is float and isinstance(v, int) and not isinstance(v, bool):
        return float(v)
    if not isinstance(v, hint) or (hint is int and isinstance(v, bool)):
        raise wrong
    return v


def _one_of(hints: list[Any], v: Any, where: str, path: str, wrong: UserError) -> Any:
    if len(hints) == 1:
        return _value(hints[0], v, where, path)
    for hint in hints:
        try:
            return _value(hint, v, where, path)
        except UserError:
            continue
    raise wrong


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _spell(a) for a in args)
    if origin is tuple:
        return f"a list ({_spell(args[0])} each)"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)', or nothing if none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, `over` winning."""
    out = dict(under)
    for k, v in over.items():
        out[k] = merge(out[k], v) if isinstance(v, Mapping) and isinstance(out.get(k), Mapping) else v
    return out


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys to nested mappings: {"a.b": 1} to {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for key, v in flat.items():
        for part in reversed(key.split(".")):
            v = {part: v}
        out = merge(out, v)
    return out
