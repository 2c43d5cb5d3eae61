"""Decode token ids one by one."""

from research.telechat2.text.vocabulary import Vocabulary


class StreamDecoder:
    """Decode ids one by one; all that is returned, joined, equals ``vocabulary.decode`` of all ids.

    A character whose bytes are spread over several tokens comes out when it is complete.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True):
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._bytes = bytearray()
        self._at_start = True  # SentencePiece drops the space it put before the first piece of a text

    def put(self, index: int) -> str:
        """Take the next id; return the text it completes, "" while a character is incomplete."""
        vocabulary, index = self._vocabulary, int(index)
        vocabulary.check_ids([index])
        if index in vocabulary.byte_ids:
            self._at_start = False
            self._bytes += vocabulary.byte_ids[index]
            return self._take_characters(at_end=False)
        text = self._take_characters(at_end=True)
        if index in vocabulary.control_ids:
            self._at_start = True
            return text + vocabulary.control_text(index, self._skip)
        text += (
            vocabulary.decode_text([index]) if self._at_start else vocabulary.pieces[index].replace("▁", " ")
        )
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
