"""A whole sweep on one page and in pictures for papers."""
