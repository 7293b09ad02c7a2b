"""Training: the loop, averaging, checkpoints, run folders. Knows `GenerativeModel`, never a particular method."""
