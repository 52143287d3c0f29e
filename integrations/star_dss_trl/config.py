"""Define `StarDSSConfig`, TRL's `SFTConfig` with the options of STAR-DSS."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.options import StarDSSOptions

__all__ = ["HOST_LOSS_TYPES", "StarDSSConfig"]

HOST_LOSS_TYPES = ("nll", "dft", "chunked_nll")
"""TRL's own loss types, with which a StarDSSTrainer behaves exactly like an SFTTrainer."""


@dataclass
class StarDSSConfig(StarDSSOptions, SFTConfig):  # type: ignore[misc]
    """Configure a [`StarDSSTrainer`].

    Takes every argument of [`~trl.SFTConfig`] and every option of `StarDSSOptions`, by their names.
    `loss_type` takes the modes of STAR-DSS (`"star_dss"`, the default, `"hard"`, `"static"`,
    `"rejection"`, `"kl_only"`, `"sft"`, or a plugin's weight map) and TRL's own values, which
    behave exactly as in TRL.

    Raises:
        ConfigError: An option's value is invalid. This is checked before any model is loaded.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.star_dss_active:
            self.validate()
        elif self.guard is not None:
            raise ConfigError(
                f"loss_type is {self.loss_type!r}, TRL's own, with which nothing is shaped, but a "
                f"guard is set ({self.guard!r}). Set loss_type='star_dss' to use it, or guard=None "
                "for plain TRL."
            )

    @property
    def star_dss_active(self) -> bool:
        """Whether `loss_type` is one of STAR-DSS, not one of TRL's own."""
        return self.loss_type not in HOST_LOSS_TYPES
