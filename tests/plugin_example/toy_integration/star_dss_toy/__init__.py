"""Register STAR-DSS for toy-host; this module imports neither the host nor torch."""

from star_dss_plugin import hookimpl
from star_dss_plugin.hookspecs import Integration

TRAINER = "star_dss_toy.trainer:StarDSSToyTrainer"


def claims(raw):
    """A configuration of toy-host has a block of its name."""
    return "toy" in raw


@hookimpl
def star_dss_register_integrations(register):
    register(
        "toy",
        Integration(
            host="toy-host",
            versions=">=2,<3",
            install="star-dss-toy[host]",
            trainer=TRAINER,
            options="star_dss_toy.trainer:ToyOptions",
            configuration="a YAML of toy-host, with the blocks toy and star_dss",
            claims=claims,
            check="star_dss_toy.check:check",
        ),
    )
