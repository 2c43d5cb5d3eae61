"""Ask a folder's model as MindIE would, in a process that sees nothing but the folder and the libraries.

    python -P self_test.py FOLDER QUESTION NEW_TOKENS ANSWER.json

MindIE asks for the tokenizer, then for a ModelRunner, which it warms up with two steps; then it reads
prompts, one after the other in ``[1, T]``, and continues with one token of each row, ``[B, 1]``. This file
imports nothing of this package, and is no part of the folder.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class Row:
    """The tokens of a request so far, and the blocks of the cache that it has."""

    tokens: list[int]
    blocks: list[int]
    block_size: int

    def slots(self, positions) -> list[int]:
        """Where in the cache the tokens at some positions lie."""
        size = self.block_size
        return [self.blocks[at // size] * size + at % size for at in positions]


class Engine:
    """Requests in blocks of a runner's cache, read and continued as MindIE does; likeliest tokens only."""

    def __init__(self, runner):
        self.runner = runner
        self.block_size = int(runner.model_config.block_size)
        self.free = list(range(int(runner.npu_num_blocks)))

    def admit(self, prompt: list[int], new_tokens: int) -> Row:
        """A request with blocks for its prompt and its answer.

        Raises:
            ValueError: there are not as many.
        """
        count = -(-(len(prompt) + new_tokens) // self.block_size)
        if count > len(self.free):
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and an answer of {new_tokens} need {count} blocks of "
                f"{self.block_size} tokens, but the cache has {len(self.free)} free; give it more memory."
            )
        taken, self.free = self.free[:count], self.free[count:]
        return Row(list(prompt), taken, self.block_size)

    def finish(self, row: Row) -> None:
        """Give the blocks of a request back."""
        self.free += row.blocks

    def read(self, rows: list[Row]) -> None:
        """Read the prompts of new requests, and append the first token of each answer."""
        tokens = np.concatenate([row.tokens for row in rows]).reshape(1, -1)
        self._step(rows, tokens, [range(len(row.tokens)) for row in rows], prefill=True)

    def go_on(self, rows: list[Row]) -> None:
        """Append the next token of each answer."""
        tokens = np.array([row.tokens[-1:] for row in rows])
        self._step(rows, tokens, [[len(row.tokens) - 1] for row in rows], prefill=False)

    def _step(self, rows: list[Row], tokens: np.ndarray, positions: list, prefill: bool) -> None:
        lengths = [len(row.tokens) for row in rows]
        width = max(len(row.blocks) for row in rows)
        tables = [row.blocks + [-1] * (width - len(row.blocks)) for row in rows]
        slots = np.concatenate([row.slots(at) for row, at in zip(rows, positions, strict=True)])
        logits = self.runner.forward(
            input_ids=tokens.astype(np.int32),
            valid_length_each_example=lengths,
            block_tables=np.array(tables, np.int32),
            slot_mapping=slots.astype(np.int32),
            prefill=prefill,
            position_ids=np.concatenate(positions).astype(np.int32),
            prefill_head_indices=np.cumsum(lengths) - 1,
        ).asnumpy()
        if logits.shape[0] != len(rows) or not np.isfinite(logits).all():
            raise ValueError(
                f"a step with {len(rows)} rows gave logits {list(logits.shape)}, of which "
                f"{(~np.isfinite(logits)).sum()} are not finite; check the weights and compute_dtype."
            )
        for row, token in zip(rows, logits.argmax(-1), strict=True):
            row.tokens.append(int(token))

    def answer(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The ``new_tokens`` likeliest tokens after one prompt, whatever they are."""
        row = self.admit(prompt, new_tokens)
        self.read([row])
        for _ in range(new_tokens - 1):
            self.go_on([row])
        self.finish(row)
        return row.tokens[len(prompt) :]


def make_runner(folder: str, tokens: int):
    """A ModelRunner of one device, with a cache for ``tokens`` tokens of this model."""
    from mindformers.model_runner import ModelRunner

    sizes = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    return ModelRunner(folder, memory_of(sizes, tokens), 0, sizes["block_size"], npu_device_ids=[0])


def memory_of(sizes: dict, tokens: int) -> float:
    """GB that make ModelRunner count blocks for ``tokens`` tokens, and not one fewer by rounding.

    ``sizes``: config.json. Every block holds ``block_size`` keys and as many values in each layer.
    """
    heads = sizes.get("n_kv_heads") or sizes["num_heads"]
    row = heads * (sizes["hidden_size"] // sizes["num_heads"]) * _WIDTHS[sizes["compute_dtype"]]
    block = sizes["num_layers"] * 2 * sizes["block_size"] * row
    return (-(-tokens // sizes["block_size"]) + 0.5) * block / 2**30


def ask(folder: str, question: str, new_tokens: int) -> dict:
    """The answer to a question, and seconds of each part."""
    began = time.perf_counter()
    from mindformers.model_runner import get_model

    tokenizer, builder = get_model(folder)
    prompt = builder.make_context(0, [{"role": "user", "content": question}], chat_template_kwargs={})
    engine = Engine(make_runner(folder, len(prompt) + new_tokens))
    engine.answer([0] * 4, 2)  # the two steps of the warm-up
    loaded = time.perf_counter()
    answer = engine.answer(prompt, new_tokens)
    end = tokenizer.eos_token_id
    answer = answer[: answer.index(end) + 1] if end in answer else answer
    return {
        "text": tokenizer.decode(np.array(answer), skip_special_tokens=True),
        "seconds_to_load": loaded - began,
        "seconds_to_answer": time.perf_counter() - loaded,
    }


if __name__ == "__main__":
    found = ask(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    Path(sys.argv[4]).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
