"""Where settings come from: flag before environment before file before default.

Each value keeps its origin, so that `meshbpf config view --origin` can show
it and an error can name the line or the variable that is wrong. A key that
nobody knows is refused: a typing error must not pass for a default. Unknown
MESHBPF_ variables are not, for Kubernetes makes such ones itself in pods of a
namespace with a Service named meshbpf.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from meshbpf.agent import config_place, config_ztunnel
from meshbpf.agent.config import DEFAULT_STATE_DIR, Exemptions, OptionError, Settings
from meshbpf.agent.config_keys import (
    BY_NAME,
    CERTIFICATE_SOURCES,
    EXEMPT_FIELDS,
    KEYS,
    STATE_SOURCES,
    Value,
    misplaced,
)
from meshbpf.agent.core.errors import ConfigError

FLAG = "flag"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Resolved:
    """All settings of `run` by key, in the order of the table."""

    values: Mapping[str, Value] = field(default_factory=dict)
    file: Path | None = None
    """The file that was read; None when there was none."""

    def settings(self) -> Settings:
        """What `run` works with. Raises ConfigError naming the origin of what is wrong."""
        if self.values["proxy"].value == "ztunnel":
            self._none_of(CERTIFICATE_SOURCES)
        else:
            self._one_of(CERTIFICATE_SOURCES, "certificates come")
        self._one_of(STATE_SOURCES, "mesh state comes")
        given: dict[str, Any] = {}
        exempt: dict[str, Any] = {}
        origins: dict[str, str] = {"exempt": DEFAULT}
        for key in KEYS:
            found = self.values[key.name]
            if part := EXEMPT_FIELDS.get(key.field):
                exempt[part] = found.value
                if found.origin != DEFAULT:
                    origins["exempt"] = found.origin
            else:
                given[key.field] = found.value
                origins[key.field] = found.origin
        try:
            return Settings(**given, exempt=Exemptions(**exempt), origins=origins)
        except OptionError as error:
            origin = self.values[error.option].origin
            if origin in (FLAG, DEFAULT):
                raise
            raise misplaced(origin, error.option, error) from None

    def _one_of(self, sources: Sequence[str], what: str) -> None:
        given = [name for name in sources if self.values[name].value]
        if not given:
            raise self._missing(*sources)
        if len(given) > 1:
            places = [f"{name} ({self.values[name].origin})" for name in given]
            raise OptionError(
                given[1],
                str(self.values[given[1]].value),
                f"{what} from one source, and these are set: {', '.join(places)}",
            )

    def _none_of(self, sources: Sequence[str]) -> None:
        for name in sources:
            if found := self.values[name].value:
                raise OptionError(
                    name, str(found), "with --proxy=ztunnel it is ztunnel that has certificates"
                )

    def _missing(self, *names: str) -> ConfigError:
        first = BY_NAME[names[0]]
        others = "".join(f" (or {BY_NAME[name].option})" for name in names[1:])
        return ConfigError(
            "missing-setting",
            f"{' or '.join(names)} is set nowhere",
            f"give {first.option}{others}, {first.environment}, or {first.name} in "
            f"{self.file or config_place.DEFAULT_FILE}",
        )


def resolve(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
) -> Resolved:
    """Merge all sources.

    `flags` holds parsed values by field of Settings, those alone that were
    given; `file` is --config. Raises ConfigError.
    """
    path = config_place.find_file(environ, file)
    from_file: dict[str, Value] = {}
    if path is not None:
        # YAML takes its time to be imported, and often there is no file.
        from meshbpf.agent.config_file import read_file

        from_file = read_file(path)
    of_istio, of_mesh = _of_istio(environ)
    defaults = _defaults()
    values: dict[str, Value] = {}
    for key in KEYS:
        if key.field in flags:
            values[key.name] = Value(flags[key.field], FLAG)
        elif (text := environ.get(key.environment)) is not None:
            origin = f"env {key.environment}"
            try:
                values[key.name] = Value(key.of_text(text), origin)
            except ConfigError as error:
                raise misplaced(origin, key.name, error) from None
        elif (theirs := config_ztunnel.of_environment(key.name, environ)) is not None:
            values[key.name] = theirs
        elif (found := _first(key.name, of_istio, from_file, of_mesh)) is not None:
            values[key.name] = found
        else:
            values[key.name] = Value(defaults[key.field], DEFAULT)
    return Resolved(values, path)


def _of_istio(environ: Mapping[str, str]) -> tuple[Mapping[str, Value], Mapping[str, Value]]:
    """What PROXY_CONFIG and the mesh configuration say; the file stands between the two."""
    if not environ.get("PROXY_CONFIG") and not config_place.MESH_FILE.exists():
        return {}, {}  # the most frequent case pays for no YAML
    from meshbpf.agent import config_mesh

    return config_mesh.of_variable(environ), config_mesh.of_mesh_file()


def _first(name: str, *sources: Mapping[str, Value]) -> Value | None:
    return next((source[name] for source in sources if name in source), None)


def _defaults() -> dict[str, Any]:
    found: dict[str, Any] = {"node": os.uname().nodename.lower(), "state_dir": DEFAULT_STATE_DIR}
    for item in fields(Settings):
        if item.name not in found and item.name not in ("exempt", "origins"):
            found[item.name] = None if item.default is MISSING else item.default
    nothing = Exemptions()
    for name, part in EXEMPT_FIELDS.items():
        found[name] = getattr(nothing, part)
    return found
