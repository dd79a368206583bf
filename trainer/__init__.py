"""What learns: records, batches, losses, the model, snapshots, and the loop that ties them together."""
