"""What lies beside the weights of a release: config.json in each spelling, tokenizer, other small files."""
