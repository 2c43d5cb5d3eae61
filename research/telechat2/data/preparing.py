"""From jsonl to a training set: read, render, pack, write, report; ``telechat_preprocess.py`` calls it."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np

from research.telechat2 import telechat_chat
from research.telechat2.data import formats, packing, tokenizer_loading, writing

_NAMED_LINES = 10  # so many bad lines are listed in an error


def prepare(
    input_path: str | Path, vocab_file: str | Path, output_path: str | Path, max_length: int, seed: int
) -> dict:
    """Turn conversations into records of ``max_length + 1`` tokens; return the manifest.

    Conversations are shuffled by ``seed`` and packed; one longer than a record is skipped and counted.
    Raises ValueError for lines that cannot be used (all named in one message), for an empty data set, and
    for an output that exists.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; expected at least 1")
    target = writing.output_file(output_path)
    writing.check_absent(target)
    files = formats.input_files(input_path)
    tokenizer = tokenizer_loading.load_tokenizer(vocab_file)
    conversations, counts = _read(files, tokenizer, max_length + 1)
    random.Random(seed).shuffle(conversations)
    packed = packing.pack([len(ids) for ids, _ in conversations], max_length + 1)
    tokens = sum(len(ids) for ids, _ in conversations)
    records = (
        writing.fill_record([conversations[i] for i in record], max_length + 1, tokenizer.pad_token_id)
        for record in packed
    )
    manifest = {
        "prompt_format": max(counts["by_format"], key=counts["by_format"].get),
        "max_length": max_length,
        "seed": seed,
        "inputs": [{"path": str(file), "sha256": _sha256(file)} for file in files],
        "tokenizer": {"path": str(vocab_file), "sha256": _sha256(vocab_file), "vocab_size": len(tokenizer)},
        "counts": {
            **counts,
            "records": len(packed),
            "tokens": tokens,
            "trained_tokens": sum(int(mask.sum()) for _, mask in conversations),
            "padding_tokens": len(packed) * (max_length + 1) - tokens,
        },
    }
    writing.write(target, records, manifest)
    return {"output": str(target), **manifest}


def _read(files: list[Path], tokenizer, capacity: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict]:
    """Encode every conversation; return (ids, mask) pairs and the counts."""
    conversations, bad, lines = [], [], 0
    skipped: dict[str, list[str]] = {}
    by_format: Counter[str] = Counter()
    with_markers = 0
    for file in files:
        for number, line in formats.read_lines(file):
            lines += 1
            if not line.strip():
                skipped.setdefault("blank line", []).append(f"{file.name}:{number}")
                continue
            try:
                with formats.naming(file, number):
                    conversation = formats.parse_line(line)
                    segments = conversation.render()
                    ids, mask = telechat_chat.encode(segments, tokenizer)
                    if not any(mask):
                        raise ValueError(
                            "the conversation has no answer to train on; add one or remove the line"
                        )
            except ValueError as error:
                bad.append((f"{file.name}:{number}", error))
                continue
            if len(ids) > capacity:
                reason = f"longer than a record of {capacity} tokens"
                skipped.setdefault(reason, []).append(f"{file.name}:{number}")
                continue
            by_format[conversation.prompt_format] += 1
            with_markers += any(not s.special and tokenizer.has_marker(s.text) for s in segments)
            conversations.append((np.array(ids, np.int32), np.array(mask, bool)))
    if bad:
        raise ValueError(_describe(bad, lines))
    if not conversations:
        names = ", ".join(map(str, files))
        reasons = "; ".join(f"{len(where)} {reason}" for reason, where in skipped.items()) or "no lines"
        raise ValueError(f"{names} holds no conversation to write ({reasons}); nothing was written")
    return conversations, {
        "lines": lines,
        "conversations": len(conversations),
        "skipped": {reason: len(where) for reason, where in skipped.items()},
        "skipped_lines": skipped,
        "by_format": dict(by_format),
        "with_special_text": with_markers,
    }


def _describe(bad: list[tuple[str, ValueError]], lines: int) -> str:
    _, first = bad[0]
    if len(bad) == 1:
        return f"{first}. Nothing was written"
    others = ", ".join(where for where, _ in bad[1 : _NAMED_LINES + 1])
    more = f" and {len(bad) - 1 - _NAMED_LINES} more" if len(bad) > _NAMED_LINES + 1 else ""
    return f"{first}. {len(bad)} of {lines} lines cannot be used; others: {others}{more}. Nothing was written"


def report(result: dict) -> str:
    """Return what ``prepare`` did, in lines for a reader."""
    counts = result["counts"]
    skipped = counts["skipped"]
    total = counts["tokens"] + counts["padding_tokens"]
    lines = [
        f"read {counts['lines']:,} lines = {counts['conversations']:,} conversations written "
        f"+ {sum(skipped.values()):,} skipped"
    ]
    first = {reason: where[0] for reason, where in counts["skipped_lines"].items()}
    lines += [f"  skipped {count:,}: {reason} (first: {first[reason]})" for reason, count in skipped.items()]
    if len(counts["by_format"]) > 1:
        both = " and ".join(f"{count:,} {name}" for name, count in sorted(counts["by_format"].items()))
        lines.append(f"  mixed prompt formats: {both}; recorded as {result['prompt_format']}")
    if counts["with_special_text"]:
        lines.append(
            f"  {counts['with_special_text']:,} contain special-token text (such as <_end>), encoded as text"
        )
    lines += [
        f"wrote {counts['records']:,} records of {result['max_length'] + 1:,} tokens to {result['output']}",
        f"  prompt format {result['prompt_format']}, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} of them trained, padding {counts['padding_tokens'] / total:.2%}",
    ]
    return "\n".join(lines)


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
