"""The reference π_ref: chosen, run, or computed once as a column."""
