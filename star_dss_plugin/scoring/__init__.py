"""Guards' answers to the column `star_scores`, cached and shared among processes."""
