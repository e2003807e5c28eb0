"""What happened: the sweep's durable state on disk."""
