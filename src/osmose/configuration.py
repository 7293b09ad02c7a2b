"""Configuration: frozen, validated, typed models that serialise to JSON and build the part they describe.

A part that comes in several kinds (a network, a schedule, a method) has a `Registry`: a table from its tag to
the place of its configuration class. The table holds strings, so listing the choices imports nothing heavy; the
module is imported when a configuration of that kind is validated.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from osmose.errors import UserError, nearest


class ConfigError(UserError, ValueError):
    """A configuration value that is refused: `path` says where, `reason` what was given and what is right.

    A `ValueError` besides, so that pydantic takes what a part raises for an error of the field that holds the part.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}" if path else reason)
        self.path, self.reason = path, reason


class Config(BaseModel):
    """Base of every configuration: immutable, unknown fields refused, no NaN or infinity, plain JSON."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Any:
        """Validate a mapping.

        Raises:
            ConfigError: one line with the field's path, the value given and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _first_line(error, cls) from None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values (dictionaries, lists, numbers, strings), such that `parse` gives an equal object."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Any:
        """A validated copy with some fields changed; a dotted name (`"solver.eta"`) reaches into a part."""
        return type(self).parse(override(self.to_json(), changes))


def _first_line(error: ValidationError, cls: type[BaseModel]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    path = ".".join(_named(cls, first["loc"]))
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # of a part in this field: its path continues ours
        return ConfigError(".".join(filter(None, (path, inner.path))), inner.reason)
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(cls, first["loc"][:-1])
        return ConfigError(path, f"unknown field; {nearest(str(first['loc'][-1]), allowed)}")
    if first["type"] == "missing":
        return ConfigError(path, "required, but not given")
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be ", "should be ")
    return ConfigError(path, f"{shown} is not valid: {reason}" if path else reason)


def _named(cls: type[BaseModel], location: tuple[str | int, ...]) -> Iterator[str]:
    """The parts of an error's location, without those that say which member of a union refused the value."""
    holder: Any = cls
    for part in location:
        if get_origin(holder) in (Union, UnionType):
            members = [member for member in get_args(holder) if member is not type(None)]
            if len(members) > 1 and isinstance(part, str):
                continue
            holder = members[0]
        if isinstance(holder, type) and issubclass(holder, BaseModel) and part in holder.model_fields:
            holder = holder.model_fields[str(part)].annotation
        yield str(part)


def _fields_at(cls: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        annotation = cls.model_fields[str(part)].annotation if str(part) in cls.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        cls = annotation
    return list(cls.model_fields)


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested `values` with dotted `changes` applied.

    A plain string given for a part that has a `kind` selects that kind with its own defaults
    (`{"schedule": "cosine"}`), unless it has that kind already. Kinds are chosen first, outer ones before inner ones,
    and fields set after (`{"schedule.num_steps": 100}`), whatever the order in which they are given.
    """
    result = json.loads(json.dumps(values))

    def selects(path: str, value: Any) -> bool:
        return path.endswith(".kind") or (isinstance(value, str) and isinstance(value_at(result, path), dict))

    ordered = sorted(changes.items(), key=lambda change: (not selects(*change), change[0].count(".")))
    for path, value in ordered:
        *parents, leaf = path.split(".")
        place = result
        for depth, parent in enumerate(parents):
            inner = place.get(parent)
            if isinstance(inner, str):
                inner = {"kind": inner}
            elif inner is None:
                inner = {}
            elif not isinstance(inner, dict):
                raise ConfigError(path, f"{'.'.join(parents[: depth + 1])} is a plain value without fields")
            place[parent] = inner
            place = inner
        if leaf == "kind" and place.get("kind") != value:
            place.clear()
        held = place.get(leaf)
        if isinstance(held, dict) and isinstance(value, str):
            value = held if held.get("kind") == value else {"kind": value}
        place[leaf] = value
    return result


def value_at(values: Any, path: str) -> Any:
    """What nested `values` hold at a dotted path, None where there is nothing."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def read_override(text: str) -> tuple[str, Any]:
    """Split `"network.channels=64"` into its path and value.

    Values are JSON where they parse as JSON (`true`, `3`, `[1,2]`), a list where they hold a comma
    (`1,2,2`), and otherwise the string itself.
    """
    path, equals, value = text.partition("=")
    if not equals or not path or any(not part.isidentifier() for part in path.split(".")):
        raise UserError(f"override {text!r}: write it as path.to.field=value, for example network.channels=64")
    return path, _read_value(value)


def _read_value(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return [_read_value(item) for item in value.split(",") if item] if "," in value else value


@dataclass(frozen=True)
class Preset:
    """A name for values of a part: a mapping with a `kind`, and what it is, in one line."""

    values: Mapping[str, Any]
    summary: str


@dataclass(frozen=True)
class Entry:
    """One choice of a registry: where its configuration class lives and what it is, in one line."""

    target: str
    summary: str


class Registry:
    """The kinds that one part comes in.

    Used as a pydantic validator on a field: it accepts a configuration object, a mapping with a `kind`, or the
    kind alone as a string. The name of a preset is as good as a kind: its values take the place of the kind's defaults,
    and the configuration has the kind that they say.

    Args:
        noun: what one of them is called.
        entries: kind -> (place of its configuration class, summary).
        presets: name -> (values with a registered `kind`, summary).
    """

    everything: ClassVar[dict[str, Registry]] = {}

    def __init__(
        self,
        noun: str,
        entries: Mapping[str, tuple[str, str]],
        presets: Mapping[str, tuple[Mapping[str, Any], str]] | None = None,
    ):
        self.noun = noun
        self.entries = {kind: Entry(*entry) for kind, entry in entries.items()}
        self.presets = {name: Preset(*preset) for name, preset in (presets or {}).items()}
        Registry.everything[noun] = self

    @property
    def choices(self) -> dict[str, str]:
        """What may stand for a kind, kinds first, each with its summary."""
        kinds = {kind: entry.summary for kind, entry in self.entries.items()}
        return kinds | {name: preset.summary for name, preset in self.presets.items()}

    def resolve(self, kind: str) -> Any:
        """Import and return what `kind` names.

        Raises:
            UserError: `kind` is not registered; the message names the nearest one that is.
        """
        if kind not in self.entries:
            raise UserError(f"unknown {self.noun} {kind!r}; {nearest(kind, self.choices)}")
        module, _, name = self.entries[kind].target.partition(":")
        return getattr(importlib.import_module(module), name)

    def parse(self, value: Any) -> Any:
        """Turn a kind, a mapping with a `kind`, or a configuration object into a configuration object.

        Raises:
            ConfigError: no such kind or preset, or values that the kind refuses.
        """
        if isinstance(value, Config):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise ConfigError("kind", f"missing; choose one of {', '.join(sorted(self.choices))}")
        if value["kind"] in self.presets:
            preset = self.presets[value["kind"]].values
            value = {**preset, **value, "kind": preset["kind"]}
        try:
            cls = self.resolve(value["kind"])
        except ConfigError:
            raise
        except UserError as error:
            raise ConfigError("kind", str(error)) from None
        return cls.parse(value)
