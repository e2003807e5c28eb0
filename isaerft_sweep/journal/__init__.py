"""The sweep's durable state on disk."""
