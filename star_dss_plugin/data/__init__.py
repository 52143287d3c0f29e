"""Read files into rows, tokenize rows, find responses, and write results to files."""
