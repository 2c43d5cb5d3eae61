"""Training data: formats, packing, writing (MindRecord), and the whole way from jsonl."""
