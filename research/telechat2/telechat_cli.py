"""How every command of the plugin ends: one sentence and an exit code, never a traceback for a user's mistake."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Call ``main`` and end the process: 0 on success, 1 for a mistake a user can mend, 130 for Ctrl-C.

    ``ValueError`` and ``OSError`` are the errors a user can cause (see the house rules); anything else
    is a defect of ours and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
