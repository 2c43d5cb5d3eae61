"""Relatives of TeleChat2: TeleChat v1, and Llama models in either direction, with config and tokenizer."""
