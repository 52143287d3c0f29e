"""The fast path of the local engine: prefixes that requests share are computed once."""
