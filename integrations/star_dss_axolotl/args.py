"""The `star_dss:` block of Axolotl's YAML: the options of the core, as a pydantic model."""

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
    """Add what the fields alone do not say: no other keys, and the core's own checks."""

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


# One source: names, types, defaults and descriptions are those of StarDSSOptions.
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
        # The other conflicts are found in what was written (`StarDSSPlugin.register`); which
        # attention it is, Axolotl may choose while it validates.
        if self.star_dss is not None and (problem := packing_leaks(self)):
            raise ConfigError(problem)
        return self


def is_listed(cfg: Any) -> bool:
    """Tell whether a configuration lists the plugin, by any of its paths.

    Axolotl 0.21 also takes `module:Class`.
    """
    names = [str(name).replace(":", ".").split(".") for name in cfg.get("plugins") or ()]
    module, *_, plugin = PLUGIN.split(".")
    return any((name[0], name[-1]) == (module, plugin) for name in names)


def options_of(cfg: Any) -> StarDSSOptions | None:
    """Return the options of a validated configuration; None where the plugin is not used.

    Args:
        cfg: Axolotl's configuration (any mapping).
    """
    block = cfg.get("star_dss")
    return None if block is None else StarDSSOptions(**_plain(block))


def _plain(value: Any) -> Any:
    """Return ordinary dicts and lists, in place of Axolotl's dicts that invent missing keys."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
