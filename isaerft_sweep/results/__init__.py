"""A sweep's results: leaderboard, report and model cards."""
