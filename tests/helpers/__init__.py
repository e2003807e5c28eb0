"""What several test modules share: servers and clusters to test against, made-up sweeps, waiting."""
