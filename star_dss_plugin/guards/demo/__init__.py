"""A demonstration guard on SmolLM2-135M, which protects nobody."""
