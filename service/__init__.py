"""What answers: predictions over HTTP from the newest snapshot, and the command line."""
