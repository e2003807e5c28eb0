"""The forward pass of a trial: frozen layers' outputs, the layers above the hook point, the head, batches."""
