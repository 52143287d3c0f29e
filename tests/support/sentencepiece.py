"""Small tokenizers that strip the first space and fall back to bytes, as SentencePiece does."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of kind "bpe" or "unigram"."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    corpus = ["the quick brown fox jumps over the lazy dog", "hello world, how are you?"]
    if kind == "bpe":
        model = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
        backend = Tokenizer(model)
        trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=specials, show_progress=False)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.train_from_iterator(corpus, trainer)
    else:
        pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz,.?!", "▁the", "▁hello", "▁world", "ing", "▁a"]
        scored = [(piece, -float(i % 7 + 1)) for i, piece in enumerate([*specials, *pieces])]
        backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
