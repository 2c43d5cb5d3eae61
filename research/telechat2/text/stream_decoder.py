"""Decode token ids one by one."""

import codecs

from research.telechat2.text.vocabulary import EACH_BYTE, Vocabulary


class StreamDecoder:
    """Decode ids one by one; all that is returned, joined, equals ``vocabulary.decode`` of all ids.

    A character whose bytes are spread over several tokens comes out when it is complete.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True):
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")(EACH_BYTE)
        self._at_start = True  # SentencePiece drops the space it put before the first piece of a text

    def put(self, index: int) -> str:
        """Take the next id; return the text it completes, "" while a character is incomplete."""
        vocabulary, index = self._vocabulary, int(index)
        vocabulary.check_ids([index])
        if index in vocabulary.byte_ids:
            self._at_start = False
            return self._bytes.decode(vocabulary.byte_ids[index])
        at_start, text = self._at_start, self.end()
        if index in vocabulary.control_ids:
            return text + vocabulary.control_text(index, self._skip)
        self._at_start = False
        piece = vocabulary.decode_text([index]) if at_start else vocabulary.pieces[index].replace("▁", " ")
        return text + piece

    def end(self) -> str:
        """Return what is left: a replacement character for each byte of an incomplete character."""
        self._at_start = True
        return self._bytes.decode(b"", final=True)
