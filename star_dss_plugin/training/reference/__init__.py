"""Choose and run the reference π_ref, or compute it once as a column."""
