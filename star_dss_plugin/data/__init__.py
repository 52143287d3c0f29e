"""Files to rows, rows to tokens, tokens to responses; and results back to files."""
