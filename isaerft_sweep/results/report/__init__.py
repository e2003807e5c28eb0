"""The report of a sweep: an HTML page and pictures for papers."""
