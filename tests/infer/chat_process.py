"""A conversation at a terminal with a predictor that needs no model: it says what it was asked, slowly."""

import sys
import time

from research.telechat2.common.cli import run
from research.telechat2.generation.answer import STOPPED, Answer
from research.telechat2.infer.chat import chat
from research.telechat2.infer.terminal import Terminal, history_file


class Slow:
    """Answers with the lengths of all messages, then, if asked to, 100 slow characters."""

    prompt_format = "chat"

    def prompt_ids(self, conversation):
        return [1]

    def fits(self, prompt):
        return True

    def check(self, prompts):
        pass

    def ask(self, messages, on_text, stop):
        said = ""
        sizes = " ".join(f"{message['role'][0]}{len(message['content'])}" for message in messages)
        for part in [f"<{sizes}>", *("~" * 100 if messages[-1]["content"].startswith("slow") else "")]:
            said += part
            on_text(part)
            time.sleep(0.01)
            if stop():
                return Answer(said, [1], STOPPED, 1.0, 0.5)
        return Answer(said, [1], "", 1.0, 0.5)


def main() -> None:
    terminal = Terminal(history_file())
    chat(Slow(), None, terminal.lines(), terminal)


if __name__ == "__main__":
    sys.path.pop(0)
    run(main)
