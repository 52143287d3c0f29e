"""Score data sets with guards: the column `star_scores`, cached and shared among processes."""
