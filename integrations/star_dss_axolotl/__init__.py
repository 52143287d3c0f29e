"""STAR-DSS for Axolotl: list `star_dss_axolotl.StarDSSPlugin` under `plugins:` in the YAML."""

# Axolotl only logs an ImportError of a plugin and then trains without it, so it becomes a
# RuntimeError here.
try:
    from star_dss_axolotl.plugin import StarDSSPlugin
    from star_dss_plugin._version import __version__
except ImportError as error:
    raise RuntimeError(
        f"star_dss_axolotl cannot be imported: {type(error).__name__}: {error}. Training must not "
        "go on without the STAR-DSS loss. Install it with its needs: "
        "pip install 'star-dss-plugin[axolotl]'"
    ) from error

__all__ = ["StarDSSPlugin", "__version__"]
