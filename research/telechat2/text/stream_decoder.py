"""Decode token ids one by one."""


class StreamDecoder:
    """Decode ids one by one; all that is returned, joined, equals ``tokenizer.decode`` of all ids.

    A character whose bytes are spread over several tokens comes out when it is complete.
    """

    def __init__(self, tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._bytes = bytearray()
        self._at_start = True  # SentencePiece drops the space it put before the first piece of a text

    def put(self, index: int) -> str:
        """Take the next id; return the text it completes, "" while a character is incomplete."""
        tokenizer = self._tokenizer
        index = int(index)
        tokenizer.check_ids([index])
        if index in tokenizer._byte_ids:
            self._at_start = False
            self._bytes += tokenizer._byte_ids[index]
            return self._take_characters(at_end=False)
        text = self._take_characters(at_end=True)
        piece = tokenizer._pieces[index]
        if index in tokenizer._control_ids:
            self._at_start = True
            return text if tokenizer.is_skipped(index, self._skip) else text + piece
        text += tokenizer.sp_model.decode([index]) if self._at_start else piece.replace("▁", " ")
        self._at_start = False
        return text

    def end(self) -> str:
        """Return what is left: a replacement character for each byte of an incomplete character."""
        self._at_start = True
        return self._take_characters(at_end=True)

    def _take_characters(self, at_end: bool) -> str:
        """Take complete characters off the pending bytes; invalid bytes are replaced singly."""
        text = ""
        while self._bytes:
            try:
                done = self._bytes.decode("utf-8")
                self._bytes.clear()
                return text + done
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode("utf-8")
                del self._bytes[: error.start]
                if error.reason == "unexpected end of data" and not at_end:
                    return text
                text += "\ufffd"
                del self._bytes[:1]
        return text
