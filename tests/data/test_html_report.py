"""The page of ``--report``: its samples show what is trained, its numbers are the manifest's."""

import json
from html.parser import HTMLParser

from data_lines import bot, chat, plain_lines, user, write_lines

from research.telechat2.data.job import Options
from research.telechat2.data.preparing import prepare


class Page(HTMLParser):
    """Texts of ``mark`` and of table cells; and whether what opens is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.marked, self.cells, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "html"):
            self.open.append(tag)
        if tag in ("mark", "td"):
            (self.marked if tag == "mark" else self.cells).append("")

    def handle_endtag(self, tag):
        if tag != "html":
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "mark" in self.open:
            self.marked[-1] += data
        if "td" in self.open:
            self.cells[-1] += data


def test_the_page_shows_samples_with_their_masks_and_the_counts(small_vocab, tmp_path):
    tags = "<script>alert(1)</script> & <mark>"
    lines = [chat(tags, tags), {"text": "a fox"}, "", *plain_lines(3)]
    write_lines(tmp_path / "d.jsonl", lines)
    result = prepare(
        tmp_path / "d.jsonl", small_vocab, tmp_path / "out", Options(max_length=200), report="en"
    )
    page = Page((tmp_path / "out" / "dataset.mindrecord.html").read_text(encoding="utf-8"))
    assert not page.open
    shown = "".join(page.marked)
    assert shown.count("<_end>") == 5
    for text in (tags, "a fox", "dog 0", "dog 2"):
        assert f"{text}<_end>" in shown
    assert "0 fox" not in shown and "You" not in shown
    counts = result["counts"]
    for number in ("trained_tokens", "padding_tokens"):
        assert f"{counts[number]:,}" in page.cells
    assert page.cells[page.cells.index("blank line") + 3] == "d.jsonl:3"
    assert page.cells[page.cells.index("blank line") :][:3] == ["blank line", "1", "16.67%"]
    assert str(tmp_path / "d.jsonl") in page.cells


def test_the_manifest_tells_lengths_formats_and_what_a_model_needs(small_vocab, tmp_path):
    messages = [{"role": "system", "content": "s"}, user("q"), bot("a")]
    lines = [{"messages": messages}, {"data": "a fox " * 30}, *plain_lines(2)]
    write_lines(tmp_path / "d.jsonl", lines)
    prepare(tmp_path / "d.jsonl", small_vocab, tmp_path / "out", Options(max_length=50))
    manifest = json.loads((tmp_path / "out" / "dataset.mindrecord.json").read_text())
    assert manifest["document_start_ids"] == [1, 6]
    assert manifest["options"]["train_on"] == "answers" and manifest["options"]["max_length"] == 50
    counts = manifest["counts"]
    assert counts["by_format"] == {"data": 1, "input/output": 2, "messages": 1}
    assert counts["by_prompt_format"] == {"chat": 1, "plain": 2} and manifest["prompt_format"] == "plain"
    assert sum(manifest["lengths"].values()) == 4 and all(
        int(n) & (int(n) - 1) == 0 for n in manifest["lengths"]
    )
    (entry,) = manifest["inputs"]
    assert entry["bytes"] == (tmp_path / "d.jsonl").stat().st_size
    stored = counts["tokens"] + counts["repeated_tokens"] + counts["padding_tokens"]
    assert stored == counts["records"] * 51


def test_the_page_speaks_chinese_and_names_the_lines_of_its_samples(small_vocab, tmp_path):
    write_lines(tmp_path / "a.jsonl", ["", {"text": "a fox"}, "{"])
    (tmp_path / "b.json").write_text(json.dumps(plain_lines(3)))
    data = [tmp_path / "a.jsonl", tmp_path / "b.json"]
    options = Options(max_length=200, bad_lines="skip")
    prepare(data, small_vocab, tmp_path / "out", options, report="zh")
    text = (tmp_path / "out" / "dataset.mindrecord.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and "<html lang=zh>" in text and "训练数据" in text
    assert page.cells[page.cells.index("空行") :][:4] == ["空行", "1", "16.67%", "a.jsonl:1"]
    assert page.cells[page.cells.index("跳过的行") + 1] == "2 (33.33%)"
    for place, said in (("a.jsonl:2", "a fox"), ("b.json:1", "dog 0"), ("b.json:3", "dog 2")):
        sample = text.split(f"<p>{place}: ")[1].split("<p>")[0]
        assert f"<mark>{said}" in sample
