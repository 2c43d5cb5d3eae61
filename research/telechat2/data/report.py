"""What a run did, said to a reader."""


def summary(result: dict) -> str:
    """Return what ``prepare`` did, in lines for a reader."""
    counts = result["counts"]
    skipped = counts["skipped"]
    total = counts["records"] * (result["max_length"] + 1)
    texts = f"+ {counts['texts']:,} texts " if counts["texts"] else ""
    lines = [
        f"read {counts['lines']:,} lines = {counts['conversations']:,} conversations {texts}written "
        f"+ {sum(skipped.values()):,} skipped"
    ]
    first = {reason: where[0] for reason, where in counts["skipped_lines"].items()}
    lines += [f"  skipped {n:,}: {reason} (first: {first[reason]})" for reason, n in skipped.items()]
    formats = ", ".join(f"{count:,} {name}" for name, count in counts["by_format"].items())
    lines.append(f"  formats: {formats}")
    if counts["copies_by_weight"]:
        lines.append(f"  {counts['copies_by_weight']:,} further copies, by the weights of the files")
    if counts["truncated"]:
        lines.append(f"  {counts['truncated']:,} cut at a turn border to fit a record")
    if len(counts["by_prompt_format"]) > 1:
        both = " and ".join(f"{count:,} {name}" for name, count in counts["by_prompt_format"].items())
        lines.append(f"  mixed prompt formats: {both}; recorded as {result['prompt_format']}")
    if counts["with_special_text"]:
        lines.append(
            f"  {counts['with_special_text']:,} contain special-token text (such as <_end>), encoded as text"
        )
    files = f", {len(result['files'])} files" if len(result["files"]) > 1 else ""
    lines += [
        f"wrote {counts['records']:,} records of {result['max_length'] + 1:,} tokens to {result['output']}"
        + files,
        f"  prompt format {result['prompt_format']}, {counts['tokens']:,} tokens, "
        f"{counts['trained_tokens']:,} of them trained, padding {counts['padding_tokens'] / total:.2%}",
    ]
    return "\n".join(lines)
