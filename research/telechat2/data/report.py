"""What a run did, said to a reader."""


def summary(result: dict) -> str:
    """Return what ``prepare`` did, in lines for a reader."""
    counts = result["counts"]
    skipped = counts["skipped"]
    share = f" ({sum(skipped.values()) / counts['lines']:.2%})" if skipped else ""
    total = counts["records"] * (result["max_length"] + 1)
    texts = f"+ {counts['texts']:,} texts " if counts["texts"] else ""
    lines = [
        f"read {counts['lines']:,} lines = {counts['conversations']:,} conversations {texts}written "
        f"+ {sum(skipped.values()):,} skipped{share}"
    ]
    first = {reason: where[0] for reason, where in counts["skipped_lines"].items()}
    lines += [f"  skipped {n:,}: {reason} (first: {first[reason]})" for reason, n in skipped.items()]
    formats = ", ".join(f"{count:,} {name}" for name, count in counts["by_format"].items())
    lines.append(f"  formats: {formats}")
    if counts["copies_by_weight"]:
        lines.append(f"  {counts['copies_by_weight']:,} further copies, by the weights of the files")
    if counts["truncated"]:
        lines.append(f"  {counts['truncated']:,} cut at a turn border to fit a record")
    if counts["unused_fields"]:
        fields = ", ".join(f"{count:,} {name}" for name, count in counts["unused_fields"].items())
        lines.append(f"  fields that are not used (metadata, or named in --ignore_fields): {fields}")
    if counts["out_of_turn"]:
        lines.append(f"  {counts['out_of_turn']:,} conversations whose turns do not alternate")
    if counts["changed_text"]:
        lines.append(f"  {counts['changed_text']:,} hold text that the vocabulary changes for good")
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
