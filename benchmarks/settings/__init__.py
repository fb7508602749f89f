"""Settings at which the cycle moves a small chat model, with a dense judge."""
