"""What `star-dss check` asks about a YAML of toy-host."""

from toy_host import read
from transformers import AutoTokenizer

from star_dss_plugin import StarDSSError
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.hookspecs import Findings
from star_dss_plugin.training.preflight import check_options, estimate
from star_dss_toy import TRAINER
from star_dss_toy.trainer import options_of


def check(path, raw, *, data):
    """Find everything that would stop a run, or would make it plain finetuning."""
    settings = raw["toy"] if isinstance(raw["toy"], dict) else {}
    found = Findings()
    if settings.get("trainer") != TRAINER:
        found.problems.append(
            f"toy.trainer is {settings.get('trainer')!r}, with which toy-host trains without "
            f"STAR-DSS. Set trainer: {TRAINER}"
        )
    try:
        options = options_of(raw)
    except StarDSSError as error:
        found.problems.append(str(error))
        return found
    looked_up = check_options(options)
    found.notes += looked_up.notes
    found.problems += looked_up.problems
    if data and not found.problems:
        tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        rows = read(settings["data"], tokenizer)
        cost = estimate(rows, ChatTokenizer(tokenizer), options)
        found.notes.append(f"train data: {cost}")
    return found
