"""Lines of data that several test files make, and records read back."""

import json
from pathlib import Path

import numpy as np

from research.telechat2.data import encoding, sources
from research.telechat2.data.job import Options


def user(content) -> dict:
    return {"role": "user", "content": content}


def bot(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def chat(*turns, **more) -> dict:
    """Questions and answers in turn, as messages, with a short system text."""
    messages = [(bot if i % 2 else user)(turn) for i, turn in enumerate(turns)]
    return {"messages": [{"role": "system", "content": "s"}, *messages], **more}


def as_line(line) -> bytes:
    """A line of jsonl: of an object, or as given."""
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()


def write_lines(path: Path, lines) -> Path:
    path.write_bytes(b"".join(as_line(line) + b"\n" for line in lines))
    return path


def encoded(words, *lines, capacity=500, weight=1.0, **settings) -> encoding.Encoded:
    """Lines encoded as one batch."""
    batch = sources.Batch(0, Path("d.jsonl"), weight, 1, [as_line(line) + b"\n" for line in lines])
    settings = {"bad_lines": "skip", "seed": 0, **settings}
    return encoding.encode_batch(batch, words, Options(capacity - 1, **settings))


def items(result: encoding.Encoded) -> list[np.ndarray]:
    """The tokens of each item."""
    ends = np.cumsum(abs(result.lengths))
    return [result.tokens[end - abs(n) : end] for end, n in zip(ends, result.lengths, strict=True)]


def trained_texts(tokens: np.ndarray, words) -> list[str]:
    """The text of each run of trained tokens."""
    spans = words.spans((tokens & ~encoding.TRAINED).tolist(), (tokens >= encoding.TRAINED).tolist())
    runs, before = [], False
    for span in spans:
        if span.trained:
            runs = runs if before else [*runs, ""]
            runs[-1] += span.text
        before = span.trained
    return runs


def read(path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Records of a MindRecord file in their order, as MindSpore reads them."""
    from mindspore.dataset import MindDataset

    data = MindDataset(str(path), columns_list=["input_ids", "labels"], shuffle=False)
    rows = data.create_dict_iterator(num_epochs=1, output_numpy=True)
    return [(row["input_ids"], row["labels"]) for row in rows]


def plain_lines(count: int) -> list[dict]:
    """Different short conversations in the README's format."""
    return [{"input": f"{i} fox", "output": f"dog {i}"} for i in range(count)]
