"""The trainer that toy-host loads, and the options in the YAML's block `star_dss`."""

import copy
from dataclasses import asdict, dataclass

import torch
from toy_host import ToyTrainer

from star_dss_plugin import ConfigError, StarDSSOptions, score_dataset, star_dss_loss


@dataclass
class ToyOptions:
    """The options of STAR-DSS that this trainer honours."""

    guard: str | dict | None = None
    segmenter: str = "tokens"
    chunk_size: int = 5
    loss_type: str = "star_dss"
    kl_coef: float = 0.5
    threshold: float = 0.5


def options_of(config):
    """Return the options of the block `star_dss`, checked.

    Raises:
        ConfigError: There is no such block, or an option is unknown or out of range.
    """
    block = config.get("star_dss")
    if not isinstance(block, dict):
        raise ConfigError(f"star_dss is {block!r}; give a block with a guard and its options.")
    try:
        options = StarDSSOptions(**asdict(ToyOptions(**block)))
    except TypeError as error:  # an option that ToyOptions does not have
        raise ConfigError(f"The block star_dss is not valid: {error}") from error
    options.validate()
    return options


class StarDSSToyTrainer(ToyTrainer):
    """`ToyTrainer` with the STAR-DSS loss; the reference is the model as it starts."""

    def __init__(self, config):
        self.options = options_of(config)  # before the model is loaded
        super().__init__(config)
        self.reference = copy.deepcopy(self.model).eval()

    def prepare(self, dataset):
        """Score every prefix of every response, once."""
        options = self.options
        return score_dataset(
            dataset,
            self.tokenizer,
            guard=options.guard,
            segmenter=options.segmenter,
            chunk_size=options.chunk_size,
        )

    def loss(self, logits, row):
        with torch.no_grad():
            ref_logits = self.reference(row["input_ids"][None]).logits
        found = star_dss_loss(
            logits,
            row["labels"][None],
            row["star_scores"][None],
            ref_logits=ref_logits,
            loss_type=self.options.loss_type,
            kl_coef=self.options.kl_coef,
            threshold=self.options.threshold,
        )
        return found.loss
