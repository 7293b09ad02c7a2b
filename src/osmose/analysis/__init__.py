"""Looking into trained models: what they cost."""
