"""What a sweep leaves: leaderboard and model cards."""
