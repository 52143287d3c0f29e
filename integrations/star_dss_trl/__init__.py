"""STAR-DSS for TRL: `SFTConfig` and `SFTTrainer` with a safety-shaped loss."""

from star_dss_plugin._version import __version__
from star_dss_trl.config import StarDSSConfig
from star_dss_trl.trainer import StarDSSTrainer

__all__ = ["StarDSSConfig", "StarDSSTrainer", "__version__"]
