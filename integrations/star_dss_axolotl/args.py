"""Define the `star_dss:` block of Axolotl's YAML as a pydantic model of `StarDSSOptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from star_dss_axolotl.conflicts import packing_leaks
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.options import StarDSSOptions

__all__ = ["PLUGIN", "StarDSSArgs", "StarDSSBlock", "is_listed", "options_of"]

PLUGIN = "star_dss_axolotl.StarDSSPlugin"
_TYPES = get_type_hints(StarDSSOptions)


class _Block(BaseModel):
    """Reject unknown keys, and run the checks of `StarDSSOptions`."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_switches_for_numbers(cls, data: Any) -> Any:
        # pydantic would read `chunk_size: yes` as 1.
        for name, value in data.items() if isinstance(data, Mapping) else ():
            if isinstance(value, bool) and _TYPES.get(name) in (int, float):
                raise ConfigError(f"{name} is {value!r}; it must be a number.")
        return data

    @model_validator(mode="after")
    def _core_checks(self) -> _Block:
        StarDSSOptions(**self.model_dump()).validate()
        return self


# Names, types, defaults and descriptions come from StarDSSOptions.
_FIELDS: dict[str, Any] = {
    f.name: (_TYPES[f.name], Field(default=f.default, description=f.metadata["help"]))
    for f in fields(StarDSSOptions)
}
StarDSSBlock: Any = create_model("StarDSSBlock", __base__=_Block, __module__=__name__, **_FIELDS)


class StarDSSArgs(BaseModel):
    """Add one nested block to Axolotl's configuration."""

    star_dss: StarDSSBlock | None = Field(
        default=None,
        description="Options of STAR-DSS; needed when the plugin is listed under `plugins`.",
    )

    @model_validator(mode="after")
    def _refuse_leaking_packs(self) -> StarDSSArgs:
        # Other conflicts are found in the configuration as written (`StarDSSPlugin.register`), but
        # Axolotl may choose the attention only when it validates.
        if self.star_dss is not None and (problem := packing_leaks(self)):
            raise ConfigError(problem)
        return self


def is_listed(cfg: Any) -> bool:
    """Return whether a configuration lists the plugin, under any of its import paths.

    Axolotl 0.21 also accepts `module:Class`.
    """
    names = [str(name).replace(":", ".").split(".") for name in cfg.get("plugins") or ()]
    module, *_, plugin = PLUGIN.split(".")
    return any((name[0], name[-1]) == (module, plugin) for name in names)


def options_of(cfg: Any) -> StarDSSOptions | None:
    """Return the options of a validated configuration; None if it has no `star_dss` block.

    Args:
        cfg: Axolotl's configuration (any mapping).
    """
    block = cfg.get("star_dss")
    return None if block is None else StarDSSOptions(**_plain(block))


def _plain(value: Any) -> Any:
    """Convert Axolotl's `DictDefault`s, which return None for missing keys, to plain dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
