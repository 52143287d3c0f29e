"""Load pretrained models and tokenizers, choose devices, and identify models by hashes."""
