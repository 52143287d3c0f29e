"""Is a model still safe, and still useful? Comparison, threats, landscape, capability."""
